"""How a test has runs of several processes made: see train_worlds.py, which is a program of its own."""

import json
import os
import subprocess
import sys
from typing import Any


def run_worlds(legs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each leg, how each of its processes ended."""
    done = subprocess.run(
        [sys.executable, "-m", "loradock_testing.train_worlds"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input=json.dumps(legs), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stderr)
    endings: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return endings
