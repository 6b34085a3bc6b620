"""Every error that training raises on purpose.

LoradockError
├── UsageError                exit code 2
│   ├── ConfigError           the YAML (or --set) is wrong; `problems` holds all of them at once
│   ├── DataError             a row of the data is wrong; `problems` names file and line
│   ├── ModelError            the model or tokenizer that was named cannot be used
│   ├── ResumeError           a save cannot be gone on from: what it was made from has changed, or it is damaged
│   └── OutputError           the output directory already holds a run
├── RunStopped                exit code 0: asked to stop, the run saved where it stood
└── TrainError                exit code 1
    ├── ExtractError          a full fine-tune whose change is not, or not well enough, a LoRA
    ├── LossError             the loss became NaN or infinite
    ├── MemoryFullError       memory did not suffice; the message says what to change
    └── ProofError            the exported checkpoint does not do what the trained model did
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loradock_adapters.errors import LoradockError, UsageError

MAX_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a key, or file and line) and what."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class _ProblemsError(UsageError):
    """Several problems told at once, so that nobody has to mend them one run at a time."""

    def __init__(self, headline: str, problems: Sequence[Problem]) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        shown = [f"  {problem}" for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            shown.append(f"  … and {len(self.problems) - MAX_SHOWN} more")
        super().__init__("\n".join([headline, *shown]))


class ConfigError(_ProblemsError):
    """The configuration is wrong."""

    code = "invalid_config"


class DataError(_ProblemsError):
    """The training or validation data is wrong."""

    code = "invalid_training_file"


class ModelError(UsageError):
    """The model or tokenizer cannot be used as configured."""

    code = "invalid_model"


class OutputError(UsageError):
    """The output directory cannot be used."""

    code = "output_exists"


class ResumeError(_ProblemsError):
    """The save is not one that this run can go on from."""

    code = "cannot_resume"


class RunStopped(LoradockError):  # noqa: N818 - it is no error: the run was asked to stop, and did
    """SIGTERM or Ctrl-C: the run saved where it stood and ended. `save` is the directory of the save."""

    code = "run_stopped"
    exit_code = 0

    def __init__(self, step: int, save: Path) -> None:
        self.step, self.save = step, save
        super().__init__(f"stopped at step {step}, saved in {save}; resume with resume=True (--resume)")


class TrainError(LoradockError):
    """Training itself failed."""

    code = "training_failed"


class LossError(TrainError):
    """The loss is no longer a number."""

    code = "loss_not_finite"


class MemoryFullError(TrainError):
    """Memory did not suffice."""

    code = "out_of_memory"


class ExtractError(TrainError):
    """What a full fine-tune changed cannot be kept in an adapter of the rank that was asked for."""

    code = "not_extractable"

    def __init__(self, headline: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([headline, *(f"  {problem}" for problem in self.problems)]))


class ProofError(TrainError):
    """The checkpoint on disk does not behave like the model that was trained."""

    code = "checkpoint_proof_failed"
