"""One process of a run of several: `python -m loradock_train.worker FOLDER`, as launch.py starts it.

Reads FOLDER/order.json, and writes FOLDER/end-<local rank>.json where it fails or stops early. Dies with whoever
started it.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from loradock_train.launch import WorkOrder

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, and do not begin where it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def main(folder: Path) -> int:
    values = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    die_with(values["launcher"])
    from loradock_train.ending import describe
    from loradock_train.errors import RunStopped
    from loradock_train.launch import WorkOrder

    order = WorkOrder(**values)
    try:
        _train(order)
    except Exception as error:  # noqa: BLE001 - whatever it is, whoever started us tells it
        local = int(os.environ["LOCAL_RANK"])
        ending = describe(local, time.time(), error, traceback.format_exc())
        path = folder / f"end-{local}.json"
        path.with_suffix(".tmp").write_text(json.dumps(asdict(ending)), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
        return 0 if isinstance(error, RunStopped) else 1
    return 0


def _train(order: "WorkOrder") -> None:
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters.console import err
    from loradock_train.config import TrainConfig
    from loradock_train.run import train_here

    config = TrainConfig.model_validate_json(json.dumps(order.config))
    train_here(config, order.notices, order.name, Path(order.directory), order.overwrite, order.resume, err)


def leave(code: int) -> NoReturn:
    """End the process as it stands: all is written, and whatever of torch's and its libraries' threads is left (of a
    run that failed, say) could abort it while Python is taken down."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
