"""Loaded by every process of every vLLM in this environment (entry point group `vllm.general_plugins`).

On CPU it makes vLLM use the corrected LoRA wrapper, compiled layer norms, and one thread for small operators; on any
other platform it changes nothing.
vLLM resolves the wrapper by name, and only when a model is loaded with LoRA. The touches are
`Platform.get_punica_wrapper` of the platform in use, which vLLM itself asks for a dotted name, and the one named in
`cpu_slot_mapping.py`.
"""

from typing import Any

STOCK_WRAPPER = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
"""What vLLM's CPU platform names. Anything else (another platform plug-in) is left alone."""
CORRECTED_WRAPPER = "loradock_serve.inside.cpu_lora.CorrectedPunicaWrapperCPU"
SMALL_WRITES_BACKEND = "loradock_serve.inside.cpu_attention.SmallWritesBackend"


def register() -> None:
    """Install the corrected wrapper on CPU. May be called any number of times."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if not current_platform.is_cpu() or platform.get_punica_wrapper() != STOCK_WRAPPER:
        return

    def get_punica_wrapper(cls: type[Any]) -> str:
        return CORRECTED_WRAPPER

    platform.get_punica_wrapper = classmethod(get_punica_wrapper)  # type: ignore[method-assign, assignment]

    from loradock_serve.inside.cpu_activation import use_small_activations
    from loradock_serve.inside.cpu_norm import use_compiled_norm
    from loradock_serve.inside.cpu_rotary import use_small_rotary_embeddings
    from loradock_serve.inside.cpu_slot_mapping import use_small_slot_mapping

    use_compiled_norm()
    use_small_activations()
    use_small_rotary_embeddings()
    use_small_slot_mapping()
    _use_small_cache_writes()


def _use_small_cache_writes() -> None:
    """By name: the backend's own module is not ready to be imported while plug-ins are loaded."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    backend = AttentionBackendEnum.CPU_ATTN
    if not backend.is_overridden():
        register_backend(backend, SMALL_WRITES_BACKEND)
