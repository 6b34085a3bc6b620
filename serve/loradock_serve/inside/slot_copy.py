"""Writes an adapter into a slot on CPU without zeroing first what is written over next.

vLLM's `set_lora` zeroes the whole slot, of `max_lora_rank`, and then copies the adapter over it, in the step, while
everyone waits. This one copies, and zeroes what the adapter does not fill: the slot holds the same afterwards. The
touch: `set_lora` of the layers of one manager, on the instances, where it is one of the two that `_is_known` names,
with `lora_a_stacked`, `lora_b_stacked` and `n_slices`. It does not know which slot is whose.
"""

from functools import partial
from typing import Any

import torch

Matrices = torch.Tensor | list[torch.Tensor | None]


def copy_into_slots(manager: Any) -> int:
    """Have the layers of a worker's manager written this way; how many are."""
    layers = [layer for layer in manager.modules.values() if _is_known(layer)]
    for layer in layers:
        layer.set_lora = partial(set_lora, layer, layer.set_lora)
    return len(layers)


def _is_known(layer: Any) -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA

    known = (BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora)
    return (
        type(layer).set_lora in known
        and layer.tp_size == 1
        and all(stack.device.type == "cpu" for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked))
    )


def set_lora(layer: Any, stock: Any, index: int, lora_a: Matrices, lora_b: Matrices) -> None:
    """As the stock `set_lora` of the layer: its slot `index` holds these A's (r, h) and B's (o, r), and else zeros."""
    all_a, all_b = (matrices if isinstance(matrices, list) else [matrices] for matrices in (lora_a, lora_b))
    if not len(all_a) == len(all_b) == layer.n_slices:
        stock(index, lora_a, lora_b)
        return
    for stacks, matrices in ((layer.lora_a_stacked, all_a), (layer.lora_b_stacked, all_b)):
        for stack, matrix in zip(stacks, matrices, strict=True):
            _fill(stack[index, 0], matrix)


def _fill(place: torch.Tensor, matrix: torch.Tensor | None) -> None:
    rows, columns = (0, 0) if matrix is None else matrix.shape
    if matrix is not None:
        place[:rows, :columns].copy_(matrix)
    if columns < place.shape[1]:
        place[:rows, columns:].zero_()
    if rows < place.shape[0]:
        place[rows:].zero_()
