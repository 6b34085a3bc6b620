"""Judges greedy tokens of an engine that computes in bfloat16, where whole continuations cannot be compared.

After one near tie that falls the other way every later token differs, rightly. So the reference is led along the
engine's own tokens, and at each is asked how much worse than its best the engine's choice was: the regret, in logits.
Rounding costs little regret, however long the answer; another model's weights cost much, mostly at the first token.
The reference computes in float32, whatever the checkpoint's dtype.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def worst_regrets(
    base_dir: Path, adapter_dir: Path | None, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """For each prompt (token ids) and its answer (token ids): the largest regret of any token of the answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir)
    model.eval()
    worst = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])  # (1, prompt + answer)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # (answer, vocabulary)
        chosen = logits.gather(1, torch.tensor(list(answer))[:, None])[:, 0]
        worst.append(float((logits.max(dim=1).values - chosen).max()))
    return worst
