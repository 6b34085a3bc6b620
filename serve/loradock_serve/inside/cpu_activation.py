"""Gated activations of CPU engines: vLLM's own, on one thread where a batch is small.

vLLM's compiled `silu_and_mul` is slower here than PyTorch's two operators (docs/decisions.md), so what is computed
stays as it is; only who computes it changes. Knows nothing of adapters.
"""

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

from loradock_serve.inside.one_thread import on_one_thread


class SmallSiluAndMul(SiluAndMul):
    """y = silu(x[:, :d]) * x[:, d:]."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:  # (n, 2 d) to (n, d)
        """vLLM's own."""
        out: torch.Tensor = on_one_thread(x.numel() // 2, super().forward_cpu, x)
        return out


class SmallGeluAndMul(GeluAndMul):
    """y = gelu(x[:, :d]) * x[:, d:]."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:  # (n, 2 d) to (n, d)
        """vLLM's own."""
        out: torch.Tensor = on_one_thread(x.numel() // 2, super().forward_cpu, x)
        return out


def use_small_activations() -> None:
    """Put them in place, once per process; what something else has replaced is left alone."""
    for plain, small in ((SiluAndMul, SmallSiluAndMul), (GeluAndMul, SmallGeluAndMul)):
        if plain.__name__ not in op_registry_oot:
            plain.register_oot(small)
