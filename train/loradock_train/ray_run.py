"""Trains on a Ray cluster that is there already: Ray Train finds the machines, starts the workers and watches them.

Every worker runs one process of the run, `python -m loradock_train.worker`, exactly as launch.py starts it on one
machine: so signals, errors, saves and the numbers are those of `--nproc`. The run directory must be the same on every
machine. Imports Ray only when it is asked to.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from loradock_adapters.errors import UsageError
from loradock_train.config import TrainConfig
from loradock_train.ending import Ending, chosen, raised
from loradock_train.errors import TrainError
from loradock_train.launch import SIGNALS, WorkOrder, ending_of, start_process
from loradock_train.remote import has_urls
from loradock_train.signed import signed_keys

POLL_S = 0.5
"""How soon a worker hears that the run is to stop."""


@dataclass(frozen=True)
class RayCluster:
    """Where to train, and with how much."""

    address: str
    """Of the cluster: HOST:PORT, ray://HOST:PORT, or `auto` on one of its machines."""
    workers: int = 1
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1

    def check(self) -> None:
        """Raises UsageError."""
        if find_spec("ray") is None:
            raise UsageError("--ray needs Ray, which is not installed: pip install 'loradock[ray]'")
        if self.workers < 1 or self.gpus_per_worker < 0 or self.cpus_per_worker < 0:
            raise UsageError("--workers must be at least 1; --gpus-per-worker and --cpus-per-worker at least 0")


def check_on_ray(config: TrainConfig) -> None:
    """Raises UsageError for what Ray's workers cannot do."""
    if config.sweep:
        raise UsageError("--ray: a sweep trains in one process; leave out sweep, or --ray")
    if has_urls(config):
        raise UsageError("--ray: give model_id and output_dir as paths on storage that all machines share, not as URLs")
    _check_unsigned(config)


def _check_unsigned(config: TrainConfig) -> None:
    """Signatures stay in the processes of one machine."""
    if keys := signed_keys(config.model_dump()):
        raise UsageError(
            f"--ray: {', '.join(keys)}: signed URLs are not handed to the machines of a cluster; give paths on storage "
            "that all share, or a URL whose login they have in their environment"
        )


def train_on_ray(order: WorkOrder, cluster: RayCluster, resources: Mapping[str, float] | None = None) -> None:
    """Train what the order says on the cluster's workers.

    resources: what else Ray is asked for, for every worker. Raises what the first worker that failed raised,
    RunStopped where they were asked to stop, UsageError where the cluster cannot be had.
    """
    cluster.check()
    directory = Path(order.directory).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    proof = directory.parent / f".loradock-{uuid.uuid4().hex}"
    proof.write_text(proof.name, encoding="utf-8")
    told = asdict(replace(order, directory=str(directory)))
    try:
        with _connected(cluster):
            endings, error = _fit(told, cluster, dict(resources or {}), proof)
    finally:
        proof.unlink(missing_ok=True)
    if any(ending.error is not None or ending.code != 0 for ending in endings):
        raise raised(chosen(endings), cluster.workers, 0)
    if error is not None:
        raise TrainError(f"Ray ended the run: {error}")


