"""Which tokens an adapter on embeddings alone can change."""

import struct
from pathlib import Path

import pytest

from loradock_adapters.touched import touched_tokens
from loradock_testing.checkpoints import PREFIX, Tensor, f32, write_adapter, zeros

NAME = f"{PREFIX}model.embed_tokens.lora_embedding_"


def factor(values: list[list[float]]) -> Tensor:
    flat = [value for row in values for value in row]
    return "F32", (len(values), len(values[0])), struct.pack(f"<{len(flat)}f", *flat)


def test_tokens_of_a_column_that_is_not_zero_are_touched(tmp_path: Path) -> None:
    tensors = {f"{NAME}A": factor([[0.0, 1.0, 0.0, -0.0], [0.0, 0.0, 0.0, 2.0]]), f"{NAME}B": f32(16, 2)}
    assert touched_tokens(write_adapter(tmp_path, tensors, targets=("embed_tokens",))) == [1, 3]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_read_as_well(tmp_path: Path, dtype: str) -> None:
    raw = bytearray(zeros(dtype, 1, 4)[2])
    raw[5] = 0x3C  # the third value, about one
    raw[1] = 0x80  # the first, a negative zero
    tensors: dict[str, Tensor] = {f"{NAME}A": (dtype, (1, 4), bytes(raw)), f"{NAME}B": zeros(dtype, 16, 1)}
    assert touched_tokens(write_adapter(tmp_path, tensors)) == [2]


def test_any_prompt_will_do_where_other_modules_are_adapted_or_nothing_can_be_read(tmp_path: Path) -> None:
    assert touched_tokens(write_adapter(tmp_path / "linear")) is None
    both = {f"{NAME}A": f32(4, 40), f"{NAME}B": f32(16, 4), f"{PREFIX}lm_head.lora_A.weight": f32(4, 16)}
    assert touched_tokens(write_adapter(tmp_path / "both", both)) is None
    assert touched_tokens(tmp_path / "absent") is None
