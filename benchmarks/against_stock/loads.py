"""What loading adapters does to those who are being answered: 24 loads of 38 MB while 8 streams run.

Three phases for each side: the streams alone; the streams and a one-token request a second to adapters that are
loaded; the streams and a one-token request a second to adapters that are not. Such a request is as small as one can be,
so that what is felt is the load. Stock is told to load by its load call first, Loradock by the request itself. The gaps
between two events of the streams are what readers feel.
"""

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from against_stock.bars import LOADS_GAP_P99
from against_stock.checkpoints import WIDE, make_adapters, make_base
from against_stock.duel import effective, require_alike
from against_stock.errors import BenchmarkError
from against_stock.figures import OURS, SIDES, STOCK, percentile, table
from against_stock.options import KV_CACHE_GIB, Options, progress
from against_stock.servers import Setup, both
from against_stock.streams import note_gaps
from against_stock.traffic import ask, session
from against_stock.workload import Call, prompt

STREAMS, STREAM_ADAPTERS = 8, 2
LOADS = 24
SLOTS, CPU_ADAPTERS = 4, 8
PACE_S = 1.0
ONE_WORD = "the"
"""A longer prompt would itself hold up the streams, loads or no loads."""
STREAM_TOKENS = 1900
PHASES = ("quiet", "requests", "loads")


def loads_scenario(options: Options, place: Path) -> dict[str, Any]:
    """One round: an adapter can be loaded for the first time only once."""
    base = make_base(place / "base", WIDE)
    counts = {"stream": STREAM_ADAPTERS, "fresh": 8 if options.quick else LOADS, "filler": CPU_ADAPTERS}
    made = make_adapters(place / "adapters", WIDE, [f"{kind}-{n}" for kind in counts for n in range(counts[kind])])
    streaming, fresh, fillers = ({name: made[name] for name in made if name.startswith(kind)} for kind in counts)
    arguments = {"dtype": options.dtype, "max_loras": SLOTS, "max_cpu_loras": CPU_ADAPTERS}
    arguments |= {"max_lora_rank": WIDE.rank, "max_model_len": 2048, "max_num_seqs": 64}
    setup = Setup(base, arguments, options.cores, KV_CACHE_GIB, options.serve)
    result: dict[str, Any] = {"scenario": "loads", "loads": len(fresh), "adapter_mib": WIDE.adapter_bytes / 2**20}
    progress("loads: both engines start")
    with both(setup, setup, place / "servers") as sides:
        result |= {"slots": SLOTS, "cpu_adapters": CPU_ADAPTERS, "bar": LOADS_GAP_P99, "effective": effective(sides)}
        require_alike(result["effective"])
        stock, ours = sides
        # A push has the engine prove the adapter, which loads it: those pushed afterwards take its place in memory.
        ours.register(fresh | fillers)
        for side in sides:
            side.register(streaming)
        result["already_loaded"] = ours.loaded(list(fresh))
        fresh = {name: directory for name, directory in fresh.items() if name not in result["already_loaded"]}
        result["loads"] = len(fresh)
        if len(fresh) < len(result["already_loaded"]):
            raise BenchmarkError(f"{result['already_loaded']} are loaded before they are asked for: nothing to measure")
        asked = {"quiet": [], "requests": ["stream-0"] * len(fresh), "loads": list(fresh)}
        taken: dict[str, dict[str, Any]] = {name: {} for name in SIDES}
        for phase in PHASES:
            for name, url in ((STOCK, stock.url), (OURS, ours.url)):
                loading = fresh if name == STOCK and phase == "loads" else {}
                gaps, calls_s = uvloop.run(phase_of(url, asked[phase], loading, len(fresh) * PACE_S))
                taken[name][phase] = _summary(gaps, calls_s)
                progress(f"  {phase} {name}: p99 of gaps {taken[name][phase]['gap_p99_ms']} ms")
    for name in SIDES:
        p99s = {phase: taken[name][phase]["gap_p99_ms"] for phase in PHASES}
        result[name] = taken[name] | {"loads_to_quiet": round(p99s["loads"] / p99s["quiet"], 3)}
        result[name]["loads_to_requests"] = round(p99s["loads"] / p99s["requests"], 3)
    return result


