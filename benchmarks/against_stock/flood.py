"""A quiet tenant beside a flood: A keeps 200 requests in flight on one adapter, B sends one a second to another.

Measured against the same B beside an A that leaves exactly B's seat free: then B joins a batch of the same size without
waiting. A's answers differ in length, as answers do: were they all alike, a whole batch would end at once and seats
would come free only every few seconds.
"""

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from against_stock.bars import FLOOD_LATENCY, FLOOD_QUEUE_P99_S
from against_stock.checkpoints import SMALL, make_adapters, make_base
from against_stock.duel import effective, require_alike, warm_up
from against_stock.figures import OURS, SIDES, STOCK, order_of, percentile, table
from against_stock.options import IN_FLIGHT, KV_CACHE_GIB, MAX_TOKENS, Options, progress
from against_stock.servers import Setup, both
from against_stock.traffic import Answer, ask, session
from against_stock.workload import Call, prompt, uneven

FLOOD, QUIET = 200, IN_FLIGHT - 1
"""A's requests in flight: `QUIET` and one of B fill the engine's seats."""
SLOTS = 4
SECONDS, SETTLE_S = 20, 5.0


def flood_scenario(options: Options, place: Path) -> dict[str, Any]:
    """Every round: both sides quiet, then both sides flooded."""
    base = make_base(place / "base", SMALL)
    adapters = make_adapters(place / "adapters", SMALL, ["flooding", "quiet"])
    arguments = {"dtype": options.dtype, "max_loras": SLOTS, "max_cpu_loras": SLOTS, "max_lora_rank": SMALL.rank}
    arguments |= {"max_model_len": 256, "max_num_seqs": IN_FLIGHT}
    setup = Setup(base, arguments, options.cores, KV_CACHE_GIB, options.serve)
    taken: dict[str, dict[str, list[Answer]]] = {name: {"quiet": [], "flood": []} for name in SIDES}
    progress("flood: both engines start")
    with both(setup, setup, place / "servers") as sides:
        configs = effective(sides)
        require_alike(configs)
        for side in sides:
            side.register(adapters)
        warm_up(sides, list(adapters))
        for number in range(options.rounds):
            for case, in_flight in (("quiet", QUIET), ("flood", FLOOD)):
                for name in order_of(number):
                    seconds = SECONDS // 2 if options.quick else SECONDS
                    url = sides[SIDES.index(name)].url
                    answers = uvloop.run(beside(url, in_flight, seconds, seed=number, settle_s=SETTLE_S))
                    taken[name][case] += answers
                    median_s = statistics.median(answer.latency_s for answer in answers)
                    progress(f"  round {number + 1} {case} {name}: B's median {median_s:.2f} s")
    result: dict[str, Any] = {"scenario": "flood", "slots": SLOTS, "seats": IN_FLIGHT, "flood": FLOOD}
    return result | {"effective": configs} | {name: _summary(taken[name]) for name in SIDES}


async def beside(url: str, in_flight: int, seconds: int, seed: int, settle_s: float) -> list[Answer]:
    """B's answers, one asked for each second, while A keeps `in_flight` requests going; from `settle_s` after A begins,
    when its requests fill the seats and the queue."""

    async def keep_asking(client: aiohttp.ClientSession, number: int) -> None:
        for call in uneven("flooding", MAX_TOKENS, seed=1000 * seed + number, user="tenant-a"):
            await ask(client, call)

    async with session(url) as client:
        flood: asyncio.Future[Any] = asyncio.gather(*(keep_asking(client, number) for number in range(in_flight)))
        try:
            await asyncio.sleep(settle_s)
            asked = []
            for number in range(seconds):
                call = Call("quiet", prompt(10_000 + 100 * seed + number), MAX_TOKENS, user="tenant-b")
                asked.append(asyncio.create_task(ask(client, call)))
                done, _ = await asyncio.wait([flood], timeout=1)
                if done:
                    break
            answers: asyncio.Future[list[Answer]] = asyncio.gather(*asked)
            await asyncio.wait([flood, answers], return_when=asyncio.FIRST_COMPLETED)
            if flood.done():  # it ends by an error only
                answers.cancel()
                await flood
            return await answers
        finally:
            flood.cancel()
            await asyncio.gather(flood, return_exceptions=True)


def _summary(cases: dict[str, list[Answer]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for case, answers in cases.items():
        latencies = [answer.latency_s for answer in answers]
        result[case] = {"requests": len(answers), "p50_s": round(statistics.median(latencies), 3)}
        result[case] |= {"p99_s": round(percentile(latencies, 0.99), 3), "longest_s": round(max(latencies), 3)}
        queued = [answer.queue_s for answer in answers if answer.queue_s is not None]
        result[case]["queue_p99_s"] = round(percentile(queued, 0.99), 3) if queued else None
    result["latency_ratio_p50"] = round(result["flood"]["p50_s"] / result["quiet"]["p50_s"], 3)
    result["latency_ratio_p99"] = round(result["flood"]["p99_s"] / result["quiet"]["p99_s"], 3)
    return result


def shown(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    columns = [
        "side",
        "A in flight",
        "B p50 s",
        "B p99 s",
        "B longest s",
        "B in our queue p99 s",
        "p50 / quiet",
        "p99 / quiet",
    ]
    rows: list[Sequence[object]] = []
    for side in (STOCK, OURS):
        for case, in_flight in (("quiet", QUIET), ("flood", FLOOD)):
            figures = result[side][case]
            ratios = [result[side][f"latency_ratio_{key}"] if case == "flood" else None for key in ("p50", "p99")]
            keys = ("p50_s", "p99_s", "longest_s", "queue_p99_s")
            rows.append([side, in_flight, *(figures[key] for key in keys), *ratios])
    bars = f"bars: queue p99 {FLOOD_QUEUE_P99_S} s, latency {FLOOD_LATENCY} times quiet"
    return f"a tenant beside a flood, {result['seats']} seats ({bars})\n{table(columns, rows)}"
