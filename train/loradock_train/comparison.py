"""Finished runs side by side: one row a run, as Markdown, JSON or a picture (comparison_plot.py).

    print(compare(["runs/lora", "runs/full"]).markdown())

Reads what runs wrote (run.json, config.yaml, push.json) and nothing else. A figure that a run did not measure is
`–`, and a column that no run can fill is left out. Imports nothing heavy.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loradock_adapters.errors import UsageError
from loradock_train.cost import clock

UNKNOWN = "–"


@dataclass(frozen=True)
class RunFacts:
    """What a finished run says of itself. None: it did not measure that."""

    name: str
    directory: Path
    kind: str
    approach: str
    """LoRA, full-parameter, …: for people."""
    base: str | None
    device: str
    num_devices: int
    epochs: float
    steps: int
    batch_size: int
    """Rows in a step, over all devices and accumulated batches."""
    learning_rate: float | None
    train_seconds: float
    peak_memory_bytes: int | None
    checkpoint_bytes: int
    trainable: int
    share: float
    """Trained parameters of all, 0 to 1."""
    score: float | None
    score_metric: str | None
    score_best: str | None
    """`low` or `high`."""
    eval_loss: float | None
    perplexity: float | None
    first_token_s: float | None
    """Seconds from the start of the push to the first token of the pushed model."""
    energy_wh: float | None
    price: float | None
    data_sha256: Mapping[str, str]
    seed: int | None
    context_length: int | None

    def as_json(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[RunFacts], str | None]
    is_number: bool = True


@dataclass(frozen=True)
class Comparison:
    """The runs, and in words what makes them hard to compare."""

    runs: tuple[RunFacts, ...]
    remarks: tuple[str, ...] = ()

    def markdown(self) -> str:
        """A table, the ratios of two runs, and the remarks below it."""
        columns = [column for column in columns_for(self.runs) if any(column.cell(run) for run in self.runs)]
        rows = [[_escaped(column.cell(run) or UNKNOWN) for column in columns] for run in self.runs]
        head = [column.title for column in columns]
        widths = [max(len(line[number]) for line in [head, *rows]) for number in range(len(columns))]
        rule = [
            "-" * (width - 1) + ":" if column.is_number else "-" * width
            for column, width in zip(columns, widths, strict=True)
        ]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.rjust(width) if column.is_number else cell.ljust(width)
                for cell, width, column in zip(cells, widths, columns, strict=True)
            ]
            return f"| {' | '.join(padded)} |"

        lines = [line(head), line(rule), *(line(row) for row in rows)]
        below = [*ratios(self.runs), *(f"Note: {remark}" for remark in self.remarks)]
        return "\n".join([*lines, *([""] if below else []), *below]) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {"runs": [run.as_json() for run in self.runs], "remarks": list(self.remarks)}

    def plot(self, path: str | Path) -> None:
        """A picture with a panel for each figure. matplotlib is imported now."""
        from loradock_train.comparison_plot import plot_comparison

        plot_comparison(self.runs, Path(path))


def compare(runs: Sequence[str | Path], *, force: bool = False) -> Comparison:
    """Read finished runs. `force` also compares what cannot fairly be compared, with a remark on each difference.

    Raises UsageError for a directory that holds no finished run, and for runs of different data.
    """
    if len(runs) < 2:
        raise UsageError("compare needs two runs or more: loradock compare RUN_A RUN_B")
    facts = [read_run(Path(run)) for run in runs]
    named = _named_apart(facts)
    grave = data_differences(named)
    if grave and not force:
        told = "\n".join(f"  {line}" for line in grave)
        raise UsageError(
            f"these runs saw different data, so that their figures do not compare:\n{told}\n"
            "compare runs of one train_path and valid_path, or say --force: what differs is then told below the table"
        )
    return Comparison(tuple(named), (*grave, *other_differences(named)))


# ---- reading --------------------------------------------------------------------------------------------------------


def read_run(directory: Path) -> RunFacts:
    """Raises UsageError where there is no finished run."""
    summary = _read_json(directory / "run.json")
    if summary is None:
        raise UsageError(_why_unfinished(directory))
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        return _facts(directory, summary, config, _read_json(directory / "push.json") or {})
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"{directory} is not a run that this version can read: {error!r}") from error


def _why_unfinished(directory: Path) -> str:
    if not directory.is_dir():
        return f"no such run: {directory}"
    saves = sorted(path.name for path in (directory / "saves").glob("step-*"))
    if saves:
        step = int(saves[-1].removeprefix("step-"))
        return (
            f"{directory} is not finished (saved at step {step}): go on with `loradock train CONFIG --output "
            f"{directory} --resume`, then compare"
        )
    if (directory / "config.yaml").is_file():
        return f"{directory} is not finished: it has no run.json; train it to its end first"
    return f"{directory} holds no run of `loradock train`: there is no run.json"


def _facts(directory: Path, summary: Mapping[str, Any], config: Mapping[str, Any], push: Mapping[str, Any]) -> RunFacts:
    score, cost = summary.get("score") or {}, summary.get("cost") or {}
    num_devices = int(summary.get("num_devices") or 1)
    rows = int(config["train_batch_size_per_device"]) * int(config["gradient_accumulation_steps"])
    eval_loss = summary["final_eval_loss"]
    return RunFacts(
        name=directory.resolve().name,
        directory=directory,
        kind=summary["kind"],
        approach=approach_of(summary["kind"], config),
        base=summary["base"],
        device=summary["device"],
        num_devices=num_devices,
        epochs=summary["epochs"],
        steps=summary["steps"],
        batch_size=rows * num_devices,
        learning_rate=summary.get("learning_rate", config.get("learning_rate")),
        train_seconds=summary["train_seconds"],
        peak_memory_bytes=summary["peak_memory_bytes"],
        checkpoint_bytes=summary["checkpoint_bytes"],
        trainable=summary["parameters"]["trainable"],
        share=summary["parameters"]["share"],
        score=score.get("value"),
        score_metric=score.get("metric"),
        score_best=score.get("best"),
        eval_loss=eval_loss,
        perplexity=perplexity(eval_loss),
        first_token_s=push.get("first_token_s"),
        energy_wh=cost.get("energy_wh"),
        price=cost.get("price"),
        data_sha256=summary.get("data_sha256") or _from_passport(directory),
        seed=config.get("seed"),
        context_length=config.get("context_length"),
    )


def perplexity(loss: float | None) -> float | None:
    """exp of the loss, bounded where it would be no float any more."""
    import math

    return None if loss is None else math.exp(min(loss, 700.0))


def approach_of(kind: str, config: Mapping[str, Any]) -> str:
    """What the seeds call it: LoRA, QLoRA, full-parameter, …"""
    if kind == "scratch":
        return "from scratch"
    lora = config.get("lora_config")
    if lora is None:
        return "full, selected modules" if config.get("trainable") else "full-parameter"
    name = "DoRA" if lora.get("use_dora") else "rsLoRA" if lora.get("use_rslora") else "LoRA"
    return f"{'Q' if config.get('quantisation') else ''}{name} r={lora['r']}"


def _from_passport(directory: Path) -> dict[str, str]:
    """Of a run that was made before run.json told it: the training data alone."""
    known = (_read_json(directory / "checkpoint" / "loradock.json") or {}).get("data_sha256")
    return {"train": known} if isinstance(known, str) else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


# ---- what differs ---------------------------------------------------------------------------------------------------


def _named_apart(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """runs/a/lora and runs/b/lora are not both `lora`."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    return [RunFacts(**(vars(run) | {"name": str(run.directory)})) for run in runs]


