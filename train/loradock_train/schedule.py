"""How long a run lasts and what the learning rate is at each moment. Pure arithmetic: no torch, no clock."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from loradock_train.config import TrainConfig

UNLIMITED_STEPS = 10**9
STREAM_EVAL_STEPS = 500
"""Between two validations of a run over a stream, where nobody knows how many steps it has."""


@dataclass(frozen=True)
class Length:
    """The limits of a run, in optimiser steps and seconds."""

    steps_per_epoch: int
    max_steps: int
    """UNLIMITED_STEPS where only the clock ends the run."""
    max_time_s: float | None
    share: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    """Of the passes over a stream that are behind; nobody knows how many steps they are."""

    @property
    def is_clock_bound(self) -> bool:
        """Whether no number of steps ends the run."""
        return self.max_steps >= UNLIMITED_STEPS

    def progress(self, step: int, elapsed_s: float) -> float:
        """Share of the run that is behind us, by whichever limit is nearer: 0 to 1."""
        by_steps = step / self.max_steps
        by_clock = elapsed_s / self.max_time_s if self.max_time_s is not None else 0.0
        return min(1.0, max(by_steps, by_clock, self.share()))


def length_of(config: TrainConfig, num_examples: int, num_devices: int) -> Length:
    """Steps of the run for that many rows."""
    batches = math.ceil(num_examples / (config.train_batch_size_per_device * num_devices))
    steps_per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    limits = [UNLIMITED_STEPS]
    if config.epoch_limit is not None:
        limits.append(max(1, math.ceil(config.epoch_limit * steps_per_epoch)))
    if config.max_steps is not None:
        limits.append(config.max_steps)
    return Length(steps_per_epoch, min(limits), config.max_time_s)


def length_of_stream(config: TrainConfig, passes: Callable[[], float]) -> Length:
    """The limits of a run over a stream, whose steps are not known. passes: over the stream, so far."""
    limit = config.num_epochs
    share = (lambda: passes() / limit) if limit is not None else (lambda: 0.0)
    return Length(UNLIMITED_STEPS, config.max_steps or UNLIMITED_STEPS, config.max_time_s, share)


@dataclass(frozen=True)
class Intervals:
    """Whole steps from one to the next."""

    logging: int
    evaluation: int
    saving: int | None
    """None: by the clock alone."""


def intervals_of(config: TrainConfig, length: Length) -> Intervals:
    """What the config says, shares of the run as numbers of its steps, rounded up as transformers does."""
    evaluation = _whole(config.eval_steps, length)
    if evaluation is None:
        # The end of an epoch is a step, too: so its validation comes before the step's save, and not twice on resume.
        evaluation = length.steps_per_epoch
        if config.streaming:
            evaluation = STREAM_EVAL_STEPS if length.is_clock_bound else max(1, math.ceil(length.max_steps / 10))
    logging, saving = _whole(config.logging_steps, length), _whole(config.save_steps, length)
    assert logging is not None
    return Intervals(logging, evaluation, saving)


def _whole(steps: float | None, length: Length) -> int | None:
    if steps is None or steps >= 1:
        return None if steps is None else int(steps)
    return math.ceil(length.max_steps * steps)


def schedule_notices(config: TrainConfig, num_examples: int, is_stream: bool, processes: int) -> list[str]:
    """What there is to say of a run's steps before it begins. num_examples: rows of training, where they are known."""
    length = length_of_stream(config, lambda: 0.0) if is_stream else length_of(config, num_examples, processes)
    return [*without_effect(config, length), *shares_told(config, length)]


def shares_told(config: TrainConfig, length: Length) -> list[str]:
    """Which steps the shares of this run are."""
    found = intervals_of(config, length)
    steps = {"logging_steps": found.logging, "eval_steps": found.evaluation, "save_steps": found.saving}
    given = {key: getattr(config, key) for key in steps}
    return [
        f"{key} {given[key]:g} of {length.max_steps:,} steps: every {steps[key]:,}"
        for key in steps
        if given[key] is not None and given[key] < 1
    ]


def without_effect(config: TrainConfig, length: Length) -> list[str]:
    """Notices of what the config asks for and this run will not have."""
    told: list[str] = []
    if 1 < length.max_steps <= config.warmup_steps:
        told.append(
            f"warmup_steps {config.warmup_steps:g} is the whole run of {length.max_steps} steps: learning_rate "
            f"{config.peak_learning_rate:g} is not reached before its end; give fewer, or a share of the run (0.03)"
        )
    if config.eval_steps is not None and config.valid_path is None:
        told.append(f"eval_steps {config.eval_steps} has no effect: without valid_path nothing is validated")
    return told


def warmup_factor(step: int, progress: float, warmup_steps: float) -> float:
    """0 to 1 over the warm-up. Never 0: a run of one step must learn something. warmup_steps below 1: a share of the
    run."""
    if warmup_steps >= 1:
        return min(1.0, (step + 1) / warmup_steps)
    if warmup_steps > 0 and progress < warmup_steps:
        return max(progress / warmup_steps, 0.01)
    return 1.0


def learning_rate_factor(config: TrainConfig, length: Length, step: int, elapsed_s: float) -> float:
    """What the peak learning rate is multiplied by at this step (0-based) and this moment."""
    progress = length.progress(step, elapsed_s)
    warm = warmup_factor(step, progress, config.warmup_steps)
    if config.lr_scheduler_type == "constant":
        return warm
    behind = config.warmup_steps if config.warmup_steps < 1 else min(config.warmup_steps / length.max_steps, 0.99)
    left = 1.0 - min(1.0, max(0.0, (progress - behind) / (1.0 - behind)))
    return warm * (left if config.lr_scheduler_type == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))
