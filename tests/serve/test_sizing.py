"""Adapter slots from shapes and memory."""

from loradock_serve import sizing
from loradock_serve.sizing import LoraSizing

GIB = 1024**3
SHAPES = [(1024, 1024)] * 4
SLOT = 4 * 2048 * 64 * 2


def test_slot_holds_both_matrices_of_every_module_at_full_rank() -> None:
    assert sizing.slot_bytes([(10, 20), (5, 7)], rank=4, bytes_per_value=2) == (30 + 12) * 4 * 2


def test_slots_take_a_twentieth_of_the_memory() -> None:
    assert sizing.choose(SHAPES, memory_bytes=20 * 10 * SLOT) == LoraSizing(10, 64, 64, SLOT)


def test_slots_stay_between_four_and_sixty_four() -> None:
    assert sizing.choose(SHAPES, memory_bytes=SLOT).max_loras == 4
    big = sizing.choose(SHAPES, memory_bytes=1000 * GIB)
    assert (big.max_loras, big.max_cpu_loras) == (64, 256)


def test_config_wins_over_the_choice() -> None:
    chosen = sizing.choose(SHAPES, memory_bytes=GIB, max_loras=100, max_cpu_loras=500, max_lora_rank=8)
    assert chosen == LoraSizing(100, 500, 8, SLOT // 8)


def test_slots_never_exceed_the_configured_host_cache() -> None:
    assert sizing.choose(SHAPES, memory_bytes=1000 * GIB, max_cpu_loras=3) == LoraSizing(3, 3, 64, SLOT)


def test_host_cache_grows_with_configured_slots() -> None:
    assert sizing.choose(SHAPES, memory_bytes=GIB, max_loras=40).max_cpu_loras == 160


def test_unknown_shapes_mean_the_smallest_number_of_slots() -> None:
    assert sizing.choose([], memory_bytes=1000 * GIB) == LoraSizing(4, 64, 64, 0)


def test_base_gets_what_dedicated_engines_leave_but_never_less_than_it_needs() -> None:
    gib = 1024**3
    assert sizing.base_gpu_share(16 * gib, 80 * gib, 0.3) == 0.62
    assert sizing.base_gpu_share(16 * gib, 24 * gib, 0.3) == 0.88, "an 8B in 16 bits on a 24 GB card"
    assert sizing.base_gpu_share(30 * gib, 24 * gib, 0.3) == 0.92, "does not fit: the engine will say so"
    assert sizing.base_gpu_share(0, 24 * gib, 0.9) == 0.1
