"""What a server chooses for itself: slots, their rank, and adapters in host memory."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_adapters.engine_rules import LORA_RANKS, ladder_rank
from loradock_adapters.traffic import Traffic
from loradock_serve import sizing
from loradock_serve.sizing import Advice, Known, Memory, Published, Wish

GIB = 1024**3
SHAPES = [(1024, 1024)] * 4
RANK_BYTES = 4 * 2048 * 2
SLOT = 64 * RANK_BYTES


def adapters(*ranks: int, size_bytes: int = 10**6) -> list[Published]:
    return [Published(f"a{number}", rank, size_bytes) for number, rank in enumerate(ranks)]


def advise(
    *ranks: int,
    room: float = 1000,
    asked: int = 0,
    host_bytes: int = 1000 * GIB,
    wish: Wish | None = None,
    **known: Any,
) -> Advice:
    """Advice for adapters of these ranks; `room`: slots of rank 64 that a twentieth of the memory holds."""
    facts = Known(adapters(*ranks), traffic=Traffic({}, asked, asked), **known)
    return sizing.advise(facts, SHAPES, Memory(int(room * 20 * SLOT), host_bytes), wish)


def test_slot_holds_both_matrices_of_every_module_at_full_rank() -> None:
    assert sizing.slot_bytes([(10, 20), (5, 7)], rank=4, bytes_per_value=2) == (30 + 12) * 4 * 2


def test_empty_registry_gets_slots_from_memory_at_rank_64() -> None:
    advice = advise(room=10)
    assert advice.sizing == sizing.LoraSizing(10, 64, 64, SLOT)
    assert advice.slots_bytes == 10 * SLOT
    assert advice.cache_bytes == 64 * 16 * RANK_BYTES, "by a guess: rank 16 on every module"
    assert advice.reasons["max_lora_rank"] == "nothing is published: room for what is usual"


def test_plenty_of_memory_still_gives_the_usual_number_of_slots() -> None:
    sized = advise().sizing
    assert (sized.max_loras, sized.max_cpu_loras) == (64, 256)


@pytest.mark.parametrize(("room", "slots"), [(3, 4), (1.5, 3), (0.4, 1)])
def test_first_four_slots_may_take_twice_the_share(room: float, slots: int) -> None:
    assert advise(room=room).sizing.max_loras == slots


def test_config_wins_and_says_so() -> None:
    advice = advise(8, wish=Wish(max_loras=100, max_cpu_loras=500, max_lora_rank=8))
    assert advice.sizing == sizing.LoraSizing(100, 500, 8, SLOT // 8)
    assert set(advice.reasons.values()) == {"set in the config"}


def test_slots_never_exceed_the_configured_host_cache_or_the_sequences() -> None:
    assert advise(wish=Wish(max_cpu_loras=3)).sizing.max_loras == 3
    assert advise(wish=Wish(max_num_seqs=16)).sizing.max_loras == 16


def test_configured_slots_are_all_kept_in_host_memory() -> None:
    assert advise(wish=Wish(max_loras=40)).sizing.max_cpu_loras == 160
    assert advise(host_bytes=GIB // 100, wish=Wish(max_loras=40)).sizing.max_cpu_loras == 40


def test_unknown_shapes_mean_four_slots() -> None:
    advice = sizing.advise(Known(), [], Memory(1000 * GIB, 1000 * GIB))
    assert (advice.sizing.max_loras, advice.sizing.slot_bytes) == (4, 0)
    assert advice.reasons["max_loras"] == "the base's shapes are not known"


def test_small_ranks_alone_do_not_shrink_the_slots_rank() -> None:
    """Whoever pushes rank 32 tomorrow must find room: memory that nobody needs buys nothing."""
    advice = advise(8, 8, 4, room=10, asked=10)
    assert (advice.sizing.max_lora_rank, advice.sizing.max_loras) == (64, 10)
    assert advice.reasons["max_lora_rank"] == "the largest published rank is 8; room for larger ones to come"


def test_rank_shrinks_when_traffic_needs_the_slots_and_keeps_a_step_of_room() -> None:
    advice = advise(8, 12, room=10, asked=20)
    assert (advice.sizing.max_lora_rank, advice.sizing.max_loras) == (32, 20)
    assert "20 adapters were asked for at once" in advice.reasons["max_lora_rank"]
    assert advice.notes == (
        "an adapter of a rank over 32 will get an engine of its own; set engine.max_lora_rank: 64 if such are to come",
    )
    assert advise(8, 4, room=10, asked=40).sizing.max_lora_rank == 16
    assert advise(1, room=10, asked=60).sizing.max_lora_rank == 16, "never smaller"
    assert advise(8, 20, room=10, asked=40).sizing.max_lora_rank == 64, "no step of room below 64"
    assert advise(8, room=10, asked=40, older_ranks=[20]).sizing.max_lora_rank == 64, (
        "an older version can be asked for"
    )


def test_rank_grows_to_what_is_published() -> None:
    advice = advise(8, 100, room=100)
    assert advice.sizing.max_lora_rank == 128
    assert advice.reasons["max_lora_rank"] == "the largest rank of a published adapter is 100"


def test_one_odd_huge_adapter_goes_to_an_engine_of_its_own_where_it_costs_the_others_their_slots() -> None:
    advice = advise(8, 16, 512, room=8)
    assert (advice.sizing.max_lora_rank, advice.sizing.max_loras) == (64, 8)
    assert advice.reasons["max_lora_rank"] == "rank 512 of 'a2' alone would leave room for 2 slots instead of 8"
    assert advice.notes == (
        "'a2' (rank 512) gets an engine of its own; set engine.max_lora_rank: 512 to share the base's with it, at 2 "
        "slots",
    )
    assert advise(8, 16, 512, room=32).sizing.max_lora_rank == 512, "four slots will do"
    assert advise(8, 16, 512, room=32, asked=8).sizing.max_lora_rank == 64, "traffic needs more"


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        ((8, 512), {"room": 200}),  # room for all
        ((8, 512, 512), {"room": 10}),  # two are not odd
        ((8, 512), {"room": 10, "dedicated_engines": 0}),  # nowhere to go
        ((512,), {"room": 10}),  # there are no others
    ],
)
def test_huge_adapters_are_shared_otherwise(ranks: tuple[int, ...], settings: dict[str, Any]) -> None:
    assert advise(*ranks, **settings).sizing.max_lora_rank == 512


def test_traffic_on_more_adapters_raises_the_slots_as_far_as_memory_goes() -> None:
    assert advise(*[32] * 100, asked=100).sizing.max_loras == 100
    advice = advise(*[32] * 100, asked=100, room=80)
    assert advice.sizing.max_loras == 80
    assert advice.notes == ("100 adapters were asked for at once: with 80 slots some wait for their turn",)
    assert advise(*[32] * 100, asked=5000).sizing.max_loras == sizing.MOST_SLOTS


def test_all_published_adapters_stay_in_host_memory_where_it_has_room() -> None:
    assert advise(*[8] * 1000).sizing.max_cpu_loras == 1250
    advice = advise(*[8] * 1000, host_bytes=10 * 500 * 8 * RANK_BYTES, asked=900)
    assert (advice.sizing.max_cpu_loras, advice.cache_bytes) == (500, 500 * 8 * RANK_BYTES)
    assert any("900 adapters were asked for within one hour, and 500 stay in host memory" in n for n in advice.notes)


def test_slots_do_not_exceed_what_host_memory_keeps() -> None:
    advice = advise(*[64] * 8, host_bytes=10 * 5 * 10**6)
    assert (advice.sizing.max_loras, advice.sizing.max_cpu_loras) == (5, 5)
    assert advice.reasons["max_loras"].endswith("no more than the 5 adapters that host memory keeps")


def test_adapters_over_the_rank_of_their_push_are_told_what_it_would_take() -> None:
    over = [Published("big", 128, 1)]
    assert advise(8, room=20, over_rank=over).notes == (
        "'big' (rank 128) has an engine of its own, for the rank; with engine.max_lora_rank: 128, and pushed again, "
        "the base's serves them too, with room for 10 slots instead of 20",
    )
    assert advise(100, over_rank=over).notes == (
        "'big' (rank 128) has an engine of its own, but would fit now: push again to share the base's",
    )


RANKS = st.lists(st.integers(1, 512), max_size=30)


@given(
    ranks=RANKS,
    older=st.lists(st.integers(1, 512), max_size=3),
    size_bytes=st.integers(1, GIB),
    asked=st.integers(0, 400),
    slots_in_bytes=st.integers(1, 200 * GIB),
    host_bytes=st.integers(1, 200 * GIB),
    layers=st.integers(1, 80),
    engines=st.integers(0, 1),
    bytes_per_value=st.sampled_from([2, 4]),
)
def test_advice_never_exceeds_memory_and_loses_nothing_that_is_shared(
    ranks: list[int],
    older: list[int],
    size_bytes: int,
    asked: int,
    slots_in_bytes: int,
    host_bytes: int,
    layers: int,
    engines: int,
    bytes_per_value: int,
) -> None:
    known = Known(adapters(*ranks, size_bytes=size_bytes), older, (), Traffic({}, asked, asked), engines)
    memory = Memory(slots_in_bytes, host_bytes, bytes_per_value)
    advice = sizing.advise(known, [(4096, 1024)] * layers, memory)
    sized = advice.sizing

    assert sized.max_lora_rank in LORA_RANKS
    assert sized.max_lora_rank >= sizing.SMALLEST_RANK
    unfit = [adapter for adapter in known.shared if adapter.rank > sized.max_lora_rank]
    assert len(unfit) <= engines
    assert all(any(repr(adapter.name) in note for note in advice.notes) for adapter in unfit)
    assert not unfit or sized.max_lora_rank >= 64
    assert all(rank <= sized.max_lora_rank for rank in older)

    assert 1 <= sized.max_loras <= sized.max_cpu_loras
    share = 0.05 if sized.max_loras > 4 else 0.10
    assert advice.slots_bytes <= slots_in_bytes * share or sized.max_loras == 1
    assert advice.cache_bytes <= memory.cache_bytes or sized.max_cpu_loras == 1
    assert set(advice.reasons) == {"max_loras", "max_cpu_loras", "max_lora_rank"}
    assert sizing.advise(known, [(4096, 1024)] * layers, memory) == advice, "the same facts, the same advice"


@given(ranks=RANKS, asked=st.integers(0, 400), room=st.floats(0.1, 300))
def test_rank_below_64_is_chosen_only_for_slots_that_traffic_needs(ranks: list[int], asked: int, room: float) -> None:
    sized = advise(*ranks, room=room, asked=asked).sizing
    if sized.max_lora_rank < 64:
        largest = ladder_rank(max(ranks))
        assert largest is not None
        assert sized.max_lora_rank > largest, "one step of room"
        assert advise(room=room).sizing.max_loras < min(asked, sizing.MOST_SLOTS)


def test_base_gets_what_dedicated_engines_leave_but_never_less_than_it_needs() -> None:
    gib = 1024**3
    assert sizing.base_gpu_share(16 * gib, 80 * gib, 0.3) == 0.62
    assert sizing.base_gpu_share(16 * gib, 24 * gib, 0.3) == 0.88, "an 8B in 16 bits on a 24 GB card"
    assert sizing.base_gpu_share(30 * gib, 24 * gib, 0.3) == 0.92, "does not fit: the engine will say so"
    assert sizing.base_gpu_share(0, 24 * gib, 0.9) == 0.1


@pytest.mark.parametrize(("adapters_kept", "is_noted"), [(100_000, True), (500, False)])
def test_host_memory_for_more_adapters_than_it_holds_is_noted(adapters_kept: int, is_noted: bool) -> None:
    notes = advise(8, host_bytes=GIB, wish=Wish(max_cpu_loras=adapters_kept)).notes
    assert sum("engine.max_cpu_loras: 100000 adapters" in note for note in notes) == is_noted
