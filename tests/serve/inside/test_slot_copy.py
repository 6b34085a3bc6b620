"""Slots filled our way hold what vLLM's own way leaves in them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA

from loradock_serve.inside.slot_copy import copy_into_slots

SLOTS, RANK, WIDTH, OUTS = 3, 8, 16, (12, 6)


def layer(kind: Any, slices: int, *, by_rank: bool, tp_size: int = 1) -> Any:
    """A layer of vLLM's without a model, whose slots are full of something already."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    generator = torch.Generator().manual_seed(2)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH, generator=generator) for _ in range(slices))
    b = tuple(torch.randn(SLOTS, 1, out, RANK, generator=generator) for out in OUTS[:slices])
    if by_rank:
        b = tuple(stack.transpose(2, 3).contiguous().transpose(2, 3) for stack in b)
    made.lora_a_stacked, made.lora_b_stacked, made.n_slices, made.tp_size = a, b, slices, tp_size
    return made


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("rank", [RANK, 3])
@pytest.mark.parametrize("absent", [None, 0, 1])
def test_slot_holds_the_same_as_by_the_stock_way(by_rank: bool, rank: int, absent: int | None) -> None:
    a: list[torch.Tensor | None] = [torch.randn(rank, WIDTH) for _ in OUTS]
    b: list[torch.Tensor | None] = [torch.randn(rank, out).T for out in OUTS]
    if absent is not None:
        a[absent] = b[absent] = None
    stock, ours = (layer(MergedColumnParallelLinearWithLoRA, 2, by_rank=by_rank) for _ in range(2))

    assert copy_into_slots(SimpleNamespace(modules={"m": ours})) == 1
    for one in (stock, ours):
        one.set_lora(1, a, b)

    for expected, found in zip(
        (*stock.lora_a_stacked, *stock.lora_b_stacked), (*ours.lora_a_stacked, *ours.lora_b_stacked), strict=True
    ):
        assert torch.equal(found, expected)


def test_slot_of_a_single_layer_holds_the_same_even_where_the_matrices_are_smaller() -> None:
    a, b = torch.randn(4, WIDTH - 1), torch.randn(OUTS[0] - 2, 4)
    stock, ours = (layer(BaseLinearLayerWithLoRA, 1, by_rank=True) for _ in range(2))

    assert copy_into_slots(SimpleNamespace(modules={"m": ours})) == 1
    for one in (stock, ours):
        one.set_lora(2, a, b)

    assert torch.equal(ours.lora_a_stacked[0], stock.lora_a_stacked[0])
    assert torch.equal(ours.lora_b_stacked[0], stock.lora_b_stacked[0])


def test_layers_of_other_kinds_and_shares_of_layers_are_left_to_vllm() -> None:
    class Another(BaseLinearLayerWithLoRA):
        def set_lora(self, *_: Any) -> None:
            raise NotImplementedError

    others = [layer(Another, 1, by_rank=False), layer(BaseLinearLayerWithLoRA, 1, by_rank=False, tp_size=2)]

    assert copy_into_slots(SimpleNamespace(modules=dict(enumerate(others)))) == 0
    assert not any("set_lora" in vars(other) for other in others)


def test_parts_that_vllm_has_to_split_first_go_its_way() -> None:
    ours = layer(MergedColumnParallelLinearWithLoRA, 2, by_rank=False)
    seen: list[int] = []
    ours.set_lora = lambda index, *_: seen.append(index)
    copy_into_slots(SimpleNamespace(modules={"m": ours}))

    ours.set_lora(1, [torch.zeros(2, WIDTH)], [torch.zeros(18, 2)])

    assert seen == [1]
