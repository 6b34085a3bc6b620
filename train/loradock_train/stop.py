"""When a run saves, and how it ends early: by steps, by the clock, and when it is asked to stop.

Signals are only noted; the run saves and ends at its next whole step, so that nothing is half done. A second signal
ends the process as if this file were not there.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradock_train.config import TrainConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody wants the run to end."""

    def __init__(self) -> None:
        self.is_set = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Note SIGTERM and Ctrl-C while the block runs. Only the main thread may: elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            self.is_set = True
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Saver(TrainerCallback):
    """Asks the trainer for a save when one is due, and ends the run when it is asked to stop."""

    def __init__(
        self,
        config: TrainConfig,
        request: StopRequest,
        save_steps: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """save_steps: as a number, where the config has a share of the run."""
        self._save_steps, self._every_s, self._request, self._clock = save_steps, config.save_every_s, request, clock
        self._saved_s = clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A finished run is exported, not saved: no save is due at its last step."""
        steps, every_s = self._save_steps, self._every_s
        is_over = state.global_step >= state.max_steps
        is_due = (steps is not None and state.global_step % steps == 0) or (
            every_s is not None and self._clock() - self._saved_s >= every_s
        )
        if not is_over and (is_due or self._request.is_set):
            control.should_save = True
            control.should_training_stop = control.should_training_stop or self._request.is_set
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The next one is due that long after this one was written."""
        self._saved_s = self._clock()