async def phase_of(
    url: str, names: Sequence[str], load_paths: Mapping[str, Path], seconds: float
) -> tuple[list[float], list[float]]:
    """The streams' gaps over `seconds`, with one request (and load call where there is a path) after the other, one
    begun each second; and the seconds that each of those took."""
    gaps: list[float] = []
    calls_s: list[float] = []

    async def one(client: aiohttp.ClientSession, name: str) -> None:
        began = time.perf_counter()
        if name in load_paths:
            loading = {"lora_name": name, "lora_path": str(load_paths[name])}
            async with client.post("/v1/load_lora_adapter", json=loading) as response:
                if response.status != 200:
                    raise BenchmarkError(f"stock vLLM did not load {name}: {await response.text()}")
        await ask(client, Call(name, ONE_WORD, 1))
        calls_s.append(time.perf_counter() - began)

    async def paced(client: aiohttp.ClientSession) -> None:
        began = time.perf_counter()
        for number, name in enumerate(names):
            await asyncio.sleep(max(0.0, began + number * PACE_S - time.perf_counter()))
            await one(client, name)
        await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))

    async with session(url) as client:
        flows = [asyncio.Event() for _ in range(STREAMS)]
        calls = [Call(f"stream-{n % STREAM_ADAPTERS}", prompt(60_000 + n), STREAM_TOKENS) for n in range(STREAMS)]
        streams = asyncio.gather(
            *(note_gaps(client, call, gaps, flow) for call, flow in zip(calls, flows, strict=True))
        )
        try:
            await _or_error(streams, asyncio.gather(*(flow.wait() for flow in flows)))
            gaps.clear()  # what the streams' own beginnings did to each other
            await _or_error(streams, asyncio.ensure_future(paced(client)))
        finally:
            streams.cancel()
            await asyncio.gather(streams, return_exceptions=True)
    return gaps, calls_s


async def _or_error(streams: "asyncio.Future[Any]", work: "asyncio.Future[Any]") -> None:
    """Until the work is done; the streams end earlier by an error only."""
    await asyncio.wait([streams, work], return_when=asyncio.FIRST_COMPLETED)
    if streams.done():
        work.cancel()
        await streams
    await work


def _summary(gaps: Sequence[float], calls_s: Sequence[float]) -> dict[str, Any]:
    return {
        "gaps": len(gaps),
        "gap_p50_ms": round(1000 * statistics.median(gaps), 1),
        "gap_p99_ms": round(1000 * percentile(gaps, 0.99), 1),
        "gap_longest_ms": round(1000 * max(gaps), 1),
        "request_p50_ms": round(1000 * statistics.median(calls_s), 1) if calls_s else None,
        "request_longest_ms": round(1000 * max(calls_s), 1) if calls_s else None,
    }


def shown(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    columns = [
        "side",
        "beside the streams",
        "gap p50 ms",
        "p99 ms",
        "longest ms",
        "p99 / quiet",
        "request p50 ms",
        "longest ms",
    ]
    rows = []
    for side in (STOCK, OURS):
        quiet_ms = result[side]["quiet"]["gap_p99_ms"]
        for phase in PHASES:
            figures = result[side][phase]
            row = [side, phase, figures["gap_p50_ms"], figures["gap_p99_ms"], figures["gap_longest_ms"]]
            row += [figures["gap_p99_ms"] / quiet_ms, figures["request_p50_ms"], figures["request_longest_ms"]]
            rows.append(row)
    title = f"{result['loads']} loads of {result['adapter_mib']:.1f} MiB beside {STREAMS} streams (bar {LOADS_GAP_P99})"
    return f"{title}\n{table(columns, rows)}"
