"""Proof of a merge: base + adapter and the merged model, read from its files, answer the probe prompts alike."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig

from loradock_train.errors import ProofError
from loradock_train.model import auto_class
from loradock_train.proof import Proof, probe_logits

if TYPE_CHECKING:
    from loradock_train.merging import Request

NUM_PROMPTS, PROMPT_TOKENS = 4, 16
"""Where the passport has no prompts: as many, of seeded random tokens."""
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _load(directory: Path, dtype: Any) -> Any:
    return auto_class(AutoConfig.from_pretrained(str(directory))).from_pretrained(str(directory), dtype=dtype)


def prove_merged(request: "Request", merged: Path) -> Proof:
    """Raises ProofError where the two differ by more than rounding.

    Both compute in the base's own type; the tolerance is that of the coarser of the weights on disk.
    """
    model: Any = _load(request.base_dir, "auto")
    dtype = next(model.parameters()).dtype
    prompts = _prompts(request, model.config.get_text_config().vocab_size)
    base = probe_logits(model, prompts)
    expected = base
    if request.base is not None:
        expected = probe_logits(PeftModel.from_pretrained(model, str(request.checkpoint.directory)), prompts)
    del model
    result: Any = _load(merged, dtype)
    found = probe_logits(result, prompts)
    saved = dtype if request.dtype is None else _TYPES[request.dtype]
    difference = _compared(expected, found, exact=saved == dtype == torch.float32)
    return Proof(
        tuple(tuple(prompt) for prompt in prompts),
        found,
        base,
        difference,
        float((found[:, : base.shape[1]] - base[:, : found.shape[1]]).abs().max()),
        str(saved).removeprefix("torch."),
        str(dtype).removeprefix("torch."),
    )


def _compared(expected: Tensor, found: Tensor, exact: bool) -> float:
    if expected.shape != found.shape:
        raise ProofError(f"the merged model has {found.shape[1]} logits, base + adapter {expected.shape[1]}")
    scale = max(1.0, float(expected.abs().max()))
    tolerance = (2e-3 if exact else 5e-2) * scale
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:
        raise ProofError(
            f"the merged model answers unlike base + adapter: {difference:.4g} logits apart, at most "
            f"{tolerance:.4g} is rounding; it was not kept"
        )
    return difference


def _prompts(request: "Request", vocabulary: int) -> list[list[int]]:
    passport = request.checkpoint.passport
    if passport is not None and passport.probe is not None and passport.probe.prompts:
        return [list(prompt.prompt_token_ids) for prompt in passport.probe.prompts]
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(0, vocabulary, (NUM_PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    return found
