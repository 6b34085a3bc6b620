"""The corrected wrapper against a naive reference that treats every row by itself, in float64."""

import random
from collections.abc import Sequence

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from loradock_serve.inside.cpu_lora import AdapterRowsError, CorrectedPunicaWrapperCPU

HIDDEN, MAX_RANK, SLOTS, VOCABULARY = 48, 8, 16, 60
QKV, GATE_UP, ONE = (32, 16, 16), (40, 40), (24,)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
FAR_APART = [1, 0, 6, 11, 16]
"""Slots that make a bundle pick its weights, if they are not shuffled."""
MIXTURES = {
    "nothing": [0] * 9,
    "one adapter": [3] * 9,
    "one adapter and the base": [0, 3, 3, 0, 0, 3, 0],
    "base and last slot": [0, SLOTS, 0, SLOTS],
    "prompts one after another": [2] * 12 + [0] * 5 + [7] * 9 + [2] * 3,
    "two interleaved": [1, 5] * 10,
    "one row each": list(range(1, SLOTS + 1)),
    "many interleaved": [i * 7 % (SLOTS + 1) for i in range(50)],
    "many and a long prompt": [0, 1, 2, 3, 4, 5, 6, 7, 8] + [9] * 40,
    "few slots far apart": [1, 1, SLOTS, SLOTS, 1, 0],
    "single row": [4],
    "single rows of slots far apart": FAR_APART,
}
RANKS = {"full": [MAX_RANK], "own": [1, 8, 3, 5], "untold": None}


def wrapper_with(
    ids: Sequence[int], ranks: Sequence[int] | None, slot_to_id: Sequence[int | None], requests: Sequence[int] = (1,)
) -> CorrectedPunicaWrapperCPU:
    """A wrapper told of the batch; adapter ids are 1 to SLOTS, in the slots given."""
    wrapper = CorrectedPunicaWrapperCPU(512, 64, "cpu")
    for slot in range(SLOTS if ranks else 0):
        assert ranks
        wrapper.slot_written(slot, ranks[slot % len(ranks)])
    mapping = LoRAMapping(tuple(ids), tuple(requests), is_prefill=True)
    wrapper.update_metadata(mapping, list(slot_to_id), SLOTS + 1, VOCABULARY)
    return wrapper


