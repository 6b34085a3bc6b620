"""The best validation so far: when a run has learnt enough, and the trained weights it had then.

    RUN/saves/best-00000120/      weights.safetensors, complete or absent

What was best follows from the lines of metrics.jsonl alone. So a run that goes on from a save stands where it stood,
also where it had been further before it was killed: a best that a save still needs is kept. Knows no model's insides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradock_train.config import TrainConfig
from loradock_train.errors import Problem, ResumeError
from loradock_train.export import write_atomically
from loradock_train.processes import on_main
from loradock_train.saves import FOLDER, load_weights, remove_save, saved_histories, trained_state


@dataclass(frozen=True)
class Standing:
    """Where a run stands after some validations."""

    step: int | None
    """Of the best validation; None before the first that is a number."""
    value: float
    stale: int
    """Validations since the last one that was better by more than min_delta."""


def standing(values: Sequence[tuple[int, float]], low: bool, min_delta: float = 0.0) -> Standing:
    """From the validations so far (step and value): the earliest of the best, and for how long nothing got better.

    low: whether less is better. NaN is never better.
    """
    sign = -1.0 if low else 1.0
    best_step, best, reference, stale = None, -math.inf, -math.inf, 0
    for step, value in values:
        if sign * value > best:
            best_step, best = step, sign * value
        if sign * value > reference + min_delta or (reference == -math.inf and not math.isnan(value)):
            reference, stale = sign * value, 0
        else:
            stale += 1
    return Standing(best_step, sign * best, stale)


class BestKeeper(TrainerCallback):
    """Keeps the trained weights of the best validation, and ends the run by `early_stopping`."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, directory: Path, history: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> None:
        """directory: the run's. history: the lines of metrics.jsonl so far."""
        self._config, self._model, self._directory, self._history = config, model, directory, history
        by = config.chosen_best_by
        assert by is not None
        self.key = by if by == "eval_loss" else f"eval_{by}"
        """In the lines of metrics.jsonl."""

    @property
    def now(self) -> Standing:
        """Where the run stands."""
        return self.of(self._history())

    def of(self, history: Sequence[Mapping[str, Any]]) -> Standing:
        """Where a run with these lines stands."""
        values = [(int(entry["step"]), float(entry[self.key])) for entry in history if self.key in entry]
        stopping = self._config.early_stopping
        return standing(values, self.key == "eval_loss", stopping.min_delta if stopping is not None else 0.0)

    def check_resumable(self) -> None:
        """Raises ResumeError where the best weights that the run had are no longer there."""
        step = self.now.step
        if step is not None and not self._place(step).is_dir():
            raise ResumeError(
                f"{self._directory} cannot be resumed (start anew with --overwrite):",
                [Problem(str(self._place(step)), "the weights of the best validation are gone")],
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Called when the validation's line is already in the history."""
        now = self.now
        if now.step == state.global_step:
            self._keep(now.step)
        stopping = self._config.early_stopping
        if stopping is not None and now.stale >= stopping.patience:
            control.should_training_stop = True
            control.should_save = False  # a finished run is exported, not saved
        return control

    def restore(self) -> int | None:
        """Put the best weights into the model. Returns their step; None where no validation was a number."""
        step = self.now.step
        if step is not None:
            load_weights(self._place(step), self._model)
        return step

    def _place(self, step: int) -> Path:
        return self._directory / FOLDER / f"best-{step:08d}"

    def _keep(self, step: int) -> None:
        """Written first; then those go that neither the run nor a save of it needs."""
        on_main(lambda: self._write(step, trained_state(self._model)))

    def _write(self, step: int, state: Mapping[str, Tensor]) -> None:
        place = self._place(step)
        if place.exists():  # from before a kill
            remove_save(place)
        write_atomically(place, lambda temporary: save_file(dict(state), temporary / "weights.safetensors"))
        needed = {step} | {self.of(history).step for history in saved_histories(self._directory)}
        for old in (self._directory / FOLDER).glob("best-*"):
            if old != place and int(old.name.removeprefix("best-")) not in needed:
                remove_save(old)
