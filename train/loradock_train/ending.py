"""How a process of a run ended, as it tells whoever started it: over a file, since it may be another machine's kin.

And which of several endings is the reason: the death of one process makes the others fail, with messages about
connections that help nobody.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loradock_adapters import errors as common_errors
from loradock_adapters.errors import LoradockError
from loradock_train import errors as train_errors
from loradock_train.errors import Problem, RunStopped, TrainError


@dataclass(frozen=True)
class Ending:
    """One process, when it was over."""

    rank: int
    """On its machine."""
    at_s: float
    """By the machine's clock."""
    error: str | None
    """Name of the error's class; None where there was none, or nothing was told."""
    message: str = ""
    problems: Sequence[tuple[str, str]] = ()
    step: int = 0
    """Where it stopped, for RunStopped."""
    save: str = ""
    code: int = 0
    """Exit code, negative for a signal."""
    log: str = ""
    """The end of what it wrote, where it died without a word."""
    is_ours: bool = False
    """Whether the error is one that Loradock can explain."""


def describe(rank: int, at_s: float, error: Exception, trace: str) -> Ending:
    """The ending of a process that raised this."""
    if not isinstance(error, LoradockError):
        return Ending(rank, at_s, type(error).__name__, trace, code=1)
    problems = [(problem.where, problem.message) for problem in getattr(error, "problems", ())]
    step, save = (error.step, str(error.save)) if isinstance(error, RunStopped) else (0, "")
    return Ending(
        rank, at_s, type(error).__name__, str(error), problems, step, save, error.exit_code, is_ours=True
    )  # fmt: skip


def chosen(endings: Sequence[Ending]) -> Ending:
    """The reason why a run of several processes ended: what Loradock can explain before what it cannot, a death
    without a word before a complaint about it, the first before the later."""

    def weight(ending: Ending) -> tuple[int, float, int]:
        died = ending.error is None and ending.code not in (0, -signal.SIGKILL)
        order = 0 if ending.is_ours else 1 if died else 2 if ending.error is None and ending.code else 3
        return order, ending.at_s if order == 3 else 0.0, ending.rank

    return min((ending for ending in endings if ending.error is not None or ending.code != 0), key=weight)


def raised(ending: Ending, num_processes: int, first_rank: int) -> LoradockError:
    """The error that whoever started the processes raises."""
    if ending.error == RunStopped.__name__:
        return RunStopped(ending.step, Path(ending.save))
    who = f"process {first_rank + ending.rank} of {num_processes}"
    kind: Any = getattr(train_errors, ending.error or "", None) or getattr(common_errors, ending.error or "", None)
    if ending.is_ours and kind is not None:
        again: LoradockError = kind.__new__(kind)
        again.args = (ending.message if ending.rank == 0 else f"{who}: {ending.message}",)
        if ending.problems:
            again.__dict__["problems"] = tuple(Problem(where, message) for where, message in ending.problems)
        return again
    if ending.error is not None:
        return TrainError(f"{who} failed:\n{ending.message}")
    told = f"was killed by {signal.Signals(-ending.code).name}" if ending.code < 0 else f"exited with {ending.code}"
    hint = "; the machine may have run out of memory" if ending.code == -signal.SIGKILL else ""
    return TrainError(f"{who} {told}{hint}" + (f"\n{ending.log}" if ending.log else ""))
