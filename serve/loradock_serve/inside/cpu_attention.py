"""vLLM's attention backend of CPUs, whose write into the cache runs on one thread where a batch is small.

The attention itself stays on all threads: its plan of work is made for their number. `register_backend` is vLLM's
public way to put another class in a backend's place. Knows nothing of adapters.
"""

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from loradock_serve.inside.one_thread import on_one_thread


class SmallWrites(CPUAttentionBackendImpl):
    """Attention, and before it the write of the step's keys and values into the cache."""

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **named: Any
    ) -> None:
        """vLLM's own."""
        write = super().do_kv_cache_update
        on_one_thread(key.numel() + value.numel(), lambda: write(layer, key, value, *arguments, **named))


class SmallWritesBackend(CPUAttentionBackend):
    """The backend that gives attention layers the class above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Of an attention layer."""
        return SmallWrites
