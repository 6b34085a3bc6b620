"""Several adapters on one frozen base in memory: `sweep:` in a config.

    RUN/sweep.json          each adapter's score and loss, and which one is best
    RUN/NAME/               a whole run directory for each

The base is loaded once and the data encoded once; the adapters are trained one after the other, each with an optimiser,
an order of rows and random numbers of its own, so that each ends with the bits of its run alone. The memory is that of
one base, one adapter and its optimiser, however many there are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loradock_train.config import TrainConfig
from loradock_train.errors import OutputError
from loradock_train.finished import finished
from loradock_train.rundir import check_output
from loradock_train.shared import Shared

FILE = "sweep.json"
LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


def legs_of(config: TrainConfig) -> dict[str, TrainConfig]:
    """The config of each adapter, by its name."""
    legs: dict[str, TrainConfig] = {}
    for entry in config.sweep:
        given = entry.model_dump(exclude_none=True, exclude={"name"})
        assert config.lora_config is not None  # the config's validators saw to it
        lora = config.lora_config.model_copy(update={key: given.pop(key) for key in LORA_KEYS if key in given})
        legs[entry.name] = config.model_copy(update={"sweep": (), "output_dir": None, "lora_config": lora, **given})
    return legs


def run_sweep(
    config: TrainConfig,
    directory: Path,
    overwrite: bool,
    resume: bool,
    run: Callable[[TrainConfig, str, Path, bool, Shared], dict[str, Any]],
) -> dict[str, Any]:
    """Train every adapter that is not there yet. Returns what sweep.json holds.

    run: trains one, or finds it finished: config, name, directory, whether to resume, what is shared; returns its
    run.json.
    """
    legs = legs_of(config)
    _check_directory(directory, legs)
    done = {name for name in legs if resume and (directory / name / "run.json").is_file()}
    for name, leg in legs.items():
        if name in done:
            finished(leg, directory / name, num_processes=1)  # raises where it is another one's
        else:
            check_output(directory / name, overwrite, resume)
    shared, told = Shared(), []
    for name, leg in legs.items():
        told.append(_row(name, run(leg, name, directory / name, resume, shared)))
    summary = {"kind": "sweep", "legs": told, "best": best_of(told)}
    chosen = next((row for row in told if row["name"] == summary["best"]), told[0])
    summary |= {key: chosen[key] for key in ("final_train_loss", "final_eval_loss")}
    _write(directory, summary)
    return summary


def _check_directory(directory: Path, legs: dict[str, TrainConfig]) -> None:
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"the output {directory} is a file; give a directory with --output")
    others = {path.name for path in directory.iterdir()} - {FILE, *legs} if directory.is_dir() else set()
    if others:
        raise OutputError(f"{directory} holds other things than this sweep ({min(others)}); give another --output")


def _row(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    keys = ("steps", "train_seconds", "peak_memory_bytes", "final_train_loss", "final_eval_loss", "score")
    return {"name": name, **{key: summary.get(key) for key in keys}}


def best_of(rows: list[dict[str, Any]]) -> str | None:
    """The name of the best by score, else by validation loss; None where the runs had neither."""
    scored = [row for row in rows if row["score"] is not None]
    if scored:
        sign = 1 if scored[0]["score"]["best"] == "high" else -1
        return str(max(scored, key=lambda row: sign * float(row["score"]["value"]))["name"])
    measured = [row for row in rows if row["final_eval_loss"] is not None]
    return str(min(measured, key=lambda row: float(row["final_eval_loss"]))["name"]) if measured else None


def _write(directory: Path, summary: dict[str, Any]) -> None:
    temporary = directory / f".{FILE}.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / FILE)
