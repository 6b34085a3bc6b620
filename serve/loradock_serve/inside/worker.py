"""What vLLM's workers answer and do for us (`--worker-extension-cls loradock_serve.inside.worker.LoradockWorker`).

vLLM mixes the class into its own worker class; the API server reaches its methods by `collective_rpc`, between two
steps of the engine: none may take long. Names of adapters are the API server's business: here they are integers.
Private touches: `worker.model_runner.lora_manager` and, of its `_adapter_manager`, `modules` (and their
`lora_a_stacked`, `lora_b_stacked`), `lora_slots`, `lora_index_to_id` and `list_adapters`; those of `staging.py`,
`slot_copy.py`, `adapter_counts.py`, `warm_steps.py` and `slot_pins.py` are named there.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from loradock_serve.inside.adapter_counts import AdapterCounts
from loradock_serve.inside.plugin import CORRECTED_WRAPPER
from loradock_serve.inside.slot_copy import copy_into_slots
from loradock_serve.inside.slot_pins import Answer, SlotPins
from loradock_serve.inside.staging import Staging
from loradock_serve.inside.warm_steps import spare_warm_steps


@dataclass(frozen=True)
class Books:
    """What is kept of one worker's adapters from the first status on."""

    counts: AdapterCounts
    pins: SlotPins
    staging: Staging
    slot_bytes: int
    """Memory of one slot of this worker, as vLLM has allocated it."""


class LoradockWorker:
    """Mixed into vLLM's worker; every method has our prefix, since names must not collide with vLLM's."""

    model_runner: Any
    device: Any
    loradock_books: Books | None = None

    def loradock_status(self) -> dict[str, Any]:
        """The wrapper that the layers really use, and what lies in its slots and in the cache (adapter ids)."""
        lora_manager = getattr(self.model_runner, "lora_manager", None)
        status: dict[str, Any] = {
            "device": str(self.device),
            "wrappers": [],
            "active": [],
            "loaded": [],
            "staged": [],
        }
        if lora_manager is None:
            return status
        manager = lora_manager._adapter_manager
        wrappers = {type(layer.punica_wrapper) for layer in manager.modules.values()}
        status["wrappers"] = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in wrappers)
        status["active"] = list(manager.lora_index_to_id)
        status["loaded"] = sorted(manager.list_adapters())
        books = self.loradock_open_books()
        status["staged"] = sorted(set(books.staging.held()) - set(status["loaded"]))
        status["pinned"] = books.pins.pinned
        status["counts"] = asdict(books.counts.total)
        status["adapters"] = books.counts.to_json()
        status["slot_bytes"] = books.slot_bytes
        return status

    def loradock_stage(self, adapter_id: int, name: str, path: str, packed: str | None) -> None:
        """Begin to read an adapter on a thread."""
        from vllm.lora.request import LoRARequest

        self.loradock_open_books().staging.begin(LoRARequest(name, adapter_id, path), packed)

    def loradock_staged(self, adapter_ids: list[int]) -> list[tuple[str, str]]:
        """The state of each, and what was wrong with those that failed."""
        staging = self.loradock_open_books().staging
        return [staging.look(adapter_id) for adapter_id in adapter_ids]

    def loradock_unstage(self, adapter_id: int) -> bool:
        """Forget what was read of an adapter; whether it was at hand."""
        return self.loradock_open_books().staging.drop(adapter_id)

    def loradock_pin(self, adapter_id: int) -> Answer:
        """Keep an adapter in a slot."""
        return self.loradock_open_books().pins.pin(adapter_id)

    def loradock_unpin(self, adapter_id: int) -> bool:
        """Let an adapter go again; False if it was not pinned."""
        return self.loradock_open_books().pins.unpin(adapter_id)

    def loradock_open_books(self) -> Books:
        """The books, opened when somebody first asks: the worker has no LoRA manager before its model is loaded."""
        if self.loradock_books is None:
            lora_manager = self.model_runner.lora_manager
            manager = lora_manager._adapter_manager
            copy_into_slots(manager)
            spare_warm_steps(lora_manager)
            self.loradock_books = Books(
                AdapterCounts(manager), SlotPins(lora_manager), Staging(lora_manager), _slot_bytes(manager)
            )
        return self.loradock_books


def is_corrected(status: dict[str, Any]) -> bool:
    """Whether this worker answers rows without an adapter from the base. Only stock vLLM on CPU does not."""
    return not status["device"].startswith("cpu") or set(status["wrappers"]) <= {CORRECTED_WRAPPER}


def _slot_bytes(manager: Any) -> int:
    """Bytes of all stacks of all layers, each of which holds every slot."""
    total_bytes: int = sum(stack.nbytes for layer in manager.modules.values() for stack in _stacks(layer))
    slots: int = manager.lora_slots
    return total_bytes // slots


def _stacks(layer: Any) -> Iterator[Any]:
    """A layer's stacked matrices: one tensor, or for packed layers one for each part."""
    for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
        yield from stacked if isinstance(stacked, tuple | list) else (stacked,)
