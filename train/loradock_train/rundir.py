"""The run directory: what may be written where, and what is removed before a run begins or goes on.

A run is never replaced by accident, and a folder of other things is never written into.
"""

import json
import shutil
from pathlib import Path

from loradock_adapters.errors import UsageError
from loradock_train.errors import OutputError
from loradock_train.samples import FILE as SAMPLES
from loradock_train.samples import keep_samples
from loradock_train.saves import FOLDER, Save, newest_save, remove_leftovers
from loradock_train.scoring import FILES

KEPT_ON_RESUME = ("trackers.json", "wandb")
"""What a tracker needs to go on with the same run."""
OUR_FILES = (
    *("config.yaml", "metrics.jsonl", "loss.png", "run.json", "push.json", "tensorboard", SAMPLES),
    *(*KEPT_ON_RESUME, *FILES, "similarity", "checkpoint", FOLDER),
)


def check_output(directory: Path, overwrite: bool, resume: bool) -> Save | None:
    """Refuse a directory that this run must not touch. Returns the save to go on from, None to begin at step 0.

    Whoever resumes has asked finished.py first. Raises OutputError, UsageError, and ResumeError for a damaged save.
    """
    if overwrite and resume:
        raise UsageError("--resume goes on with the run that is there, --overwrite replaces it: give one of the two")
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"the output {directory} is a file; give a directory with --output")
    inside = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if inside - set(OUR_FILES) and not inside & set(OUR_FILES):
        raise OutputError(f"{directory} is not empty and holds no run; give another --output")
    if overwrite:
        return None
    if "run.json" in inside:
        raise OutputError(f"{directory} already holds a run; give another --output, or --overwrite to replace it")
    if resume:
        return newest_save(directory)
    saved = sorted(path.name for path in (directory / FOLDER).glob("step-*"))
    if saved:
        raise OutputError(
            f"{directory} holds an unfinished run, saved at step {int(saved[-1].removeprefix('step-'))}; "
            "go on with --resume, give another --output, or --overwrite to start anew"
        )
    if "checkpoint" in inside:
        raise OutputError(f"{directory} already holds a run; give another --output, or --overwrite to replace it")
    return None


def prepare_output(directory: Path, save: Save | None) -> None:
    """Called when everything was checked. Removes only what a run writes: an earlier run, or what a broken one left
    beside its saves."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in OUR_FILES:
        path = directory / name
        if save is not None and name == FOLDER:
            remove_leftovers(directory)
        elif save is not None and name in KEPT_ON_RESUME:
            continue
        elif save is not None and name == SAMPLES:
            keep_samples(path, save.position.step)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in directory.glob(".checkpoint.*.tmp"):
        shutil.rmtree(path)
    if save is not None:
        lines = "".join(json.dumps(entry) + "\n" for entry in save.position.history)
        (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
