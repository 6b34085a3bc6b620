"""The compiled kernel against plain float64 products: every format, ranks that do not fill a block, wide outputs, one
thread and several."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loradock_serve.inside import row_kernel
from loradock_serve.inside.row_plan import RowPlan
from loradock_serve.inside.slot_weights import SlotNews, SlotWeights

SLOTS = 5
STOCK_OPENMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
OPENMP_OF_A_LAYER = """
import ctypes
from loradock_serve.inside import row_kernel

address = ctypes.cast(row_kernel._parallel, ctypes.c_void_p).value
with open("/proc/self/maps") as maps:
    for line in maps:
        begin, end = (int(number, 16) for number in line.split(" ")[0].split("-"))
        if begin <= address < end:
            print(line.split()[-1])
"""
FORMATS = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def layer(
    dtype: torch.dtype, hidden: int, widths: tuple[int, ...], max_rank: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Stacks of A (S, 1, R, h) and B (S, 1, o, R)."""
    generator = torch.Generator().manual_seed(hidden + max_rank)
    a = tuple(torch.randn(SLOTS, 1, max_rank, hidden, generator=generator).to(dtype) for _ in widths)
    b = tuple(torch.randn(SLOTS, 1, width, max_rank, generator=generator).to(dtype) for width in widths)
    return a, b


def expected(
    x: torch.Tensor,
    y: torch.Tensor,
    slots: list[int],
    ranks: list[int],
    a: tuple[torch.Tensor, ...],
    b: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    result = y.double().clone()
    for row, slot in enumerate(slots):
        start = 0
        for a_stack, b_stack in zip(a, b, strict=True):
            width = b_stack.shape[2]
            if slot >= 0:
                low = a_stack[slot, 0, : ranks[slot]].double() @ x[row].double()
                result[row, start : start + width] += b_stack[slot, 0, :, : ranks[slot]].double() @ low
            start += width
    return result


def worst(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_wide_layer_of_odd_ranks_equals_plain_products(dtype: torch.dtype, threads: int) -> None:
    """Widths over and beside the kernel's chunk, and enough work for several threads to take part."""
    widths, ranks = (row_kernel.CHUNK + 37, 2 * row_kernel.CHUNK, 5), [1, 7, 32, 3, 16]
    a, b = layer(dtype, 130, widths, 32)
    slots = [row * 3 % (SLOTS + 1) - 1 for row in range(90)]
    x, y = torch.randn(90, 130).to(dtype), torch.randn(90, sum(widths)).to(dtype)
    wanted = expected(x, y, slots, ranks, a, b)
    news, plan = SlotNews(), RowPlan.of(np.asarray(slots))
    for slot, rank in enumerate(ranks):
        news.tell(slot, rank)
    assert sum(ranks[slot] for slot in slots if slot >= 0) * (3 * 130 + sum(widths)) > row_kernel.ALONE_BELOW

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        SlotWeights(a, b, widths).add(plan, y, x, 1.0, news)
    finally:
        torch.set_num_threads(before)

    assert worst(y, wanted) < FORMATS[dtype]


@settings(max_examples=60)
@given(
    slots=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=40),
    ranks=st.lists(st.integers(0, 9), min_size=SLOTS, max_size=SLOTS),
    hidden=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_any_batch_equals_plain_products(slots: list[int], ranks: list[int], hidden: int, width: int) -> None:
    a, b = layer(torch.float32, hidden, (width, 3), 9)
    x, y = torch.randn(len(slots), hidden), torch.randn(len(slots), width + 3)
    wanted = expected(x, y, slots, ranks, a, b)
    news = SlotNews()
    for slot, rank in enumerate(ranks):
        news.tell(slot, rank)

    SlotWeights(a, b, (width, 3)).add(RowPlan.of(np.asarray(slots, dtype=np.int64)), y, x, 1.0, news)

    assert worst(y, wanted) < 1e-5


def test_stacks_keep_shape_and_contents_when_their_memory_is_laid_out() -> None:
    (a,), (b,) = layer(torch.float32, 8, (6,), 4)
    before = b.clone()

    SlotWeights((a,), (b,), (6,))
    assert torch.equal(b, before)
    b[2, 0, :, 1].fill_(7.0)  # as vLLM writes a slot

    assert torch.equal(b[2, 0, :, 1], torch.full((6,), 7.0))
    assert torch.equal(b[1], before[1])
    assert b.stride()[2:] == (1, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_to_16_bits_as_torch_rounds(dtype: torch.dtype) -> None:
    """A times B is 1 x value: what arrives in y is the value, converted once."""
    values = torch.tensor([1.00390625, 1.01171875, -3.1415926, 6e-5, 65000.0, float("inf"), float("nan")])
    a, b = torch.ones(1, 1, 1, 1), values.view(1, 1, -1, 1).clone()
    y = torch.zeros(1, len(values), dtype=dtype)

    SlotWeights((a,), (b,), (len(values),)).add(
        RowPlan.of(np.zeros(1, dtype=np.int64)), y, torch.ones(1, 1, dtype=dtype), 1.0, SlotNews()
    )

    assert torch.equal(y[0].nan_to_num(-1.0), values.to(dtype).nan_to_num(-1.0))


@pytest.mark.parametrize(("rows", "width"), [(3, 6), (2, 5)])
def test_tensors_that_do_not_fit_the_layer_are_refused(rows: int, width: int) -> None:
    a, b = layer(torch.float32, 8, (6,), 4)
    weights = SlotWeights(a, b, (6,))

    with pytest.raises(ValueError, match="adapters of shape 8 -> 6"):
        weights.add(
            RowPlan.of(np.zeros(2, dtype=np.int64)), torch.zeros(rows, width), torch.zeros(2, 8), 1.0, SlotNews()
        )


def test_input_with_strides_is_read_as_it_is_indexed() -> None:
    a, b = layer(torch.float32, 8, (6,), 4)
    x = torch.randn(8, 3).t()
    y = torch.zeros(3, 6)
    wanted = expected(x, y, [1, 0, 1], [4] * SLOTS, a, b)

    SlotWeights(a, b, (6,)).add(RowPlan.of(np.asarray([1, 0, 1])), y, x, 1.0, SlotNews())

    assert worst(y, wanted) < 1e-5


@pytest.mark.skipif(not STOCK_OPENMP.exists(), reason="this build of PyTorch has its OpenMP runtime elsewhere")
def test_threads_are_those_of_the_runtime_that_was_preloaded_whatever_its_name(tmp_path: Path) -> None:
    """vLLM preloads PyTorch's own, which some builds call otherwise; another runtime's threads would not be bound."""
    renamed = tmp_path / "libgomp-b.so"
    renamed.write_bytes(STOCK_OPENMP.read_bytes().replace(b"libgomp.so.1", b"libgomp-b.so"))

    done = subprocess.run(
        [sys.executable, "-c", OPENMP_OF_A_LAYER],
        env=os.environ | {"LD_PRELOAD": str(renamed)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == [str(renamed)]
