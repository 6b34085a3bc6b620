"""How many adapter slots an engine gets, of which rank, and how many adapters host memory keeps, when nobody says.

`advise` looks at the base's shapes, the machine's memory, the ranks and sizes of what is published, and what was asked
lately; whatever it chooses it gives the reason for. vLLM's own defaults are one slot and one cached adapter, which
costs a factor of ten as soon as traffic names several. Pure arithmetic; knows nothing of processes or databases.

What it weighs is told in docs/decisions.md ("what a server chooses for itself").
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from loradock_adapters.engine_rules import DEFAULT_MAX_LORA_RANK, LORA_RANKS, ladder_rank
from loradock_adapters.traffic import Traffic

SLOTS_SHARE = 0.05
"""Of the memory that slots lie in."""
FEW_SLOTS, FEW_SLOTS_SHARE = 4, 0.10
"""So many slots are worth twice the share."""
USUAL_SLOTS, MOST_SLOTS = 64, 256
"""Without traffic that asks for more; and with it."""
CACHE_SHARE, CACHE_SHARE_BESIDE_GPU = 0.10, 0.25
"""Of the host's memory, for adapters: where it also holds the base, and where a GPU does."""
USUAL_CACHED = 64
SMALLEST_RANK = 16
"""No smaller rank is chosen, whatever it would save: the next push may well have it."""
GUESSED_RANK = 16
"""Of an adapter that nobody has pushed yet, on every module."""
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
    """Memory of one slot, every module at the full rank; 0 where the base's shapes are not known."""


@dataclass(frozen=True)
class Published:
    """An adapter that a name points at."""

    name: str
    rank: int
    size_bytes: int
    """Of its files."""


@dataclass(frozen=True)
class Memory:
    """What there is."""

    slots_in_bytes: int
    """The memory that slots lie in: the GPU's, or the host's."""
    host_bytes: int
    bytes_per_value: int = 2
    beside_gpu: bool = False

    @property
    def cache_bytes(self) -> int:
        """What adapters in host memory may take."""
        return int(self.host_bytes * (CACHE_SHARE_BESIDE_GPU if self.beside_gpu else CACHE_SHARE))


@dataclass(frozen=True)
class Wish:
    """What the config says; None: nothing."""

    max_loras: int | None = None
    max_cpu_loras: int | None = None
    max_lora_rank: int | None = None
    max_num_seqs: int | None = None
    """Requests that the engine runs at once: more slots than that are of no use."""


@dataclass(frozen=True)
class Known:
    """What is known of the adapters and of who asks for them."""

    shared: Sequence[Published] = ()
    """Hot-swapped ones of this base, current versions."""
    older_ranks: Collection[int] = ()
    """Ranks of their older versions, which can still be asked for."""
    over_rank: Sequence[Published] = ()
    """Those that have engines of their own only because their rank was over the limit when they were pushed."""
    traffic: Traffic = field(default_factory=Traffic)
    dedicated_engines: int = 1
    """Engines that may run beside the base's."""


@dataclass(frozen=True)
class Advice:
    """What to start the engine with, what it costs, and why."""

    sizing: LoraSizing
    slots_bytes: int
    """All slots together."""
    cache_bytes: int
    """The adapters that host memory keeps, by the sizes of the largest published, and a guess for those to come."""
    reasons: dict[str, str]
    """Setting -> why."""
    notes: tuple[str, ...]
    """What else should be known."""


def slot_bytes(shapes: Iterable[tuple[int, int]], rank: int, bytes_per_value: int) -> int:
    """Bytes of one slot: for each module of shape (out, in) a matrix A of (rank, in) and a B of (out, rank)."""
    return sum((out + inner) * rank for out, inner in shapes) * bytes_per_value


def advise(known: Known, shapes: Iterable[tuple[int, int]], memory: Memory, wish: Wish | None = None) -> Advice:
    """Choose what `wish` leaves open. `shapes` are (out, in) of every module that carries adapters.

    Slots never take more than a twentieth of their memory (a tenth for the first four), unless it is the only one or
    the config says so; the rank fits every adapter that is published as shared, but for one that is named in `notes`.
    """
    return _Adviser(known, slot_bytes(shapes, 1, memory.bytes_per_value), memory, wish or Wish()).advice()


