"""vLLM's own managers of adapters, with their real caches and no model: adapters without matrices, read from nowhere.

For tests of what hangs on vLLM's bookkeeping of slots and host memory. Imports vLLM.
"""

from types import SimpleNamespace
from typing import Any

from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager


class BareManager(LRUCacheLoRAModelManager):
    """Slots and host memory; no layers."""

    def __init__(self, slots: int, cached: int) -> None:
        config: Any = SimpleNamespace(max_loras=slots, max_cpu_loras=cached)
        self.lora_config = config
        self.modules = {}
        self.punica_wrapper_mapping = {}  # for slot_watch.py, which other tests hook into vLLM
        self.lora_index_to_id = [None] * slots
        self._registered_adapters = AdapterLRUCache(cached, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(slots, self._deactivate_adapter)

    def _add_adapter(self, lora: Any) -> None:
        self._registered_adapters[lora.id] = lora


class BareWorkerManager(LRUCacheWorkerLoRAManager):
    """What the model runner asks; `batch` is one step's `set_active_adapters`."""

    def __init__(self, slots: int, cached: int) -> None:
        self._adapter_manager = BareManager(slots, cached)
        self.read: list[int] = []

    def _load_adapter(self, lora_request: Any) -> Any:
        self.read.append(lora_request.lora_int_id)
        return SimpleNamespace(id=lora_request.lora_int_id, loras={})

    def batch(self, *adapters: int) -> list[int]:
        """Run a step with these adapters; the slot of each. ValueError where one has none, as in vLLM's step."""
        self._apply_adapters({request(number) for number in adapters})
        return [self._adapter_manager.lora_index_to_id.index(number) for number in adapters]

    @property
    def slots(self) -> list[int | None]:
        return self._adapter_manager.lora_index_to_id


def request(number: int) -> Any:
    """A `LoRARequest`, as far as the managers look at one."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=str(number), lora_int_id=number, lora_path="/nowhere")
