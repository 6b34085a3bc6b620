"""What a forward pass keeps for its backward pass, counted and not estimated: the pass is run on torch's meta device,
where tensors have shapes and no contents, and autograd is asked for every tensor that it saves.

So it holds for every architecture, with adapters, dropout and frozen layers. Attention stands for one of the fused
kernels, which keep queries, keys, values and the output, and no matrix of scores (`eager` keeps three of them).
Legend: B rows, T tokens, H heads, W width of a head.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loradock_train.model import inner_model

_ATTENTION = "loradock_counted"
SCORES_KEPT = 3
"""Matrices of B x H x T x T that plain attention keeps: scores, their softmax, and after dropout."""


@dataclass(frozen=True)
class Activations:
    """Of one forward pass through the layers, without the head."""

    kept_bytes: int
    """Kept until the backward pass."""
    largest_bytes: int
    """The largest tensor among them: a backward step holds about two of its size besides."""
    hidden_bytes: int
    """What goes from layer to layer."""
    layers: int


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("only counted, never trained")


def _counted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query: B, H, T, W. Returns B, T, H, W."""
    out: Tensor = cast(Any, _Fused).apply(query, key, value)
    return out.transpose(1, 2), None


def count_activations(model: Any, batch_size: int, num_tokens: int) -> Activations | None:
    """Of a model on the meta device; it is left in training mode and cannot be run otherwise afterwards.

    None where its architecture cannot be run without contents (its forward looks at them): then nothing is claimed.
    """
    inner = inner_model(model)
    is_eager = inner.config._attn_implementation == "eager"
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, cast(Any, _counted_attention))
    model.train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in weights:
            kept.setdefault(place, tensor)
        return tensor

    ids = torch.zeros((batch_size, num_tokens), dtype=torch.long, device="meta")  # B, T
    mask = torch.zeros((batch_size, 1, num_tokens, num_tokens), dtype=torch.bool, device="meta")  # B, 1, T, T
    try:
        inner.set_attn_implementation(_ATTENTION)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = cast(Any, inner).get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None
    text = inner.config.get_text_config()
    layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    scores_bytes = batch_size * heads * num_tokens**2 * hidden.element_size() if is_eager else 0
    return Activations(
        kept_bytes=sum(sizes) + layers * SCORES_KEPT * scores_bytes,
        largest_bytes=max([*sizes, scores_bytes]),
        hidden_bytes=hidden.numel() * hidden.element_size(),
        layers=layers,
    )
