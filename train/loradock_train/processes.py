"""Which of the processes of a run this one is, and how they agree.

A run of several processes is started by `loradock train --nproc` or torchrun; both say so in the
environment: RANK, WORLD_SIZE, LOCAL_RANK, and where to meet in MASTER_ADDR and MASTER_PORT (or in
LORADOCK_RENDEZVOUS, a file). Process 0 prints and writes; the others compute. Knows nothing of training, and imports
torch only where there are several processes.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from loradock_adapters.errors import LoradockError, UsageError

T = TypeVar("T")
RENDEZVOUS = "LORADOCK_RENDEZVOUS"
"""file:///… where the processes of one machine meet; without it, MASTER_ADDR and MASTER_PORT."""
PATIENCE = timedelta(hours=4)
"""How long a process waits for the others: process 0 may be writing a large checkpoint. Dead ones are noticed by
whoever started them."""
PARTING_S = 0.05
"""Asleep at the end, so that threads that were kept waiting come to their turn."""


def world_size() -> int:
    """Processes of this run, on all machines; 1 where nobody started several."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Which of those on this machine this is, from 0: the number of its GPU."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Processes of this run on this machine; 1 where nobody started several."""
    return _number("LOCAL_WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


@contextmanager
def connected() -> Iterator[None]:
    """Meet the other processes, and part from them at the end. Nothing where there are none, or where whoever started
    this process has connected it already."""
    if world_size() == 1:
        yield
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank()} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "start as many processes as it has"
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    where = os.environ.get(RENDEZVOUS, "env://")
    distributed.init_process_group(backend, init_method=where, rank=rank(), world_size=world_size(), timeout=PATIENCE)
    try:
        yield
        barrier()  # nobody closes a connection that another one still reads from
        # gloo's threads need the interpreter's lock to drop the tensors of that barrier. One that waits for it while
        # Python is taken down aborts the process; one that waits while the group is freed by the garbage collector,
        # which holds the lock, stops it for ever.
        time.sleep(PARTING_S)
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        gather_objects(None)


def broadcast_object(value: T) -> T:
    """What process 0 holds."""
    if world_size() == 1:
        return value
    from torch import distributed

    box = [value if is_main() else None]
    distributed.broadcast_object_list(box, src=0, device=_cpu())
    return cast(T, box[0])


def gather_objects(value: T) -> list[T]:
    """What each process holds, by rank. Small things only."""
    if world_size() == 1:
        return [value]
    import torch
    from torch import distributed

    # all_gather_object would go through the GPU where there is one.
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [size for (size,) in gather_numbers([len(mine)])]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(mine)] = mine
    found = [torch.zeros_like(padded) for _ in sizes]
    distributed.all_gather(found, padded)
    return [pickle.loads(each[:size].numpy().tobytes()) for each, size in zip(found, sizes, strict=True)]


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """As many numbers from each process, by rank."""
    if world_size() == 1:
        return [numbers]
    import torch
    from torch import distributed

    found = [torch.zeros(len(numbers), dtype=torch.int64) for _ in range(world_size())]
    distributed.all_gather(found, torch.tensor(numbers))
    return [each.tolist() for each in found]


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, in every process; an error of ours is raised in every process."""
    if world_size() == 1:
        return work()
    told: tuple[Any, tuple[type[LoradockError], dict[str, Any], tuple[Any, ...]] | None] = (None, None)
    if is_main():
        try:
            told = (work(), None)
        except LoradockError as error:
            told = (None, (type(error), error.__dict__, error.args))
    value, failed = broadcast_object(told)
    if failed is None:
        return cast(T, value)
    kind, attributes, arguments = failed
    again = kind.__new__(kind)
    again.__dict__.update(attributes)
    again.args = arguments
    raise again


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
