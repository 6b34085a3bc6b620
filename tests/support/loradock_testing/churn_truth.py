"""Judges thousands of greedy answers of hundreds of adapters by transformers alone, in float32, in seconds.

An adapter is added to the base's own matrices, all its answers go through one forward pass, each led along its own
tokens: at the first token that differs from the reference's best choice everything before it was the same, so this is
the reference's own greedy answer so far, and needs no step for each token. The rule is that of `tiny_models.Answer`:
wrong means that the reference's two best logits are further apart than GAP_LIMIT there. That it agrees with PEFT, and
with greedy decoding step by step, is tested in `test_churn_truth.py`. It knows nothing of servers.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loradock_testing.tiny_models import GAP_LIMIT

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Verdict:
    """What the reference says of one answer."""

    differs_at: int | None
    """The first token that is not the reference's; None where all are."""
    expected: int | None
    """The reference's token there."""
    gap: float
    """How far apart the reference's two best logits are there; 0 where nothing differs."""

    @property
    def is_wrong(self) -> bool:
        """Whether it differs, and not merely on the other side of a near tie."""
        return self.differs_at is not None and self.gap > GAP_LIMIT

    @property
    def is_near_tie(self) -> bool:
        """Whether it differs where the reference hardly preferred its own."""
        return self.differs_at is not None and self.gap <= GAP_LIMIT


class Truth:
    """A base, and what it answers with any adapter on it."""

    def __init__(self, base_dir: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        self._model = model.eval()

    @torch.inference_mode()
    def judge(
        self, adapter_dir: Path | None, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """A verdict for each prompt (token ids) and its answer (token ids); without an adapter of the base itself."""
        pairs = list(zip(prompts, answers, strict=True))
        with _one_thread(), self._wearing(adapter_dir):
            return [
                verdict
                for start in range(0, len(pairs), ROWS_AT_ONCE)
                for verdict in self._judge(pairs[start : start + ROWS_AT_ONCE])
            ]

    def _judge(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Verdict]:
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros((len(pairs), longest), dtype=torch.long)  # padding at the end: nobody attends to it
        for row, (prompt, answer) in enumerate(pairs):
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        best = self._model(input_ids=ids, use_cache=False).logits.topk(2)  # (rows, longest, 2)
        gaps, tokens = (best.values[..., 0] - best.values[..., 1]).tolist(), best.indices[..., 0].tolist()
        return [
            _verdict(answer, tokens[row][len(prompt) - 1 :], gaps[row][len(prompt) - 1 :])
            for row, (prompt, answer) in enumerate(pairs)
        ]

    @contextlib.contextmanager
    def _wearing(self, adapter_dir: Path | None) -> Iterator[None]:
        """The adapter merged into the model while the block lasts; the base's own bits again afterwards."""
        kept: dict[str, torch.Tensor] = {}
        try:
            for name, delta in _deltas(adapter_dir):
                weight = self._model.get_submodule(name).weight
                kept[name] = weight.clone()
                weight.add_(delta)
            yield
        finally:
            for name, weight in kept.items():
                self._model.get_submodule(name).weight.copy_(weight)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices as small as these lose more to waking threads than they gain, and an engine may want the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _deltas(adapter_dir: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Module name and scaling * B A, in the shape of the module's weight, for each pair in an adapter."""
    if adapter_dir is None:
        return
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            yield name.removesuffix(".lora_A.weight"), scaling * b @ a
        elif name.endswith(".lora_embedding_A"):
            b = tensors[key.replace("_embedding_A", "_embedding_B")]
            yield name.removesuffix(".lora_embedding_A"), scaling * (b @ a).T


def _verdict(answer: Sequence[int], expected: Sequence[int], gaps: Sequence[float]) -> Verdict:
    """`expected` and `gaps` begin at the answer's first token and may go on past its end."""
    for place, token in enumerate(answer):
        if token != expected[place]:
            return Verdict(place, expected[place], gaps[place])
    return Verdict(None, None, 0.0)
