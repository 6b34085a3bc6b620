"""The gate's verdict on adapters of the tiny LLAMA base, for tests that change one thing about them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loradock_adapters.base import BaseModel, base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.gate import EngineLimits, Verdict, judge
from loradock_testing.checkpoints import LLAMA, Tensor, lora_tensors

BASE = base_from(LLAMA, model_id="somewhere/base")


Q0 = "model.layers.0.self_attn.q_proj"


def verdict_of(directory: Path, base: BaseModel | None = BASE, max_lora_rank: int = 64) -> Verdict:
    return judge(read_checkpoint(directory), base, EngineLimits(max_lora_rank))


def codes(verdict: Verdict) -> list[str]:
    assert all(str(reason).isprintable() and reason.message for reason in verdict.reasons)
    return [reason.code for reason in verdict.reasons]


def with_tensors(changes: Mapping[str, Tensor | None], **settings: Any) -> dict[str, Tensor]:
    """The right tensors with some added, replaced, or (None) left out."""
    tensors: dict[str, Tensor | None] = {**lora_tensors(**settings), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
