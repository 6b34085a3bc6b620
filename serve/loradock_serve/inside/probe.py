"""What a model of this engine says next to given token ids: the engine's part of a proof (`POST /loradock/probe`).

Beside the OpenAI routes because of three things that those do not do: an answer that is no number is told as such
(vLLM's JSON refuses it with a 500), the prefix cache is not read, and nothing is tokenised or detokenised. Asks for the
likeliest tokens as any client can (`logprobs`), not for chosen ones (`logprob_token_ids`): where one request of a batch
does that, vLLM 0.32 answers the others' `logprobs` with the chosen ones' columns.
Private touch: `AsyncLLM.generate` with token ids (its `SamplingParams` and `RequestOutput`).
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

MAX_TOP = 20

Ranked = list[tuple[int, float | None]]
"""Token ids with their log-probabilities, the likeliest first; None stands for what is no number."""


def top_of(engine: Any) -> int:
    """How many tokens each answer has: vLLM's `max_logprobs` limits it."""
    limit = int(engine.vllm_config.model_config.max_logprobs)
    return MAX_TOP if limit < 0 else min(MAX_TOP, limit)


async def probe(engine: Any, adapter: Any, prompts: Sequence[Sequence[int]]) -> list[Ranked]:
    """The likeliest next tokens of each prompt, by the base or with an adapter (a vLLM `LoRARequest`).

    Raises ValueError where a prompt is not one for this engine (too long, ids outside the vocabulary).
    """
    return list(await asyncio.gather(*(_next(engine, adapter, prompt, top_of(engine)) for prompt in prompts)))


async def _next(engine: Any, adapter: Any, prompt: Sequence[int], top: int) -> Ranked:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprobs=top,
        detokenize=False,
        ignore_eos=True,
        skip_reading_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    request_id = f"loradock-probe-{uuid4().hex}"
    ranked: Ranked = []
    sent = {"prompt_token_ids": list(prompt)}
    async for output in engine.generate(sent, params, request_id, lora_request=adapter):
        for position in output.outputs[0].logprobs or ():
            ranked = [(int(token), _number(entry.logprob)) for token, entry in position.items()]
    return sorted(ranked, key=lambda pair: -math.inf if pair[1] is None else pair[1], reverse=True)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