class _Adviser:
    """One piece of advice on its way."""

    def __init__(self, known: Known, rank_bytes: int, memory: Memory, wish: Wish) -> None:
        self._known = known
        self._rank_bytes = rank_bytes
        """Bytes of one slot of rank 1."""
        self._memory = memory
        self._wish = wish
        self._asked = min(known.traffic.peak_adapters, MOST_SLOTS)
        self._reasons: dict[str, str] = {}
        self._notes: list[str] = []

    def advice(self) -> Advice:
        rank = self._rank()
        slots = self._slots(rank)
        cached = self._cached(slots)
        if self._wish.max_loras is None and slots > cached:  # vLLM keeps in host memory whatever is in a slot
            slots = cached
            self._reasons["max_loras"] += f"; no more than the {cached} adapters that host memory keeps"
        self._note_over_rank(rank)
        sizing = LoraSizing(slots, cached, rank, rank * self._rank_bytes)
        return Advice(sizing, slots * sizing.slot_bytes, self._cache_bytes(cached), self._reasons, tuple(self._notes))

    def _affordable(self, rank: int) -> int:
        """Slots of this rank that the memory has room for, at least one."""
        size, memory_bytes = rank * self._rank_bytes, self._memory.slots_in_bytes
        if not size:
            return FEW_SLOTS
        within_share = int(memory_bytes * SLOTS_SHARE) // size
        few = min(FEW_SLOTS, int(memory_bytes * FEW_SLOTS_SHARE) // size)
        return max(1, few, within_share)

    def _rank(self) -> int:
        wished, ranks = self._wish.max_lora_rank, self._ranks
        if wished is not None:
            self._reasons["max_lora_rank"] = "set in the config"
            return wished
        largest = max(ranks, default=0)
        fits_all = max(DEFAULT_MAX_LORA_RANK, _ladder(largest))
        if fits_all > DEFAULT_MAX_LORA_RANK:
            self._reasons["max_lora_rank"] = f"the largest rank of a published adapter is {largest}"
            return self._without_odd_one(fits_all)
        if not ranks:
            self._reasons["max_lora_rank"] = "nothing is published: room for what is usual"
        else:
            self._reasons["max_lora_rank"] = f"the largest published rank is {largest}; room for larger ones to come"
        return self._smaller_for_slots(fits_all, largest)

    @property
    def _ranks(self) -> list[int]:
        return [*(adapter.rank for adapter in self._known.shared), *self._known.older_ranks]

    def _smaller_for_slots(self, rank: int, largest: int) -> int:
        """A smaller rank where traffic needs the slots that it saves, one step of room above what is published."""
        if not self._known.shared or self._affordable(rank) >= self._asked:
            return rank
        floor = max(SMALLEST_RANK, next(step for step in LORA_RANKS if step > _ladder(largest)))
        smaller = [step for step in LORA_RANKS if floor <= step < rank]
        enough = [step for step in smaller if self._affordable(step) >= self._asked]
        chosen = max(enough) if enough else min(smaller, default=rank)
        if self._affordable(chosen) <= self._affordable(rank):
            return rank
        self._reasons["max_lora_rank"] = (
            f"{self._asked} adapters were asked for at once, and memory has room for {self._affordable(rank)} slots of "
            f"rank {rank} but {self._affordable(chosen)} of {chosen}; the largest published rank is {largest}"
        )
        self._notes.append(
            f"an adapter of a rank over {chosen} will get an engine of its own; set engine.max_lora_rank: {rank} if "
            "such are to come"
        )
        return chosen

    def _without_odd_one(self, rank: int) -> int:
        """A smaller rank where a single adapter of far larger rank than all others costs the others their slots."""
        by_rank = sorted(self._known.shared, key=lambda adapter: adapter.rank)
        if not by_rank or not self._known.dedicated_engines or _ladder(by_rank[-1].rank) < rank:
            return rank
        odd = by_rank[-1]
        others = [*(adapter.rank for adapter in by_rank[:-1]), *self._known.older_ranks]
        smaller = max(DEFAULT_MAX_LORA_RANK, _ladder(max(others, default=0)))
        few, more = self._affordable(rank), self._affordable(smaller)
        if not by_rank[:-1] or few >= max(self._asked, FEW_SLOTS) or more < 2 * few:
            return rank
        self._reasons["max_lora_rank"] = (
            f"rank {odd.rank} of {odd.name!r} alone would leave room for {few} slots instead of {more}"
        )
        self._notes.append(
            f"{odd.name!r} (rank {odd.rank}) gets an engine of its own; set engine.max_lora_rank: {rank} to share the "
            f"base's with it, at {few} slots"
        )
        return smaller

    def _slots(self, rank: int) -> int:
        wish = self._wish
        if wish.max_loras is not None:
            self._reasons["max_loras"] = "set in the config"
            chosen = wish.max_loras
        else:
            wanted = max(USUAL_SLOTS, self._asked)
            affordable = self._affordable(rank)
            chosen = min(wanted, affordable)
            self._reasons["max_loras"] = self._why_slots(rank, chosen, wanted)
            if wish.max_num_seqs is not None and wish.max_num_seqs < chosen:
                chosen = wish.max_num_seqs
                self._reasons["max_loras"] = f"no more than engine.max_num_seqs, {chosen}"
            if self._asked > chosen:
                self._notes.append(
                    f"{self._asked} adapters were asked for at once: with {chosen} slots some wait for their turn"
                )
        if wish.max_cpu_loras is not None and wish.max_cpu_loras < chosen:
            chosen = wish.max_cpu_loras
            self._reasons["max_loras"] = f"no more than engine.max_cpu_loras, {chosen}"
        return chosen

    def _why_slots(self, rank: int, chosen: int, wanted: int) -> str:
        if not self._rank_bytes:
            return "the base's shapes are not known"
        share = chosen * rank * self._rank_bytes / self._memory.slots_in_bytes
        if chosen < wanted:
            return f"what {share:.1%} of {_gib(self._memory.slots_in_bytes)} has room for"
        if wanted > USUAL_SLOTS:
            return f"as many adapters were asked for at once; {share:.1%} of {_gib(self._memory.slots_in_bytes)}"
        return f"the usual number; {share:.1%} of {_gib(self._memory.slots_in_bytes)}"

    def _cached(self, slots: int) -> int:
        published = len(self._known.shared)
        if self._wish.max_cpu_loras is not None:
            self._reasons["max_cpu_loras"] = "set in the config"
            self._note_costly_cache(self._wish.max_cpu_loras)
            return self._wish.max_cpu_loras
        wanted = max(USUAL_CACHED, 4 * slots, published + published // 4)
        cached = self._affordable_cached(wanted)
        if self._wish.max_loras is not None:
            cached = max(cached, slots)
        share = f"{self._memory.cache_bytes / max(1, self._memory.host_bytes):.0%} of {_gib(self._memory.host_bytes)}"
        if cached < wanted:
            why = f"what {share} has room for"
        elif cached == published + published // 4:
            why = f"all {published} published ones, and a quarter more"
        else:
            why = "four times the slots" if cached == 4 * slots else "the usual number"
        self._reasons["max_cpu_loras"] = why
        if (busy := self._known.traffic.busiest_hour_adapters) > cached:
            self._notes.append(
                f"{busy} adapters were asked for within one hour, and {cached} stay in host memory: the others are "
                "read from disk again and again"
            )
        return cached

    def _note_costly_cache(self, adapters: int) -> None:
        needed, host_bytes = self._cache_bytes(adapters), self._memory.host_bytes
        if needed > host_bytes // 2:
            self._notes.append(
                f"engine.max_cpu_loras: {adapters} adapters would fill about {_gib(needed)} of this machine's "
                f"{_gib(host_bytes)}, beside all else: the engine may run out of memory once so many were asked for"
            )

    def _affordable_cached(self, wanted: int) -> int:
        """Adapters that host memory may keep, up to so many, at least one."""
        sizes, one_more = self._cached_sizes()
        left_bytes = self._memory.cache_bytes
        for kept, size_bytes in enumerate(sizes[:wanted]):
            left_bytes -= size_bytes
            if left_bytes < 0:
                return max(1, kept)
        more = left_bytes // one_more if one_more else wanted
        return max(1, min(wanted, len(sizes) + more))

    def _cache_bytes(self, adapters: int) -> int:
        """What so many adapters take in host memory."""
        sizes, one_more = self._cached_sizes()
        return sum(sizes[:adapters]) + one_more * max(0, adapters - len(sizes))

    def _cached_sizes(self) -> tuple[list[int], int]:
        """Bytes in host memory of each published adapter, the largest first, and of one to come: as large."""
        sizes = sorted(map(self._bytes_of, self._known.shared), reverse=True)
        return sizes, sizes[0] if sizes else GUESSED_RANK * self._rank_bytes

    def _bytes_of(self, adapter: Published) -> int:
        """Its files may hold 16-bit values; on every module it is as large as a slot of its own rank."""
        from_files = adapter.size_bytes * self._memory.bytes_per_value // 2
        on_every_module = adapter.rank * self._rank_bytes
        return min(from_files, on_every_module) if on_every_module else from_files

    def _note_over_rank(self, rank: int) -> None:
        if not (over := self._known.over_rank):
            return
        needed = _ladder(max(adapter.rank for adapter in over))
        few, more_slots = self._affordable(needed), self._affordable(rank)
        named = ", ".join(f"{adapter.name!r} (rank {adapter.rank})" for adapter in over[:3])
        more = f" and {len(over) - 3} more" if len(over) > 3 else ""
        verb = "has an engine of its own" if len(over) == 1 else "have engines of their own"
        if needed <= rank:
            self._notes.append(f"{named}{more} {verb}, but would fit now: push again to share the base's")
        else:
            self._notes.append(
                f"{named}{more} {verb}, for the rank; with engine.max_lora_rank: {needed}, and pushed again, the "
                f"base's serves them too, with room for {few} slots instead of {more_slots}"
            )


def _ladder(rank: int) -> int:
    """The smallest step that fits; the largest where none does (the gate lets no such adapter share)."""
    return ladder_rank(rank) or LORA_RANKS[-1]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.1f} GiB"


def base_gpu_share(weights_bytes: int, gpu_bytes: int, dedicated_share: float) -> float:
    """The base's `gpu_memory_utilization` on a GPU that dedicated engines may share.

    What those leave of it, but never less than the base's weights and a quarter more need: a base that starts comes
    before full models that might be pushed one day.
    """
    needed = 1.25 * weights_bytes / gpu_bytes + GPU_OVERHEAD_SHARE
    return round(min(GPU_SHARE, max(GPU_SHARE - dedicated_share, needed, MIN_GPU_SHARE)), 2)
