"""A thousand adapters: making them known, and Zipf(1) traffic over them against traffic over eight of them.

Streamed, so that the time to the first token shows what cold adapters cost.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from against_stock.bars import ZIPF_KEPT
from against_stock.checkpoints import SMALL, make_adapters, make_base
from against_stock.duel import Sides, effective, require_alike, warm_up
from against_stock.figures import OURS, SIDES, STOCK, order_of, percentile, table
from against_stock.options import IN_FLIGHT, KV_CACHE_GIB, MAX_TOKENS, Options, progress
from against_stock.servers import Setup, both
from against_stock.streams import stream_all
from against_stock.workload import Call, shuffled, zipf

ADAPTERS, FEW = 1000, 8
SLOTS, CPU_ADAPTERS = 64, 256
REQUESTS = 256
CASES = ("few", "zipf")


def zipf_scenario(options: Options, place: Path) -> dict[str, Any]:
    """Both sides with the same slots; each round asks eight adapters first and then all of them."""
    base = make_base(place / "base", SMALL)
    count = 100 if options.quick else ADAPTERS
    adapters = make_adapters(place / "adapters", SMALL, [f"adapter-{n}" for n in range(1, count + 1)])
    arguments = {"dtype": options.dtype, "max_loras": SLOTS, "max_cpu_loras": CPU_ADAPTERS}
    arguments |= {"max_lora_rank": SMALL.rank, "max_model_len": 256, "max_num_seqs": IN_FLIGHT}
    setup = Setup(base, arguments, options.cores, KV_CACHE_GIB, options.serve)
    progress(f"{count} adapters: both engines start")
    with both(setup, setup, place / "servers") as sides:
        configs = effective(sides)
        require_alike(configs)
        result: dict[str, Any] = {"scenario": "zipf", "adapters": count, "in_flight": IN_FLIGHT, "effective": configs}
        for name, side in zip(SIDES, sides, strict=True):
            calls_s = side.register(adapters)
            result[name] = {"registering": _registering(calls_s)}
            progress(f"  {name} knows {count} adapters after {sum(calls_s):.1f} s")
        figures = compare(sides, list(adapters), options.requests(REQUESTS), options.rounds)
    for name in SIDES:
        result[name] |= figures.pop(name)
    return result | figures


def compare(sides: Sides, names: Sequence[str], requests: int, rounds: int) -> dict[str, Any]:
    """Both sides' figures for the first few adapters and for all, once all are known to both."""
    taken = _rounds(sides, names, requests, rounds)
    result: dict[str, Any] = {"bar_kept": ZIPF_KEPT}
    for name in SIDES:
        result[name] = {case: _summary(taken[name][case]) for case in CASES}
        result[name]["kept"] = round(result[name]["zipf"]["tokens_per_s"] / result[name]["few"]["tokens_per_s"], 3)
    for case in CASES:
        ratio = result[OURS][case]["tokens_per_s"] / result[STOCK][case]["tokens_per_s"]
        result[f"ratio_{case}"] = round(ratio, 3)
    return result


def _rounds(
    sides: Sides, names: Sequence[str], requests: int, rounds: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What each side's rounds took, by case."""
    taken: dict[str, dict[str, list[dict[str, Any]]]] = {name: {case: [] for case in CASES} for name in SIDES}
    warm_up(sides, names[:FEW])
    for side in sides:  # caches as traffic of this kind leaves them, not as the last thousand loads did
        uvloop.run(stream_all(side.url, zipf(names, requests, 8, seed=99), IN_FLIGHT))
    for number in range(rounds):
        few = shuffled(names[:FEW], requests, MAX_TOKENS, seed=number + 1)
        for case, calls in (("few", few), ("zipf", zipf(names, requests, MAX_TOKENS, seed=number + 1))):
            for name in order_of(number):
                taken[name][case].append(_round(sides[SIDES.index(name)].url, calls))
                progress(f"  round {number + 1} {case} {name}: {taken[name][case][-1]['tokens_per_s']:,.0f} tokens/s")
    return taken


def _round(url: str, calls: Sequence[Call]) -> dict[str, Any]:
    streams, took_s = uvloop.run(stream_all(url, calls, IN_FLIGHT))
    return {
        "tokens_per_s": sum(stream.tokens for stream in streams) / took_s,
        "first_s": [stream.first_s for stream in streams],
        "latency_s": [stream.latency_s for stream in streams],
    }


def _summary(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    firsts = [value for one in rounds for value in one["first_s"]]
    latencies = [value for one in rounds for value in one["latency_s"]]
    return {
        "tokens_per_s": round(statistics.median(one["tokens_per_s"] for one in rounds), 1),
        "first_token_p50_s": round(statistics.median(firsts), 3),
        "first_token_p99_s": round(percentile(firsts, 0.99), 3),
        "p50_s": round(statistics.median(latencies), 3),
        "p99_s": round(percentile(latencies, 0.99), 3),
        "longest_s": round(max(latencies), 3),
    }


def _registering(calls_s: Sequence[float]) -> dict[str, float]:
    return {
        "total_s": round(sum(calls_s), 1),
        "median_ms": round(1000 * statistics.median(calls_s), 1),
        "p99_ms": round(1000 * percentile(calls_s, 0.99), 1),
    }


def shown(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    columns = [
        "side",
        "traffic",
        "tokens/s",
        "kept",
        "bar",
        "first token p50 s",
        "p99 s",
        "p50 s",
        "p99 s",
        "registered in s",
    ]
    rows = []
    for side in (STOCK, OURS):
        for case, label in (("few", f"{FEW} adapters"), ("zipf", f"{result['adapters']} adapters, Zipf(1)")):
            figures = result[side][case]
            kept = (
                (result[side]["kept"], result["bar_kept"] if side == OURS else None) if case == "zipf" else (None, None)
            )
            keys = ("first_token_p50_s", "first_token_p99_s", "p50_s", "p99_s")
            total_s = result[side]["registering"]["total_s"] if case == "zipf" else None
            rows.append([side, label, figures["tokens_per_s"], *kept, *(figures[key] for key in keys), total_s])
    return f"many adapters, {SLOTS} slots\n{table(columns, rows)}"
