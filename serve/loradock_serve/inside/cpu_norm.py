"""Layer norms of CPU engines by vLLM's own compiled operators.

vLLM leaves them to PyTorch, counting on the compiler to fuse them; but an engine with LoRA on CPU is never compiled,
and runs each as a chain of small operators. The CPU build has the same functions compiled, two to eight times as fast,
and does not use them (measured: docs/decisions.md). `CustomOp.register_oot` is vLLM's public way to put another class
in an operator's place.

It knows nothing of adapters. Where an operator cannot take a tensor, vLLM's own way is taken.
"""

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm

from loradock_serve.inside.one_thread import on_one_thread

VECTOR = 16
"""The compiled operators take rows that are whole vectors of so many values."""


class CompiledRMSNorm(RMSNorm):
    """y = x / rms(x) * weight, of x plus its residual where there is one; sums in float32."""

    def forward_cpu(
        self,
        x: torch.Tensor,  # (n, h)
        residual: torch.Tensor | None = None,  # (n, h)
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm; with a residual both tensors are overwritten, as vLLM's callers expect."""
        if not self._takes(x) or (residual is not None and not self._takes(residual)):
            return self.forward_native(x, residual)
        if residual is None:
            out = torch.empty_like(x)
            on_one_thread(x.numel(), torch.ops._C.rms_norm, out, x, self.weight.data, self.variance_epsilon)
            return out
        add_and_norm = torch.ops._C.fused_add_rms_norm
        on_one_thread(x.numel(), add_and_norm, x, residual, self.weight.data, self.variance_epsilon)
        return x, residual

    def _takes(self, x: torch.Tensor) -> bool:
        return (
            self.has_weight
            and self.variance_size_override is None
            and x.dtype == self.weight.dtype
            and x.shape[-1] % VECTOR == 0
            and x.is_contiguous()
        )


def use_compiled_norm() -> None:
    """Put it in place, once per process; a norm that something else has replaced is left alone."""
    if RMSNorm.__name__ not in op_registry_oot:
        RMSNorm.register_oot(CompiledRMSNorm)