def weights(
    outputs: Sequence[int], dtype: torch.dtype, ranks: Sequence[int] | None, hidden: int = HIDDEN
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Stacked A (S, 1, R, h) and B (S, 1, o, R) for each slice, zero beyond the slot's rank."""
    generator = torch.Generator().manual_seed(1)
    a = tuple(torch.randn(SLOTS, 1, MAX_RANK, hidden, generator=generator).to(dtype) for _ in outputs)
    b = tuple(torch.randn(SLOTS, 1, width, MAX_RANK, generator=generator).to(dtype) for width in outputs)
    for slot in range(SLOTS):
        rank = (ranks or [6])[slot % len(ranks or [6])]
        for i in range(len(outputs)):
            a[i][slot, :, rank:] = 0
            b[i][slot, :, :, rank:] = 0
    return a, b


def slots_in(ids: Sequence[int], slot_to_id: Sequence[int | None]) -> list[int | None]:
    return [slot_to_id.index(adapter_id) if adapter_id else None for adapter_id in ids]


def shuffled_slots() -> list[int | None]:
    order: list[int | None] = list(range(1, SLOTS + 1))
    random.Random(3).shuffle(order)
    return order


def naive(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: Sequence[int | None],
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    outputs: Sequence[int],
) -> torch.Tensor:
    """Row by row, slice by slice, in float64."""
    result = y.double().clone()
    for row, slot in enumerate(slots):
        start = 0
        for a_slice, b_slice, width in zip(a, b, outputs, strict=True):
            if slot is not None:
                shrunk = a_slice[slot, 0].double() @ x[row].double()
                result[row, start : start + width] += b_slice[slot, 0].double() @ shrunk
            start += width
    return result


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp_min(1.0)
    assert float((got.double() - expected).abs().max() / scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("outputs", [QKV, GATE_UP, ONE], ids=["qkv", "gate_up", "one"])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_linear_equals_naive(
    mixture: list[int], outputs: tuple[int, ...], ranks: list[int] | None, dtype: torch.dtype
) -> None:
    slot_to_id = shuffled_slots() if mixture != FAR_APART else list(range(1, SLOTS + 1))
    a, b = weights(outputs, dtype, ranks)
    x, y = torch.randn(len(mixture), HIDDEN).to(dtype), torch.randn(len(mixture), sum(outputs)).to(dtype)
    before = y.clone()

    wrapper_with(mixture, ranks, slot_to_id).add_lora_linear(y, x, a, b, 1.0, outputs)

    assert_close(y, naive(before, x, slots_in(mixture, slot_to_id), a, b, outputs), dtype)
    base_rows = [row for row, adapter_id in enumerate(mixture) if not adapter_id]
    assert torch.equal(y[base_rows], before[base_rows])


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_sharded_shrink_and_expand_equal_naive(mixture: list[int], ranks: list[int] | None) -> None:
    slot_to_id = shuffled_slots()
    a, b = weights(QKV, torch.float32, ranks)
    x, y = torch.randn(len(mixture), HIDDEN), torch.randn(len(mixture), sum(QKV))
    expected = naive(y, x, slots_in(mixture, slot_to_id), a, b, QKV)
    wrapper = wrapper_with(mixture, ranks, slot_to_id)
    buffers = torch.zeros(len(QKV), len(mixture), MAX_RANK)

    wrapper.add_shrink(buffers, x, a, 1.0)
    wrapper.add_expand(y, buffers, b, QKV)

    assert_close(y, expected, torch.float32)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_embedding_equals_naive(mixture: list[int], ranks: list[int] | None) -> None:
    slot_to_id = shuffled_slots()
    (a,), (b,) = weights(ONE, torch.float32, ranks, hidden=VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (len(mixture),))
    y = torch.randn(len(mixture), *ONE)
    one_hot = torch.nn.functional.one_hot(tokens, VOCABULARY).float()
    expected = naive(y, one_hot, slots_in(mixture, slot_to_id), (a,), (b,), ONE)
    wrapper = wrapper_with(mixture, ranks, slot_to_id)
    table = a[:, 0].transpose(1, 2).reshape(SLOTS * VOCABULARY, MAX_RANK)

    looked_up = table[tokens + wrapper._embeddings_indices[: len(mixture)]]  # as VocabParallelEmbeddingWithLoRA does
    wrapper.add_lora_embedding(y, looked_up, b, add_input=True)

    assert_close(y, expected, torch.float32)


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_sampled_rows_equal_naive(ranks: list[int] | None, logits_dtype: torch.dtype) -> None:
    slot_to_id = shuffled_slots()
    requests = [2, 0, 7, 0, SLOTS]
    tokens = [2, 2, 2, 0, 7, 7, 0, 0, SLOTS]
    (a,), (b,) = weights((VOCABULARY,), torch.bfloat16, ranks)
    hidden_states = torch.randn(len(tokens), HIDDEN).to(torch.bfloat16)
    x = hidden_states[torch.tensor([2, 3, 5, 7, 8])]
    y = torch.randn(len(requests), VOCABULARY + 4).to(logits_dtype)  # padded, as a sharded vocabulary is
    before = y.clone()
    wrapper = wrapper_with(tokens, ranks, slot_to_id, requests)

    wrapper.add_lora_logits(y, x, a, b, 1.0)

    expected = naive(before[:, :VOCABULARY], x, slots_in(requests, slot_to_id), (a,), (b,), (VOCABULARY,))
    assert_close(y[:, :VOCABULARY], expected, torch.bfloat16)
    assert torch.equal(y[:, VOCABULARY:], before[:, VOCABULARY:])
    assert torch.equal(y[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize(
    ("start", "end", "adapter_id"), [(0, 5, 2), (0, 1, 2), (5, 8, 0), (8, 12, 7), (9, 12, 7), (12, 13, SLOTS)]
)
def test_logits_of_one_requests_prompt_use_that_requests_adapter(start: int, end: int, adapter_id: int) -> None:
    """Slices as the model runner takes them; (5, 8) and (9, 12) even have as many rows as there are requests."""
    slot_to_id = shuffled_slots()
    tokens = [2] * 5 + [0] * 3 + [7] * 4 + [SLOTS]
    (a,), (b,) = weights((VOCABULARY,), torch.float32, [MAX_RANK])
    x = torch.randn(len(tokens), HIDDEN)[start:end]
    y = torch.zeros(end - start, VOCABULARY)
    requests = [2, 0, 7, SLOTS] if end - start != 3 else [2, 7, SLOTS]

    wrapper_with(tokens, None, slot_to_id, requests).add_lora_logits(y, x, a, b, 1.0)

    expected = naive(torch.zeros_like(y), x, slots_in([adapter_id] * len(x), slot_to_id), (a,), (b,), (VOCABULARY,))
    assert_close(y, expected, torch.float32)


def test_logits_of_a_lone_requests_prompt_use_its_adapter() -> None:
    (a,), (b,) = weights((VOCABULARY,), torch.float32, [MAX_RANK])
    x, y = torch.randn(7, HIDDEN), torch.zeros(7, VOCABULARY)

    wrapper_with([3] * 7, None, list(range(1, SLOTS + 1)), [3]).add_lora_logits(y, x, a, b, 1.0)

    assert_close(y, naive(torch.zeros_like(y), x, [2] * 7, (a,), (b,), (VOCABULARY,)), torch.float32)


def test_logits_of_rows_of_unknown_origin_are_refused() -> None:
    (a,), (b,) = weights((VOCABULARY,), torch.float32, [MAX_RANK])
    wrapper = wrapper_with([3, 0, 5], None, list(range(1, SLOTS + 1)), [3, 0, 5])

    with pytest.raises(AdapterRowsError, match="logits of 2 rows"):
        wrapper.add_lora_logits(torch.zeros(2, VOCABULARY), torch.randn(2, HIDDEN), a, b, 1.0)


def test_linear_with_padding_rows_leaves_them_alone() -> None:
    a, b = weights(ONE, torch.float32, [MAX_RANK])
    y = torch.zeros(6, *ONE)

    wrapper_with([3] * 4, None, list(range(1, SLOTS + 1))).add_lora_linear(y, torch.randn(6, HIDDEN), a, b, 1.0, ONE)

    assert y[:4].abs().min() > 0
    assert not y[4:].any()


def test_linear_with_fewer_rows_than_tokens_of_several_adapters_is_refused() -> None:
    a, b = weights(ONE, torch.float32, [MAX_RANK])
    wrapper = wrapper_with([3, 0, 5], None, list(range(1, SLOTS + 1)))

    with pytest.raises(AdapterRowsError, match="saw 2 rows of a step of 3 tokens"):
        wrapper.add_lora_linear(torch.zeros(2, *ONE), torch.randn(2, HIDDEN), a, b, 1.0, ONE)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_adapter_harms_only_its_own_rows(poison: float) -> None:
    ids = [0, *range(1, SLOTS + 1), 0, 3, 3]
    a, b = weights(QKV, torch.float32, [MAX_RANK])
    for stack in (*a, *b):
        stack[2] = poison  # adapter 3
    y = torch.zeros(len(ids), sum(QKV))

    wrapper_with(ids, [MAX_RANK], list(range(1, SLOTS + 1))).add_lora_linear(
        y, torch.randn(len(ids), HIDDEN), a, b, 1.0, QKV
    )

    healthy = [row for row, adapter_id in enumerate(ids) if adapter_id != 3]
    assert torch.isfinite(y[healthy]).all()


def test_slot_written_again_with_a_larger_rank_uses_the_new_weights() -> None:
    a, b = weights(ONE, torch.float32, [2])
    wrapper = wrapper_with([1] * 4, [2], list(range(1, SLOTS + 1)))
    x = torch.randn(4, HIDDEN)
    wrapper.add_lora_linear(torch.zeros(4, *ONE), x, a, b, 1.0, ONE)
    a[0][0].normal_()
    b[0][0].normal_()

    wrapper.slot_written(0, MAX_RANK)
    y = torch.zeros(4, *ONE)
    wrapper.add_lora_linear(y, x, a, b, 1.0, ONE)

    assert_close(y, naive(torch.zeros_like(y), x, [0] * 4, a, b, ONE), torch.float32)


def test_layer_left_alone_by_one_adapter_and_targeted_by_the_next_is_applied() -> None:
    a, b = weights(ONE, torch.float32, [MAX_RANK])
    a[0][0], b[0][0] = 0, 0
    wrapper = wrapper_with([1] * 4, [MAX_RANK], list(range(1, SLOTS + 1)))
    x, y = torch.randn(4, HIDDEN), torch.zeros(4, *ONE)
    wrapper.add_lora_linear(y, x, a, b, 1.0, ONE)
    assert not y.any()
    a[0][0].normal_()
    b[0][0].normal_()

    wrapper.slot_written(0, MAX_RANK)
    wrapper.add_lora_linear(y, x, a, b, 1.0, ONE)

    assert_close(y, naive(torch.zeros_like(y), x, [0] * 4, a, b, ONE), torch.float32)


def test_scale_multiplies_the_update() -> None:
    ids = MIXTURES["many interleaved"]
    a, b = weights(QKV, torch.float32, [MAX_RANK])
    x, y = torch.randn(len(ids), HIDDEN), torch.zeros(len(ids), sum(QKV))

    wrapper_with(ids, [MAX_RANK], list(range(1, SLOTS + 1))).add_lora_linear(y, x, a, b, 0.25, QKV)

    slots = slots_in(ids, list(range(1, SLOTS + 1)))
    assert_close(y, naive(torch.zeros_like(y), x, slots, a, b, QKV) * 0.25, torch.float32)


def test_adapter_in_no_slot_is_an_error_and_not_the_base() -> None:
    with pytest.raises(KeyError):
        wrapper_with([1, 2], None, [1, None, *range(3, SLOTS + 1)])


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_buffers_of_the_stock_class_are_as_stock_fills_them(mixture: list[int]) -> None:
    slot_to_id = shuffled_slots()
    mapping = LoRAMapping(tuple(mixture), tuple(mixture[::2]), is_prefill=True)
    stock, ours = PunicaWrapperCPU(512, 64, "cpu"), CorrectedPunicaWrapperCPU(512, 64, "cpu")

    for wrapper in (stock, ours):
        wrapper.update_metadata(mapping, slot_to_id, SLOTS + 1, VOCABULARY)

    assert ours.indices_len == stock.indices_len
    assert torch.equal(ours.token_lora_indices, stock.token_lora_indices)
    assert torch.equal(ours.sampler_indices, stock.sampler_indices)
    assert torch.equal(ours.sampler_indices_padded, stock.sampler_indices_padded)
    length = len(mixture)
    assert torch.equal(ours._embeddings_indices[:length], stock._embeddings_indices[:length])
    assert ours.no_lora == stock.no_lora


def test_stock_wrapper_still_answers_base_rows_with_the_last_slot() -> None:
    """Why all this exists. When it fails, vLLM has mended it: see whether ours is still worth having."""
    a, b = weights(ONE, torch.float32, [MAX_RANK])
    stock = PunicaWrapperCPU(512, 64, "cpu")
    mapping = LoRAMapping((1, 0), (1, 0), is_prefill=True)
    stock.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, VOCABULARY)
    x, y = torch.randn(2, HIDDEN), torch.zeros(2, *ONE)

    stock.add_lora_linear(y, x, a, b, 1.0, ONE)

    assert_close(y, naive(torch.zeros_like(y), x, [0, SLOTS - 1], a, b, ONE), torch.float32)
