"""Adapters that keep their slot in one worker, by vLLM's own pins, which then cannot end the engine.

vLLM's scheduler does not know of pins: with two slots, one pinned, and two other adapters in a batch, the step raises
and the engine dies. The gateway's admission keeps such batches away; should one come all the same (an engine that two
gateways share), a pin gives way for that step here, and is taken again as soon as there is room. vLLM has no unpin.
The touches, all of one worker's manager: `LRUCacheWorkerLoRAManager._apply_adapters` and `remove_adapter` and, of its
`_adapter_manager`, `pin_adapter`, `lora_slots`, `capacity`, and `pinned_items` and `_unpin` of its `_active_adapters`
and `_registered_adapters`.
"""

from collections.abc import Callable
from typing import Any, Literal

Answer = Literal["pinned", "absent", "full"]


class SlotPins:
    """The pins of one vLLM worker manager (`LRUCacheWorkerLoRAManager`)."""

    def __init__(self, lora_manager: Any) -> None:
        self._manager = lora_manager._adapter_manager
        self._wanted: dict[int, None] = {}
        """vLLM's numbers of the pinned adapters, in the order of their pinning; whether or not one gives way now."""
        self._watch_steps(lora_manager)
        self._watch_removals(lora_manager)

    @property
    def pinned(self) -> list[int]:
        """The pinned adapters."""
        return list(self._wanted)

    def pin(self, adapter: int) -> Answer:
        """Put an adapter into a slot and keep it there; `absent` where its weights are not in host memory, `full`
        where all slots but one are pinned already."""
        if adapter not in self._manager._registered_adapters:
            return "absent"
        if len(self._wanted.keys() | {adapter}) > self._manager.lora_slots - 1:
            return "full"
        self._manager.pin_adapter(adapter)
        self._wanted[adapter] = None
        return "pinned"

    def unpin(self, adapter: int) -> bool:
        """Let an adapter leave its slot again when another needs it; False if it was not pinned."""
        was_pinned = adapter in self._wanted
        self._wanted.pop(adapter, None)
        for cache in (self._manager._active_adapters, self._manager._registered_adapters):
            _let_go(cache, adapter)
        return was_pinned

    def _watch_steps(self, lora_manager: Any) -> None:
        stock: Callable[[Any], None] = lora_manager._apply_adapters

        def apply_adapters(requests: Any) -> None:
            if not self._wanted:
                stock(requests)
                return
            batch = {request.lora_int_id for request in requests if request}
            needed = len(batch | self._wanted.keys())
            for cache, room in (
                (self._manager._active_adapters, self._manager.lora_slots),
                (self._manager._registered_adapters, self._manager.capacity),
            ):
                if needed > room:
                    for adapter in self._wanted.keys() - batch:
                        _let_go(cache, adapter)
            stock(requests)
            self._take_again(batch)

        lora_manager._apply_adapters = apply_adapters

    def _take_again(self, batch: set[int]) -> None:
        """Pin what gave way, as far as this batch leaves slots for it. Whose weights had to leave host memory as well
        waits for its next request, which brings them."""
        active, memory = self._manager._active_adapters, self._manager._registered_adapters
        for adapter in self._wanted.keys() - active.pinned_items:
            if adapter in memory and len(batch | active.pinned_items | {adapter}) <= self._manager.lora_slots:
                self._manager.pin_adapter(adapter)

    def _watch_removals(self, lora_manager: Any) -> None:
        """An adapter that is unloaded is pinned no more. (The manager inside removes and adds one that it reads again:
        that is no unloading.)"""
        stock: Callable[[int], bool] = lora_manager.remove_adapter

        def remove_adapter(adapter_id: int) -> bool:
            self._wanted.pop(adapter_id, None)
            return stock(adapter_id)

        lora_manager.remove_adapter = remove_adapter


def _let_go(cache: Any, adapter: int) -> None:
    if adapter in cache.pinned_items:
        cache._unpin(adapter)
