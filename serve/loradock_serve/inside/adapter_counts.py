"""Counts what vLLM does with adapters in one worker: reads, writes into slots, evictions.

Attached to one manager when the gateway first asks for the engine's status, which it does before it sends a request:
the engine's warm-up is not counted. The touches, all of that one manager and its two caches, never of vLLM's classes:
`LRUCacheLoRAModelManager.activate_adapter`, `_add_adapter`, `_active_adapters.popitem` and
`_registered_adapters.popitem`. They only watch; what vLLM does stays what it was.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_COUNTED = 10_000
"""Adapters that are counted one by one; of more, those that nothing happened to for longest are forgotten."""


@dataclass
class Count:
    """What happened to one adapter, or to all of them."""

    reads: int = 0
    """Times its weights came into host memory."""
    activations: int = 0
    """Times it was written into a slot."""
    slot_evictions: int = 0
    """Times it had to leave its slot for another."""
    cpu_evictions: int = 0
    """Times it had to leave host memory for another: the next request reads it again."""


class AdapterCounts:
    """The counts of one vLLM manager (`LRUCacheLoRAModelManager`), by vLLM's numbers of adapters."""

    def __init__(self, manager: Any) -> None:
        self.total = Count()
        self._by_adapter: OrderedDict[int, Count] = OrderedDict()
        self._manager = manager
        self._watch_activations()
        self._watch_reads()
        self._watch_evictions(manager._active_adapters, self._left_slot)
        self._watch_evictions(manager._registered_adapters, self._left_memory)

    def to_json(self) -> dict[int, dict[str, int]]:
        """The counts of each adapter. The engine's loop waits for it: `asdict` takes 25 times as long for 10,000."""
        return {number: vars(count).copy() for number, count in self._by_adapter.items()}

    def _of(self, adapter: int) -> tuple[Count, Count]:
        count = self._by_adapter.setdefault(adapter, Count())
        self._by_adapter.move_to_end(adapter)
        if len(self._by_adapter) > MAX_COUNTED:
            self._by_adapter.popitem(last=False)
        return count, self.total

    def _watch_activations(self) -> None:
        stock: Callable[[int], bool] = self._manager.activate_adapter

        def activate_adapter(lora_id: int) -> bool:
            written = stock(lora_id)
            if written:
                for count in self._of(lora_id):
                    count.activations += 1
            return written

        self._manager.activate_adapter = activate_adapter

    def _watch_reads(self) -> None:
        stock: Callable[[Any], None] = self._manager._add_adapter

        def add_adapter(lora: Any) -> None:
            stock(lora)
            for count in self._of(lora.id):
                count.reads += 1

        self._manager._add_adapter = add_adapter

    def _watch_evictions(self, cache: Any, left: Callable[[int], None]) -> None:
        """Only what has to make room: an unloaded adapter is popped by its key, and a cleared cache says so."""
        stock: Callable[..., tuple[int, Any]] = cache.popitem

        def popitem(remove_pinned: bool = False) -> tuple[int, Any]:
            in_slots = set(self._manager._active_adapters)
            item = stock(remove_pinned=remove_pinned)
            if not remove_pinned:
                left(item[0])
                if cache is not self._manager._active_adapters and item[0] in in_slots:
                    self._left_slot(item[0])  # who leaves host memory leaves its slot with it
            return item

        cache.popitem = popitem

    def _left_slot(self, adapter: int) -> None:
        for count in self._of(adapter):
            count.slot_evictions += 1

    def _left_memory(self, adapter: int) -> None:
        for count in self._of(adapter):
            count.cpu_evictions += 1
