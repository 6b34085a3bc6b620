"""Tells the LoRA wrapper of every adapter that vLLM writes into a slot, with the adapter's own rank.

vLLM preallocates every slot at `max_lora_rank`, and the wrapper is never told what lies in them. Our one touch inside
vLLM's LoRA manager, `LoRAModelManager.activate_adapter`, tells it. Without the touch answers would be the same, at the
price of the full rank in every layer. It does not know what a wrapper does with the news.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch

_MARK = "loradock_tells_wrappers"


@runtime_checkable
class HearsOfSlots(Protocol):
    """A wrapper that wants to know what lies in the slots."""

    def slot_written(self, slot: int, rank: int) -> None:
        """All layers of `slot` now hold an adapter whose largest rank is `rank`."""


def watch_slots() -> None:
    """Hook into vLLM's manager, once per process."""
    from vllm.lora.model_manager import LoRAModelManager

    stock = LoRAModelManager.activate_adapter
    if hasattr(stock, _MARK):
        return

    def activate_adapter(manager: Any, lora_id: int) -> bool:
        written: bool = stock(manager, lora_id)
        if written:
            slot = manager.lora_index_to_id.index(lora_id)
            rank = largest_rank(manager.get_adapter(lora_id))
            for wrapper in manager.punica_wrapper_mapping.values():
                if isinstance(wrapper, HearsOfSlots):
                    wrapper.slot_written(slot, rank)
        return written

    setattr(activate_adapter, _MARK, True)
    LoRAModelManager.activate_adapter = activate_adapter  # type: ignore[method-assign, assignment]


def largest_rank(adapter: Any) -> int:
    """The largest rank among an adapter's layers (a `rank_pattern` makes them differ); 0 without any."""
    return max((matrix.shape[0] for matrix in _a_matrices(adapter)), default=0)


def _a_matrices(adapter: Any) -> Iterator[torch.Tensor]:
    """Every A of a `LoRAModel`, (rank, h); packed layers hold a list with None for what is not targeted."""
    for layer in adapter.loras.values():
        parts = layer.lora_a if isinstance(layer.lora_a, list) else [layer.lora_a]
        yield from (part for part in parts if part is not None)
