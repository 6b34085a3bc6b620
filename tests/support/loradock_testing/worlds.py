"""How a test has runs made in processes of their own, of one or several: train_legs.py and train_worlds.py do it."""

import json
import os
import subprocess
import sys
from typing import Any


def run_worlds(legs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each leg, how each of its processes ended."""
    endings: list[list[dict[str, Any]]] = _told_by("train_worlds", legs)
    return endings


def run_legs(legs: list[dict[str, Any]]) -> list[int]:
    """For each leg of one process, its exit code; see train_legs.py."""
    codes: list[int] = _told_by("train_legs", legs)
    return codes


def _told_by(program: str, legs: list[dict[str, Any]]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", f"loradock_testing.{program}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input=json.dumps(legs), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stderr)
    return json.loads(done.stdout)
