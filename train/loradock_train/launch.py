"""Starts the processes of a run on this machine, waits for them, and leaves none behind.

Each is `python -m loradock_train.worker`, in a session of its own, so that Ctrl-C reaches it once, by way of this
process. Signals are passed on; the first process that fails ends the others, and its error is raised here. Process 0
writes to our stderr, the others to files that are read only when one of them fails. Knows nothing of torch.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from loradock_adapters.errors import UsageError
from loradock_train.config import TrainConfig
from loradock_train.ending import Ending, chosen, raised
from loradock_train.files import is_url
from loradock_train.processes import RENDEZVOUS, world_size
from loradock_train.remote import check_local
from loradock_train.signed import environment as signed_environment

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 2.0
"""After one process has failed, how long the others may take to say that they failed for the same reason."""
LOG_TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Machines:
    """Which of several machines this is. Each of them is told the same but for `rank`."""

    nodes: int = 1
    rank: int = 0
    master_address: str | None = None
    """HOST:PORT of machine 0, where all processes meet. A free port, the same on every machine."""

    def check(self) -> None:
        """Raises UsageError."""
        if self.nodes < 1 or not 0 <= self.rank < self.nodes:
            raise UsageError(f"--node-rank {self.rank}: with --nodes {self.nodes} it must be 0 to {self.nodes - 1}")
        host, _, port = (self.master_address or "").rpartition(":")
        if self.nodes > 1 and not (host and port.isdigit()):
            raise UsageError(
                f"--nodes {self.nodes} needs --master-address HOST:PORT of machine 0, got {self.master_address!r}"
            )


@dataclass(frozen=True)
class WorkOrder:
    """What every process of a run is told."""

    config: dict[str, Any]
    notices: list[str]
    name: str
    directory: str
    overwrite: bool
    resume: bool
    launcher: int
    """Our process id: whose end is theirs."""


def make_order(
    config: TrainConfig, notices: list[str], name: str, directory: Path, overwrite: bool, resume: bool
) -> WorkOrder:
    values = json.loads(config.model_dump_json())
    return WorkOrder(values, notices, name, str(directory), overwrite, resume, os.getpid())


def run_directory(config: TrainConfig, output: str | Path | None, name: str) -> Path:
    """Where the run is written."""
    if output is not None:
        check_local(output)
        return Path(output)
    is_local = config.output_dir is not None and not is_url(config.output_dir)
    return Path(str(config.output_dir)) if is_local else Path("runs") / name


def read_summary(directory: Path) -> dict[str, Any]:
    """run.json of a finished run; nothing where another machine wrote it."""
    file = directory / "run.json"
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return summary


def must_launch(num_devices: int, machines: Machines | None) -> bool:
    """Whether this process is to start others, and is not one of several itself."""
    return world_size() == 1 and (num_devices > 1 or (machines is not None and machines.nodes > 1))


def process_notices(num_devices: int) -> list[str]:
    """Where somebody else has started the processes, and another number of them than the config says."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if world_size() == 1 or num_devices in (1, here):
        return []
    return [f"num_devices: {num_devices} is not used: {here} processes were started on this machine"]


def launch(order: WorkOrder, num_processes: int, machines: Machines) -> None:
    """Run it in that many processes of this machine. Raises what the first process that failed raised, RunStopped
    where they were asked to stop."""
    machines.check()
    with tempfile.TemporaryDirectory(prefix="loradock-run-") as name:
        folder = Path(name)
        (folder / "order.json").write_text(json.dumps(asdict(order)), encoding="utf-8")
        processes: list[subprocess.Popen[bytes]] = []
        killed: set[int] = set()
        try:
            for environment in environments(num_processes, machines, folder / "rendezvous"):
                processes.append(start_process(folder, environment))
            with _passed_on(processes):
                failed = _wait(processes)
        finally:
            killed = _end(processes)
        endings = [ending_of(folder, local, process) for local, process in enumerate(processes)]
    # Whom we killed, because another had failed, died of nothing of its own: its signal is no reason.
    endings = [ending for ending in endings if ending.error is not None or ending.rank not in killed]
    if failed or any(ending.error is not None for ending in endings):
        raise raised(chosen(endings), num_processes * machines.nodes, num_processes * machines.rank)


def environments(num_processes: int, machines: Machines, rendezvous: Path) -> list[dict[str, str]]:
    """What each process of this machine is told about itself, in torchrun's words."""
    common = {
        "WORLD_SIZE": str(num_processes * machines.nodes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": str(machines.rank),
    }
    if machines.nodes > 1:
        host, _, port = (machines.master_address or "").rpartition(":")
        common |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    elif num_processes > 1:
        # A file instead of a port: nobody else can take it.
        common |= {RENDEZVOUS: f"file://{rendezvous}", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    return [
        common | {"RANK": str(machines.rank * num_processes + local), "LOCAL_RANK": str(local)}
        for local in range(num_processes)
    ]


def start_process(folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One process of the run that FOLDER/order.json describes."""
    local = environment["LOCAL_RANK"]
    command = [sys.executable, "-m", "loradock_train.worker", str(folder)]
    path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with (folder / f"log-{local}.txt").open("wb") as log:
        speaks = environment["RANK"] == "0"
        return subprocess.Popen(
            command,
            env={**os.environ, **path, **environment, **signed_environment()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if speaks else log,
            start_new_session=True,
        )


@contextmanager
def _passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Every process gets the signals that we get while the block runs. Only the main thread hears of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Until all have ended well, or some time after one has not. Returns whether one has not."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for process in processes:
        threading.Thread(target=lambda each: ended.put(each.wait()), args=(process,), daemon=True).start()
    left, until_s = len(processes), None
    while left and (until_s is None or time.monotonic() < until_s):
        try:
            code = ended.get(timeout=None if until_s is None else max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            break
        left -= 1
        if code != 0 and until_s is None:
            until_s = time.monotonic() + GRACE_S
    return until_s is not None


def _end(processes: list[subprocess.Popen[bytes]]) -> set[int]:
    """Nothing that waits for a dead process ever ends by itself. Returns which of them had to be killed."""
    alive = {local for local, process in enumerate(processes) if process.poll() is None}
    for local in alive:
        processes[local].kill()
    for process in processes:
        process.wait()
    return alive


def ending_of(folder: Path, local: int, process: subprocess.Popen[bytes]) -> Ending:
    """What the process told of its end, or how it died without a word."""
    told = folder / f"end-{local}.json"
    if told.is_file():
        return Ending(**json.loads(told.read_text(encoding="utf-8")))
    log = (folder / f"log-{local}.txt").read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
    return Ending(rank=local, at_s=time.time(), error=None, code=process.returncode, log=log.strip())
