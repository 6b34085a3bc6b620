"""A run that is finished, and that somebody wants to go on with: a job scheduler starts a job again that ended well.

With the run's own config that is no error: nothing is left to do. With another one it is: the run that is there is not
the one that was asked for. Reads what the run wrote; knows nothing of models.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from loradock_adapters.errors import LoradockError
from loradock_train.config import TrainConfig
from loradock_train.errors import Problem, ResumeError
from loradock_train.rows import read_rows
from loradock_train.saves import changed_keys
from loradock_train.stream import open_stream

WITHOUT_EFFECT = ("similarity", "samples", "expected", "report_to")
"""Keys that may change on resume, and of which nothing comes where the run is over."""


@dataclass(frozen=True)
class Finished:
    """What is there."""

    directory: Path
    summary: dict[str, Any] = field(repr=False)
    notices: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """For whoever wanted to go on with it."""
        told = f"the run in {self.directory} is finished, at step {self.summary.get('steps')}: nothing is left to do"
        return told, f"its checkpoint: {self.directory / 'checkpoint'}", *(f"note: {each}" for each in self.notices)


def finished(config: TrainConfig, directory: Path, num_processes: int) -> Finished | None:
    """The finished run that is there; None where there is none. Raises ResumeError where it is another one's."""
    file = directory / "run.json"
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        text = (directory / "config.yaml").read_text(encoding="utf-8")
        then = TrainConfig.model_validate_json(json.dumps(yaml.safe_load(text)))
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        first = str(error).strip().split("\n", 1)[0]
        problem = Problem(type(error).__name__, first)
        told = f"{directory} holds a finished run that cannot be read (--overwrite replaces it):"
        raise ResumeError(told, [problem]) from error
    problems = _differences(config, then, summary, num_processes)
    if problems:
        raise ResumeError(
            f"{directory} holds a finished run that is not this one (its checkpoint: {directory / 'checkpoint'}; give "
            "another --output, or --overwrite to replace it):",
            problems,
        )
    odd = [key for key in WITHOUT_EFFECT if getattr(config, key) != getattr(then, key)]
    effect = f"{', '.join(odd)}: changed since, and without effect on a finished run"
    return Finished(directory, summary, (effect,) if odd else ())


def _differences(now: TrainConfig, then: TrainConfig, summary: dict[str, Any], num_processes: int) -> list[Problem]:
    problems = changed_keys(*(json.loads(each.model_dump_json()) for each in (then, now)))
    if now.adapter_path != then.adapter_path:
        problems.append(Problem("adapter_path", f"{then.adapter_path} when the run began, {now.adapter_path} now"))
    if summary.get("num_devices", num_processes) != num_processes:
        told = f"{summary['num_devices']} processes when the run began, {num_processes} now"
        problems.append(Problem("num_devices", told))
    for key, split in (("train_path", "train"), ("valid_path", "valid")):
        if getattr(now, key) != getattr(then, key) and not _is_same_data(now, split, summary):
            problems.append(Problem(key, "elsewhere than when the run began, and not the same data"))
    return problems


def _is_same_data(config: TrainConfig, split: str, summary: dict[str, Any]) -> bool:
    """Data that was moved is told by its content; where it lies where it lay, it is not read again."""
    paths = config.train_path if split == "train" else config.valid_path
    if paths is None:
        return False
    row_format = summary["data"]["train"]["format"]
    try:
        if split == "train" and config.streaming:
            _, rows = open_stream(paths, row_format, "train_path", config.shuffle_buffer, config.seed)
        else:
            rows = read_rows(paths, row_format, f"{split}_path")
    except LoradockError:
        return False
    return bool(rows.sha256 == summary["data_sha256"].get(split))