def data_differences(runs: Sequence[RunFacts]) -> list[str]:
    """One line a split that is not the same everywhere. A run that does not tell counts as different."""
    found = []
    for split in sorted({split for run in runs for split in run.data_sha256}):
        seen = {run.name: run.data_sha256.get(split) for run in runs}
        if len(set(seen.values())) > 1:
            each = ", ".join(f"{name} {'none' if digest is None else digest[:12]}" for name, digest in seen.items())
            found.append(f"different {split} data (sha256): {each}")
    return found


def other_differences(runs: Sequence[RunFacts]) -> list[str]:
    """What is worth knowing, and no reason to refuse."""
    found = []
    for what, value in (
        ("base", lambda run: run.base),
        ("seed", lambda run: run.seed),
        ("context_length", lambda run: run.context_length),
        ("number of steps", lambda run: run.steps),
        ("device", lambda run: f"{run.device} x{run.num_devices}"),
    ):
        seen = {run.name: value(run) for run in runs}
        if len(set(seen.values())) > 1:
            found.append(f"different {what}: {', '.join(f'{name} {value}' for name, value in seen.items())}")
    if len({run.score_metric for run in runs if run.score is not None}) > 1:
        found.append("different scores: they do not compare with each other")
    return found


# ---- the table ------------------------------------------------------------------------------------------------------


