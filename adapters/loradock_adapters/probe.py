"""Probe prompts and what a model says to them: the figures by which two programs can tell that they run the same model.

The trainer writes them into the passport, the server compares them with its engine's answers (proof.py there). Only the
shape of the figures, and the prompts that are used where there is no passport. Prompts are token ids: no tokenizer
stands between the two.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_PROMPTS = 16
MAX_PROMPT_TOKENS = 256
MAX_TOP = 20
"""More log-probabilities than this no vLLM gives by default."""
FIXED_PROMPTS = 4
FIXED_PROMPT_TOKENS = 12

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class ProbeToken(_Part):
    """One token that may come next, and how likely."""

    id: TokenId
    logprob: Annotated[float, Field(le=1e-3)]
    """Of the whole vocabulary's softmax, in nats."""
    logit: float | None = None


class ProbePrompt(_Part):
    """One prompt and the tokens that are the likeliest after it."""

    prompt_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    top: Annotated[tuple[ProbeToken, ...], Field(min_length=1, max_length=MAX_TOP)]
    """By the checkpoint."""
    base_top: Annotated[tuple[ProbeToken, ...], Field(max_length=MAX_TOP)] = ()
    """By its base alone; empty where nobody asked it."""


class Probe(_Part):
    """What the trainer saw; `probe` in the passport."""

    dtype: str
    """Type of the saved weights."""
    computed_in: str | None = None
    """Type of the arithmetic; None where it is that of the saved weights."""
    prompts: Annotated[tuple[ProbePrompt, ...], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_logit_difference: dict[str, float] = Field(default_factory=dict)
    """`reloaded`: files against trained model; `base`: files against base; largest over all probes and tokens."""

    @property
    def largest_id(self) -> int:
        """The largest token id anywhere in it."""
        return max(
            max(*prompt.prompt_token_ids, 0, *(token.id for token in (*prompt.top, *prompt.base_top)))
            for prompt in self.prompts
        )


def fixed_prompts(vocabulary: int, among: Sequence[int] = ()) -> list[list[int]]:
    """The prompts that everything without a passport is asked: the same for the same vocabulary, spread over it.

    `among`: only of these token ids, which must not be more than the vocabulary has.
    """
    ids = among or range(vocabulary)
    numbers = [
        int.from_bytes(hashlib.blake2b(f"loradock probe {index}".encode(), digest_size=8).digest())
        for index in range(FIXED_PROMPTS * FIXED_PROMPT_TOKENS)
    ]
    picked = [ids[number % len(ids)] for number in numbers]
    return [picked[start : start + FIXED_PROMPT_TOKENS] for start in range(0, len(picked), FIXED_PROMPT_TOKENS)]
