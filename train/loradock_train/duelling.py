"""LoRA against full-parameter training, from one config: same data, seed and steps, one after the other.

    print(duel("lora.yaml").markdown())

Each leg is a `loradock train` in a process of its own, so that its peak memory is its own. The second one drops
`lora_config` and takes a tenth of the learning rate. A leg that is finished is kept: the same call again goes on with
what is missing.

Sources of the tenth: LoRA's best rate was found to be 9.8 times that of full fine-tuning by Schulman et al., "LoRA
Without Regret" (2025), over fourteen models, and is taken as 10 times in the Tinker cookbook; the template that this
project grew from says 1e-4 and 1e-5.
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loradock_adapters.errors import UsageError
from loradock_train.comparison import Comparison, compare
from loradock_train.config import TrainConfig
from loradock_train.config_file import load_config
from loradock_train.errors import OutputError, TrainError

LORA_OVER_FULL = 10.0
"""LoRA's learning rate over that of full-parameter training."""
ONLY_WITH_LORA = ("lora_config", "adapter_path", "quantisation")
"""Keys that a full-parameter run has no use for."""


@dataclass(frozen=True)
class Leg:
    """One of the two runs."""

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig


class DuelStopped(TrainError):  # noqa: N818 - it is no error: the leg was asked to stop, and saved
    """SIGTERM or Ctrl-C: the leg that ran saved where it stood. The same call again goes on with it."""

    code = "duel_stopped"
    exit_code = 0

    def __init__(self, leg: str) -> None:
        super().__init__(f"stopped in the leg {leg}, which saved where it stood; the same command again goes on")


def duel(
    config: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    full_learning_rate: float | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _line: None,
) -> Comparison:
    """Train both legs below `output` (default runs/<name of the YAML>-duel) and compare them, LoRA first.

    overrides: `key=value` texts for both. full_learning_rate: instead of a tenth of LoRA's. overwrite: train anew what
    is there. tell: is given each notice. Raises UsageError and its kin for a config that cannot duel, OutputError where
    a leg was made from another config, TrainError where one fails, DuelStopped where one was asked to stop.
    """
    path = Path(config)
    directory = Path(output) if output is not None else Path("runs") / f"{path.stem}-duel"
    legs, notices = plan_duel(path, overrides, full_learning_rate)
    for notice in notices:
        tell(notice)
    for leg in legs:
        run = directory / leg.name
        if not overwrite and is_finished(run, leg):
            tell(f"{leg.name}: already trained in {run}")
            continue
        _train(path, leg, run, overwrite, tell)
    return compare([directory / leg.name for leg in legs])


def plan_duel(
    path: Path, overrides: Sequence[str] = (), full_learning_rate: float | None = None
) -> tuple[tuple[Leg, Leg], list[str]]:
    """Both legs, and what is worth telling. Trains nothing."""
    lora, _ = load_config(path, overrides)
    if lora.lora_config is None:
        raise UsageError(f"{path} has no lora_config: a duel needs the LoRA leg's, the other leg drops it")
    rate = full_learning_rate if full_learning_rate is not None else lora.peak_learning_rate / LORA_OVER_FULL
    dropped = [key for key in ONLY_WITH_LORA if getattr(lora, key, None) is not None]
    mine = (*overrides, *(f"{key}=null" for key in dropped), f"learning_rate={rate:g}")
    full, _ = load_config(path, mine)
    why = (
        "as --full-learning-rate says"
        if full_learning_rate is not None
        else f"a tenth of LoRA's {lora.peak_learning_rate:g}, by rule of thumb (--full-learning-rate sets another)"
    )
    notices = [f"full: the same config without {', '.join(dropped)}; learning rate {rate:g}, {why}"]
    if lora.max_time_s is not None:
        limit = f"max_time_s {lora.max_time_s:g}"
        notices.append(f"{limit} may end the legs after different numbers of steps; compare says so if it does")
    return (Leg("lora", tuple(overrides), lora), Leg("full", mine, full)), notices


def is_finished(run: Path, leg: Leg) -> bool:
    """Whether the leg's run is there, whole. Raises OutputError where it was made from another config."""
    if not (run / "run.json").is_file():
        return False
    from loradock_train.saves import FREE_KEYS  # torch, which a duel has no other use for

    made_from = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    wanted = json.loads(leg.config.model_dump_json())
    changed = sorted(key for key in {*made_from, *wanted} - FREE_KEYS if made_from.get(key) != wanted.get(key))
    if changed:
        raise OutputError(
            f"{run} was made from another config ({', '.join(changed)} changed); give another --output, or --overwrite"
        )
    return True


def _train(path: Path, leg: Leg, run: Path, overwrite: bool, tell: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "loradock_adapters.cli", "train", str(path), "--output", str(run)]
    for override in leg.overrides:
        command += ["--set", override]
    command.append("--overwrite" if overwrite else "--resume")
    tell(f"{leg.name}: training in {run}")
    status = _wait_for(command)
    if (run / "run.json").is_file() and status == 0:
        return
    if status == 0:
        raise DuelStopped(leg.name)
    raise TrainError(f"the leg {leg.name} failed with exit code {status}; what it said stands above")


def _wait_for(command: Sequence[str]) -> int:
    """Its exit code. Asked to stop it saves, and ends with 0: Ctrl-C reaches it by itself, SIGTERM is passed on."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    before = _on_sigterm(lambda _number, _frame: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # it was told as well: it saves, and ends by itself
    finally:
        _on_sigterm(before)


def _on_sigterm(handler: Any) -> Any:
    """The handler before; None, with nothing changed, in a thread, where Python allows no handlers."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)
