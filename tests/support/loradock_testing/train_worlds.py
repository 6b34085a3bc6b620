"""Training runs of several processes, cheaply: `python -m loradock_testing.train_worlds < legs.json`.

Reads a JSON list of legs, and prints a JSON list: for each leg, for each process, how it ended (0, 1, or minus the
number of the signal) and what it raised. The heavy imports are made once; every process is a fork of its own, which is
told what launch.py tells its processes. Legs come one after the other. A leg:

    {"config": {…}, "output": "…", "processes": 2, "resume": false, "die": {"1": 17}, "stop": {"1": 5}}

`die`: SIGKILL of a process at the beginning of that micro-batch (1-based, counted from the start of this leg); the
others are killed then, as launch.py would. `stop`: SIGTERM, in the same way.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loradock_testing.train_spies import spy
from loradock_train.launch import Machines, environments
from loradock_train.run import train
from loradock_train.trainer import LoradockTrainer


def run_leg(leg: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one leg. Returns how each process ended, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        world = environments(leg["processes"], Machines(), Path(folder) / "rendezvous")
        if leg["processes"] == 1:
            world = [{}]
        errors = [Path(folder) / f"error-{index}" for index in range(len(world))]
        processes = [_fork(leg, index, environment, errors[index]) for index, environment in enumerate(world)]
        codes = dict.fromkeys(processes, 0)
        left = set(processes)
        while left:
            process, status = os.waitpid(-1, 0)
            left.discard(process)
            codes[process] = os.waitstatus_to_exitcode(status)
            if codes[process] < 0:
                for other in left:
                    os.kill(other, signal.SIGKILL)
        told = [error.read_text() if error.exists() else "" for error in errors]
    return [{"code": codes[process], "error": error} for process, error in zip(processes, told, strict=True)]


def _fork(leg: dict[str, Any], index: int, environment: dict[str, str], error_file: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(environment)
        _train(leg, str(index))
        code = 0
    except Exception as error:  # noqa: BLE001 - a fork must not return into its parent's code
        error_file.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _train(leg: dict[str, Any], index: str) -> None:
    if index in leg.get("die", {}):
        _signal_at(leg["die"][index], signal.SIGKILL)
    if index in leg.get("stop", {}):
        _signal_at(leg["stop"][index], signal.SIGTERM)
    if leg.get("spy"):
        spy(Path(f"{leg['output']}-spy-{index}.json"))
    train(leg["config"], output=leg["output"], resume=leg.get("resume", False), console=Console(quiet=True))


def _signal_at(batch: int, number: int) -> None:
    original, calls = LoradockTrainer.training_step, 0

    def counted(self: LoradockTrainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == batch:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    LoradockTrainer.training_step = counted  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has none of its parent's other threads
    json.dump([run_leg(leg) for leg in json.load(sys.stdin)], sys.stdout)
