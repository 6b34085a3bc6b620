"""How many adapter slots an engine gets when nobody says: from the base's shapes and the machine's memory.

vLLM's own default is one slot and one cached adapter, which costs a factor of ten as soon as traffic names several.
Pure arithmetic; knows nothing of processes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from loradock_adapters.engine_rules import DEFAULT_MAX_LORA_RANK

MEMORY_SHARE = 0.05
MIN_SLOTS, MAX_SLOTS = 4, 64
MIN_CPU_LORAS = 64
GPU_SHARE, MIN_GPU_SHARE = 0.92, 0.1
GPU_OVERHEAD_SHARE = 0.05
"""CUDA context, activations and slots, as a share of the GPU."""


@dataclass(frozen=True)
class LoraSizing:
    """What the engine is started with."""

    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    slot_bytes: int
    """Memory of one slot, every target module at the full rank."""


def slot_bytes(shapes: Iterable[tuple[int, int]], rank: int, bytes_per_value: int) -> int:
    """Bytes of one slot: for each module of shape (out, in) a matrix A of (rank, in) and a B of (out, rank)."""
    return sum((out + inner) * rank for out, inner in shapes) * bytes_per_value


def choose(
    shapes: Iterable[tuple[int, int]],
    *,
    memory_bytes: int,
    bytes_per_value: int = 2,
    max_loras: int | None = None,
    max_cpu_loras: int | None = None,
    max_lora_rank: int | None = None,
) -> LoraSizing:
    """Fill in what the config leaves open.

    Slots take at most a twentieth of `memory_bytes`, and are between 4 and 64; host memory keeps four times as many
    adapters, at least 64. `shapes` are (out, in) of the base's linear modules; none known means the smallest number
    of slots.
    """
    rank = max_lora_rank if max_lora_rank is not None else DEFAULT_MAX_LORA_RANK
    size = slot_bytes(shapes, rank, bytes_per_value)
    affordable = int(memory_bytes * MEMORY_SHARE) // size if size else MIN_SLOTS
    slots = max_loras if max_loras is not None else max(MIN_SLOTS, min(MAX_SLOTS, affordable))
    if max_cpu_loras is not None:
        slots = min(slots, max_cpu_loras)
    cached = max_cpu_loras if max_cpu_loras is not None else max(MIN_CPU_LORAS, 4 * slots)
    return LoraSizing(slots, cached, rank, size)


def base_gpu_share(weights_bytes: int, gpu_bytes: int, dedicated_share: float) -> float:
    """The base's `gpu_memory_utilization` on a GPU that dedicated engines may share.

    What those leave of it, but never less than the base's weights and a quarter more need: a base that starts comes
    before full models that might be pushed one day.
    """
    needed = 1.25 * weights_bytes / gpu_bytes + GPU_OVERHEAD_SHARE
    return round(min(GPU_SHARE, max(GPU_SHARE - dedicated_share, needed, MIN_GPU_SHARE)), 2)
