"""What a person and a program see while training runs: a bar on stderr and a line of metrics.jsonl for every log.

A transformers callback; knows nothing of data or checkpoints.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradock_train.errors import LossError
from loradock_train.schedule import Length
from loradock_train.trouble import not_finite_told


class Meter:
    """Time and tokens of one training run; the trainer counts, schedule and reports read."""

    def __init__(self, tokens: int = 0, earlier_s: float = 0.0) -> None:
        self.tokens = tokens
        """Tokens put through the model so far, padding excluded."""
        self.unshared_tokens = 0
        """Those of this process that the others have not heard of."""
        self._earlier_s = earlier_s
        self._started_s: float | None = None
        self._stopped_s: float | None = None

    def count(self, tokens: int) -> None:
        """This process has put them through."""
        self.tokens += tokens
        self.unshared_tokens += tokens

    def share(self, tokens: int) -> None:
        """All processes have put through so many since they last told each other."""
        self.tokens += tokens - self.unshared_tokens
        self.unshared_tokens = 0

    def start(self) -> None:
        self._started_s = time.monotonic()

    def stop(self) -> None:
        self._stopped_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those before a resume included; 0 before it starts."""
        if self._started_s is None:
            return self._earlier_s
        return self._earlier_s + (time.monotonic() if self._stopped_s is None else self._stopped_s) - self._started_s

    @property
    def tokens_per_s(self) -> float:
        """Mean since the start; 0 before it."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


class Reporter(TrainerCallback):
    """Draws the bar, writes metrics.jsonl, ends the run at its time limit and at a loss that is no number."""

    def __init__(
        self,
        path: Path | None,
        length: Length,
        meter: Meter,
        console: Console,
        history: Sequence[dict[str, Any]] = (),
        send: Callable[[dict[str, Any]], None] = lambda _line: None,
    ) -> None:
        """path: metrics.jsonl, None in processes that write nothing. history: the lines that the run wrote before it
        was resumed. send: is given every new line."""
        self.history: list[dict[str, Any]] = list(history)
        self._path, self._length, self._meter, self._send = path, length, meter, send
        self._last_step_s = meter.elapsed_s
        self._slowest_step_s = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=False, refresh_per_second=4)
        self._task = self._bar.add_task("training", total=1.0, status="")
        self._loss = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meter.start()
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        elapsed_s, limit_s = self._meter.elapsed_s, self._length.max_time_s
        self._slowest_step_s = max(
            self._slowest_step_s if state.global_step > 2 else 0.0, elapsed_s - self._last_step_s
        )
        self._last_step_s = elapsed_s
        # Stop before a step that would end past the limit. At least one step is always made.
        if limit_s is not None and elapsed_s + self._slowest_step_s > limit_s:
            control.should_training_stop = True
        self._draw(state.global_step)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        entry.update({key: value for key, value in logs.items() if key not in ("epoch", "total_flos")})
        entry.update(
            tokens=self._meter.tokens,
            tokens_per_s=round(self._meter.tokens_per_s, 1),
            elapsed_s=round(self._meter.elapsed_s, 3),
        )
        self._write(entry)
        if "loss" in logs:
            self._loss = logs["loss"]
            if not math.isfinite(self._loss):
                rate = logs.get("learning_rate", 0.0)
                raise LossError(not_finite_told(self._loss, state.global_step, rate, args.fp16))
            self._draw(state.global_step)

    def note(self, values: dict[str, Any]) -> None:
        """A line of its own before the first step."""
        entry = {"step": 0, **values}
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self._send(entry)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        self._bar.stop()

    def _draw(self, step: int) -> None:
        elapsed_s = self._meter.elapsed_s
        share = self._length.progress(step, elapsed_s)
        left_s = elapsed_s * (1.0 - share) / share if share > 0 else math.nan
        steps = f"step {step}" if self._length.is_clock_bound else f"step {step}/{self._length.max_steps}"
        loss = "" if math.isnan(self._loss) else f"  loss {self._loss:.3f}"
        left = "" if math.isnan(left_s) else f"  {_minutes(left_s)} left"
        status = f"{steps}{loss}  {self._meter.tokens_per_s:,.0f} tokens/s{left}"
        self._bar.update(self._task, completed=share, status=status)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
