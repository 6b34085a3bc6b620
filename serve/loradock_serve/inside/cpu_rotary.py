"""Rotary embeddings of CPU engines: vLLM's own, on one thread where a batch is small. Knows nothing of adapters."""

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

from loradock_serve.inside.one_thread import on_one_thread

Turned = tuple[torch.Tensor, torch.Tensor | None]


class SmallRotaryEmbedding(RotaryEmbedding):
    """Query and key turned by their positions."""

    def forward_cpu(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Turned:
        """vLLM's own."""
        turned: Turned = on_one_thread(query.numel(), super().forward_cpu, positions, query, key)
        return turned


class SmallLlama3RotaryEmbedding(Llama3RotaryEmbedding):
    """The same with the frequencies of Llama 3."""

    def forward_cpu(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Turned:
        """vLLM's own."""
        turned: Turned = on_one_thread(query.numel(), super().forward_cpu, positions, query, key)
        return turned


def use_small_rotary_embeddings() -> None:
    """Put them in place, once per process; what something else has replaced is left alone."""
    for plain, small in (
        (RotaryEmbedding, SmallRotaryEmbedding),
        (Llama3RotaryEmbedding, SmallLlama3RotaryEmbedding),
    ):
        if plain.__name__ not in op_registry_oot:
            plain.register_oot(small)