@contextmanager
def _connected(cluster: RayCluster) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=cluster.address, log_to_driver=True)
    except (ConnectionError, ValueError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"--ray {cluster.address}: no cluster answers there: {first}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _fit(
    order: dict[str, Any], cluster: RayCluster, resources: dict[str, float], proof: Path
) -> tuple[list[Ending], Exception | None]:
    """How every worker's process ended, and what Ray says. Ray's own handler of Ctrl-C would end the workers unsaved:
    it is only set by a main thread, so the run is led by another."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    box: Any = ray.remote(num_cpus=0)(_Box).remote()
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker} | resources
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory(prefix="loradock-ray-") as storage:
        trainer = DataParallelTrainer(
            _work,
            train_loop_config={"order": order, "box": box, "proof": str(proof)},
            backend_config=_backend(),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={name: value for name, value in wanted.items() if value > 0},
            ),
            run_config=RunConfig(name="loradock", storage_path=storage, failure_config=FailureConfig(max_failures=0)),
        )

        def lead() -> None:
            try:
                trainer.fit()
            except Exception as error:  # noqa: BLE001 - what a worker told is more to the point, where one did
                failures.append(error)

        thread = threading.Thread(target=lead, name="ray-train")
        stop = threading.Event()
        with _noted(stop):
            thread.start()
            is_told = False
            while thread.is_alive():
                thread.join(POLL_S)
                if stop.is_set() and not is_told:
                    ray.get(box.stop.remote())
                    is_told = True
    endings = [Ending(**values) for values in ray.get(box.all.remote())]
    return endings, failures[0] if failures else None


def _backend() -> Any:
    """Workers of one machine see all its GPUs, as the processes of `--nproc` do; each takes its own by its number."""
    from ray.train.backend import Backend, BackendConfig

    class Sharing(Backend):  # type: ignore[misc, unused-ignore]
        share_cuda_visible_devices = True

    class SharingConfig(BackendConfig):  # type: ignore[misc, unused-ignore]
        @property
        def backend_cls(self) -> type[Backend]:
            return Sharing

    return SharingConfig()


@contextmanager
def _noted(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C set the event while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Box:
    """An actor between whoever started the run and its workers: whether to stop, and how they ended."""

    def __init__(self) -> None:
        self._stops, self._endings = False, list[dict[str, Any]]()

    def stop(self) -> None:
        self._stops = True

    def stops(self) -> bool:
        return self._stops

    def put(self, ending: dict[str, Any]) -> None:
        self._endings.append(ending)

    def all(self) -> list[dict[str, Any]]:
        return self._endings


# ---- in a worker ----------------------------------------------------------------------------------------------------


def _work(told: dict[str, Any]) -> None:
    """One worker: starts its process, passes a stop on, tells how it ended. Raises where it failed, so that Ray ends
    the others, which wait for it."""
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    context = train.get_context()
    rank = context.get_world_rank()
    address: Any = ray.util.get_node_ip_address
    with _held_port() as port:
        place = broadcast_from_rank_zero({"host": address(), "port": port} if rank == 0 else None)
        ending = _run_process(told, context, place)
    ray.get(told["box"].put.remote(asdict(ending)))
    if ending.code != 0:
        raise RuntimeError(f"process {rank} failed")


def _run_process(told: dict[str, Any], context: Any, place: Mapping[str, Any]) -> Ending:
    """The worker's process of the run, which meets the others at `place`; how it ended."""
    rank, local = context.get_world_rank(), context.get_local_rank()
    environment = {
        "RANK": str(rank), "WORLD_SIZE": str(context.get_world_size()), "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()), "GROUP_RANK": str(context.get_node_rank()),
        "MASTER_ADDR": place["host"], "MASTER_PORT": str(place["port"]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="loradock-worker-") as name:
        folder = Path(name)
        if not _is_shared(Path(told["proof"])):
            return Ending(
                rank, 0.0, UsageError.__name__, code=2, is_ours=True,
                message=f"{Path(told['proof']).parent} is not the same folder on every machine of the cluster; give an "
                "--output on storage that they share",
            )  # fmt: skip
        (folder / "order.json").write_text(json.dumps(told["order"] | {"launcher": os.getpid()}), encoding="utf-8")
        process = start_process(folder, environment)
        try:
            _wait(process, told["box"])
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        return replace(ending_of(folder, local, process), rank=rank)


def _wait(process: subprocess.Popen[bytes], box: Any) -> None:
    import ray

    is_told = False
    while True:
        try:
            process.wait(timeout=POLL_S)
            return
        except subprocess.TimeoutExpired:
            if not is_told and ray.get(box.stops.remote()):
                process.send_signal(signal.SIGTERM)
                is_told = True


def _is_shared(proof: Path) -> bool:
    """Whether the file that whoever started the run wrote is here as well."""
    try:
        return proof.read_text(encoding="utf-8") == proof.name
    except OSError:
        return False


@contextmanager
def _held_port() -> Iterator[int]:
    """A port that nobody is given during the block, however long a process takes to start and listen there: torch's
    store may, since both set SO_REUSEADDR."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