def columns_for(runs: Sequence[RunFacts]) -> list[Column]:
    """In the seeds' order."""
    return [
        Column("run", lambda run: run.name, is_number=False),
        Column("approach", lambda run: run.approach, is_number=False),
        Column("devices", lambda run: f"{run.device} x{run.num_devices}", is_number=False),
        Column("epochs", lambda run: f"{run.epochs:.4g}"),
        Column("batch size", lambda run: str(run.batch_size)),
        Column("learning rate", lambda run: None if run.learning_rate is None else f"{run.learning_rate:g}"),
        Column("training time", lambda run: clock(run.train_seconds)),
        Column("peak memory", lambda run: _size(run.peak_memory_bytes)),
        Column("checkpoint", lambda run: _size(run.checkpoint_bytes)),
        Column("trained parameters", lambda run: f"{run.trainable:,} ({run.share:.4%})"),
        Column(_score_title(runs), lambda run: _score_cell(run, runs)),
        Column("eval loss", lambda run: None if run.eval_loss is None else f"{run.eval_loss:.4f}"),
        Column("perplexity", lambda run: None if run.perplexity is None else f"{run.perplexity:.4g}"),
        Column("push to first token", lambda run: None if run.first_token_s is None else f"{run.first_token_s:.2f} s"),
        Column("energy", lambda run: None if run.energy_wh is None else f"{run.energy_wh:.3g} Wh"),
        Column("cost", lambda run: None if run.price is None else f"{run.price:.4g}"),
    ]


def _score_title(runs: Sequence[RunFacts]) -> str:
    metrics = {(run.score_metric, run.score_best) for run in runs if run.score is not None}
    if len(metrics) != 1:
        return "score"
    metric, best = metrics.pop()
    return f"{metric} (best is {best})"


def _score_cell(run: RunFacts, runs: Sequence[RunFacts]) -> str | None:
    if run.score is None:
        return None
    metrics = {other.score_metric for other in runs if other.score is not None}
    return f"{run.score:.3f}" if len(metrics) == 1 else f"{run.score_metric} {run.score:.3f}"


def ratios(runs: Sequence[RunFacts]) -> list[str]:
    """Of two runs: how many times the first has what the second has, in one sentence."""
    if len(runs) != 2:
        return []
    one, other = runs
    parts = []
    for what, mine, theirs in (
        ("checkpoint", one.checkpoint_bytes, other.checkpoint_bytes),
        ("training time", one.train_seconds, other.train_seconds),
        ("peak memory", one.peak_memory_bytes, other.peak_memory_bytes),
        ("trained parameters", one.trainable, other.trainable),
    ):
        if mine and theirs:
            parts.append(f"{what} {times(theirs / mine)}")
    return [f"{other.name} against {one.name}: {', '.join(parts)}."] if parts else []


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"


def _size(size_bytes: int | None) -> str | None:
    if size_bytes is None:
        return None
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.2f} MB"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
