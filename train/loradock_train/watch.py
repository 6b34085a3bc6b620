"""Looks at a run while it trains, and says once what is odd about it: a transformers callback over trouble.py."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradock_train.compiled import Tally
from loradock_train.config import TrainConfig
from loradock_train.config_task import METRICS
from loradock_train.model import Precision, has_fast_bf16
from loradock_train.progress import Reporter
from loradock_train.results import perplexity_of
from loradock_train.trouble import Course, first_without_fall, no_fall_told, slow_advice

SLOW_CHECK_STEPS = 20


class Watch(TrainerCallback):
    """`notices` holds what was told."""

    def __init__(
        self,
        config: TrainConfig,
        precision: Precision,
        reporter: Reporter,
        learnt_share: float,
        vocabulary: int,
        padded_share: Callable[[], float],
        is_packed: bool,
        show: Callable[[str], None],
    ) -> None:
        """padded_share: of all tokens that the model computed so far."""
        self.notices: list[str] = []
        self.compiled: Tally | None = None
        """Of a run whose layers are compiled."""
        self._has_told_uncompiled = False
        self._config, self._precision, self._reporter = config, precision, reporter
        self._learnt_share, self._vocabulary, self._padded_share = learnt_share, vocabulary, padded_share
        self._is_packed, self._show = is_packed, show
        self._steps_here = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps_here += 1
        if not self._has_told_uncompiled and self.compiled is not None and (odd := self.compiled.told()) is not None:
            self._has_told_uncompiled = True
            self._tell(odd)
        if self._steps_here == SLOW_CHECK_STEPS:
            for text in slow_advice(
                self._padded_share(), self._is_packed, self._config.group_by_length, self._precision.arithmetic,
                has_fast_bf16(),
            ):  # fmt: skip
                self._tell(text)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        losses = [entry["loss"] for entry in self._reporter.history if "loss" in entry]
        if logs is None or "loss" not in logs or first_without_fall(losses) != len(losses):
            return
        config = self._config
        usual = {"lora": 1e-4, "full": 1e-5, "scratch": 1e-3}[config.kind]
        warmup = config.warmup_steps if config.warmup_steps >= 1 else 0.0
        course = Course(
            state.global_step, config.peak_learning_rate, usual, warmup, self._learnt_share, self._vocabulary
        )
        self._tell(no_fall_told(losses, course))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is not None and "eval_loss" in metrics:
            loss = metrics["eval_loss"]
            names = METRICS[self._config.task.kind] if self._config.task is not None else ()
            scores = "".join(f", {name} {metrics[f'eval_{name}']:.4g}" for name in names if f"eval_{name}" in metrics)
            told = f"validation loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}{scores}"
            self._show(f"step {state.global_step}: {told}")

    def _tell(self, text: str) -> None:
        self.notices.append(text)
        self._show(f"note: {text}")
