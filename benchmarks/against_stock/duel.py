"""One cell: the same requests to both sides, in alternating rounds; and whether both engines are set up alike."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import uvloop

from against_stock.errors import BenchmarkError
from against_stock.figures import OURS, STOCK, Round, agreement, compared, order_of
from against_stock.options import IN_FLIGHT, progress
from against_stock.servers import BASE, Server
from against_stock.traffic import Answer, as_round, ask_all
from against_stock.workload import Call, shuffled

Sides = tuple[Server, Server]
"""Stock first, as in `figures.SIDES`."""
MUST_MATCH = (
    *("max_loras", "max_cpu_loras", "max_lora_rank", "lora_dtype", "dtype", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "enforce_eager", "prefix_cache", "block_size", "threads"),
)
SAME_VARIABLES = (
    *("VLLM_CPU_OMP_THREADS_BIND", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE"),
    *("TORCH_COMPILE_DISABLE", "LD_PRELOAD"),
)
WARM_UP_TOKENS = 8
SETTLE_S = 2.0
"""Between two passes. A vLLM worker goes on looking for work in a loop for a second after its last step, on the cores
that the other side is measured on next: a quarter of a pass of the quicker side, an eighth of the slower one's."""


def effective(sides: Sides) -> dict[str, Any]:
    """What both engines run with, told on the way."""
    configs = {STOCK: sides[0].effective(), OURS: sides[1].effective()}
    for name, config in configs.items():
        shown = {key: config[key] for key in ("lora_wrapper", *MUST_MATCH)}
        progress(f"  {name}: {config['command']}\n  {json.dumps(shown)}\n  {json.dumps(config['environment'])}")
    return configs


def require_alike(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises BenchmarkError where the engines differ in more than what is ours."""
    stock, ours = configs[STOCK], configs[OURS]
    differing = [f"{key}: stock {stock[key]}, ours {ours[key]}" for key in MUST_MATCH if stock[key] != ours[key]]
    for name in SAME_VARIABLES:
        pair = stock["environment"].get(name), ours["environment"].get(name)
        if pair[0] != pair[1]:
            differing.append(f"{name}: stock {pair[0]}, ours {pair[1]}")
    if differing:
        raise BenchmarkError("the engines are not set up alike: " + "; ".join(differing))


def ask_side(side: Server, calls: Sequence[Call], in_flight: int) -> tuple[list[Answer], float]:
    """Every request to one side; a failure names it."""
    try:
        return uvloop.run(ask_all(side.url, calls, in_flight))
    except BenchmarkError as error:
        raise BenchmarkError(f"{side.label}: {error}") from error


def warm_up(sides: Sides, models: Sequence[str], in_flight: int = IN_FLIGHT) -> None:
    """Every model answers once at least, and the batch is full once, on both sides."""
    for side in sides:
        ask_side(side, shuffled(models, max(len(models), in_flight), WARM_UP_TOKENS, seed=0), in_flight)


def duel(
    sides: Sides,
    models: Sequence[str],
    *,
    requests: int,
    max_tokens: int,
    rounds: int,
    in_flight: int = IN_FLIGHT,
    settle: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """The figures of one cell. Every round has its own requests, the same for both sides."""
    warm_up(sides, models, in_flight)
    taken: dict[str, list[Round]] = {STOCK: [], OURS: []}
    texts: dict[str, list[str]] = {STOCK: [], OURS: []}
    for number in range(rounds):
        calls = shuffled(models, requests, max_tokens, seed=number + 1)
        for name in order_of(number):
            settle(SETTLE_S)
            answers, took_s = ask_side(sides[0] if name == STOCK else sides[1], calls, in_flight)
            taken[name].append(as_round(answers, took_s))
            texts[name] += [answer.text for answer in answers]
            progress(f"  round {number + 1} {name}: {taken[name][-1].tokens_per_s:,.0f} tokens/s in {took_s:.1f} s")
    return {"requests": requests, **compared(taken), "same_answers": agreement(texts[STOCK], texts[OURS])}


def models_of(adapters: Sequence[str], count: int) -> list[str]:
    """The first `count` adapters; none means the base."""
    if count > len(adapters):
        raise BenchmarkError(f"{count} adapters are asked for, {len(adapters)} were made")
    return list(adapters[:count]) or [BASE]
