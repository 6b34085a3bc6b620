"""What vLLM's workers answer about themselves (`--worker-extension-cls loradock_serve.inside.worker.LoradockWorker`).

vLLM mixes the class into its own worker class; the API server reaches its methods by `collective_rpc`. Names of
adapters are the API server's business: here they are integers. Private touches: `worker.model_runner.lora_manager` and,
of its `_adapter_manager`, `modules`, `lora_index_to_id` and `list_adapters`.
"""

from typing import Any

from loradock_serve.inside.plugin import CORRECTED_WRAPPER


class LoradockWorker:
    """Mixed into vLLM's worker; every method has our prefix, since names must not collide with vLLM's."""

    model_runner: Any
    device: Any

    def loradock_status(self) -> dict[str, Any]:
        """The wrapper that the layers really use, and what lies in its slots and in the cache (adapter ids)."""
        lora_manager = getattr(self.model_runner, "lora_manager", None)
        status: dict[str, Any] = {"device": str(self.device), "wrappers": [], "active": [], "loaded": []}
        if lora_manager is None:
            return status
        manager = lora_manager._adapter_manager
        wrappers = {type(layer.punica_wrapper) for layer in manager.modules.values()}
        status["wrappers"] = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in wrappers)
        status["active"] = list(manager.lora_index_to_id)
        status["loaded"] = sorted(manager.list_adapters())
        return status


def is_corrected(status: dict[str, Any]) -> bool:
    """Whether this worker answers rows without an adapter from the base. Only stock vLLM on CPU does not."""
    return not status["device"].startswith("cpu") or set(status["wrappers"]) <= {CORRECTED_WRAPPER}
