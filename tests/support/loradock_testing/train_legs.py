"""Training runs in processes of their own, that can be killed: `python -m loradock_testing.train_legs < legs.json`.

Reads a JSON list of legs, and prints a JSON list of how each ended: 0, or minus the number of the signal. The heavy
imports are made once; every leg runs in a fork of its own, one after the other. A leg:

    {"config": {…}, "output": "…", "resume": false, "kill_at_batch": 17, "kill_at_save": 2}

`kill_at_batch`: SIGKILL at the beginning of that micro-batch (1-based, counted from the start of this leg), in the
middle of a step where gradients are accumulated. `kill_at_save`: SIGKILL in the middle of writing that save (1-based).
"""

import json
import os
import signal
import sys
import traceback
from typing import Any

import torch
from rich.console import Console

from loradock_train.run import train
from loradock_train.trainer import LoradockTrainer


def run_leg(leg: dict[str, Any]) -> int:
    """Run one leg in a fork. Returns its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            _train(leg)
            code = 0
        except Exception:  # noqa: BLE001 - a fork must not return into its parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _train(leg: dict[str, Any]) -> None:
    if "kill_at_batch" in leg:
        _kill_at("training_step", leg["kill_at_batch"])
    if "kill_at_save" in leg:
        _kill_at("_save_scaler", leg["kill_at_save"])  # after the optimiser's file, before the last one
    train(leg["config"], output=leg["output"], resume=leg["resume"], console=Console(quiet=True))


def _kill_at(method: str, call: int) -> None:
    original, calls = getattr(LoradockTrainer, method), 0

    def counted(self: LoradockTrainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    setattr(LoradockTrainer, method, counted)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has none of its parent's other threads
    json.dump([run_leg(leg) for leg in json.load(sys.stdin)], sys.stdout)
