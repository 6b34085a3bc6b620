"""Loaded by every process of every vLLM in this environment (entry point group `vllm.general_plugins`).

On CPU it makes vLLM use the corrected LoRA wrapper, compiled layer norms, and one thread for small norms and
activations; on any other platform it changes nothing.
vLLM resolves the wrapper by name, and only when a model is loaded with LoRA. The one touch is
`Platform.get_punica_wrapper` of the platform in use, which vLLM itself asks for a dotted name.
"""

from typing import Any

STOCK_WRAPPER = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
"""What vLLM's CPU platform names. Anything else (another platform plug-in) is left alone."""
CORRECTED_WRAPPER = "loradock_serve.inside.cpu_lora.CorrectedPunicaWrapperCPU"


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

    use_compiled_norm()
    use_small_activations()
