"""What transformers and PEFT answer from the checkpoints' own files, token by token: the truth a server is held to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from asking import MAX_ANSWER_TOKENS

NEAR_TIE = 1e-3
"""Where the two best logits are no further apart, rounding decides, and either is right."""


def served_tokens(address: str, model: str, prompt: str) -> list[int]:
    """The server's greedy answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_ANSWER_TOKENS, "temperature": 0}
    reply = httpx.post(
        f"{address}/v1/completions", json=body | {"return_token_ids": True}, timeout=300, trust_env=False
    )
    tokens: list[int] = reply.raise_for_status().json()["choices"][0]["token_ids"]
    return tokens


def load(base: Path, adapter: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer. torch is imported now."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval(), AutoTokenizer.from_pretrained(base)


def disagreements(base: Path, adapter: Path | None, served: Sequence[tuple[str, list[int]]]) -> list[str]:
    """The prompts whose served tokens are not the likeliest ones, each after the tokens before it."""
    import torch

    model, tokenizer = load(base, adapter)
    found = []
    for prompt, tokens in served:
        ids = tokenizer(prompt).input_ids
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].float()
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]  # per token, 0: the best
        ends = tokens[-1:] == [tokenizer.eos_token_id]
        if float(behind.max()) > NEAR_TIE or not (ends or len(tokens) == MAX_ANSWER_TOKENS):
            found.append(prompt)
    return found
