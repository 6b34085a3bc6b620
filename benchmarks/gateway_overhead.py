"""What the gateway adds to an engine that answers at once: milliseconds at one connection, requests/s at many.

    python benchmarks/gateway_overhead.py [--rounds 4] [--requests 100] [--seconds 1.5] [--connections 32]
    python benchmarks/gateway_overhead.py --others DIR     # also vllm-router and LiteLLM, installed below DIR

The engine is a mock that parses as little as it can and writes answers made beforehand (`gateways/mock_engine.py`), so
that everything measured on top of it is the gateway. Each gateway is a process of its own: ours as `loradock serve`
runs it (attached to the mock over a Unix socket), the others in front of the mock's TCP port. In every round each side
takes its turn, and medians over the rounds are compared, so a busy machine harms all alike. Processor time of a gateway
for each request is the figure that depends least on how many cores the client and the mock leave to it. Prints a table,
then one JSON line.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from gateways.client import Load, Timing, latencies, load
from gateways.mock_engine import EVENTS
from gateways.sides import LITELLM, MOCK, OURS, REQUIREMENTS, ROUTER, TUNED_ROUTER, Side, running

COLUMNS = ("answers", "gateway", "median_ms", "added_ms", "added_p95_ms", "added_first_ms", "per_s", "cpu_ms")


@dataclass
class Measured:
    """What was seen of one side, streamed or not."""

    timings: list[Timing] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def rates(self) -> list[float]:
        return [load.requests / load.seconds for load in self.loads]

    def milliseconds(self) -> dict[str, float]:
        totals = sorted(timing.total_s for timing in self.timings)
        first_s = statistics.median(timing.first_byte_s for timing in self.timings)
        figures = {"median": statistics.median(totals), "p95": totals[int(len(totals) * 0.95)], "first": first_s}
        return {name: 1000 * seconds for name, seconds in figures.items()}


async def measure(sides: list[Side], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each side and kind of answer."""
    rows = []
    for streams in (False, True):
        seen = {side.name: Measured() for side in sides}
        for _ in range(arguments.rounds):
            for side in sides:
                await _turn(side, streams, arguments, seen[side.name])
        rows += [_row(streams, name, measured, seen[MOCK]) for name, measured in seen.items()]
    return rows


async def _turn(side: Side, streams: bool, arguments: argparse.Namespace, measured: Measured) -> None:
    measured.timings += await latencies(side.port, streams, arguments.requests)
    before_s = side.cpu_s()
    measured.loads.append(await load(side.port, streams, arguments.connections, arguments.seconds))
    measured.cpu_s += side.cpu_s() - before_s


def _row(streams: bool, name: str, measured: Measured, alone: Measured) -> dict[str, Any]:
    ms, bare = measured.milliseconds(), alone.milliseconds()
    # Opening a connection asks once, before the clock of the rate runs but on the processor's.
    requests = sum(load.requests + load.connections for load in measured.loads)
    return {
        "answers": f"streamed, {EVENTS} events" if streams else "whole",
        "gateway": name,
        "median_ms": round(ms["median"], 3),
        "added_ms": round(ms["median"] - bare["median"], 3),
        "added_p95_ms": round(ms["p95"] - bare["p95"], 3),
        "added_first_ms": round(ms["first"] - bare["first"], 3),
        "per_s": round(statistics.median(measured.rates)),
        "per_s_of_rounds": [round(rate) for rate in measured.rates],
        "cpu_ms": round(1000 * measured.cpu_s / requests, 3),
    }


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figures are to show, each as the worse of whole and streamed answers; null where it was not measured."""
    ours = [row for row in rows if row["gateway"] == OURS]
    ratios = {
        name: min(
            (mine["per_s"] / row["per_s"] for mine, row in zip(ours, _of(rows, name), strict=False)), default=None
        )
        for name in (ROUTER, TUNED_ROUTER, LITELLM)
    }
    return {
        "added_ms": max(row["added_ms"] for row in ours),
        **{f"per_s_over_{name}": ratio and round(ratio, 2) for name, ratio in ratios.items()},
    }


def _of(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["gateway"] == name]


def show(rows: list[dict[str, Any]], others: Path | None) -> None:
    """The table."""
    print("".join(f"{column:>20}" for column in COLUMNS))
    for row in rows:
        print("".join(f"{row[column]!s:>20}" for column in COLUMNS))
    if others is None:
        print(f"({', '.join(REQUIREMENTS)}: not measured; `--others DIR` installs and measures them)")


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--requests", type=int, default=100, help="requests of each turn at one connection")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of each turn at many connections")
    parser.add_argument("--connections", type=int, default=32, help="how many connections are many")
    parser.add_argument("--others", type=Path, help="directory of the other gateways' environments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, running(Path(name), arguments.others) as sides:
        rows = uvloop.run(measure(sides, arguments))
    show(rows, arguments.others)
    result = {
        "benchmark": "gateway_overhead",
        "command": " ".join(sys.argv),
        "machine": {"cpu": _processor(), "python": platform.python_version()},
        "connections": arguments.connections,
        "rounds": arguments.rounds,
        "gateways": {side.name: {"version": side.version, "command": " ".join(side.command)} for side in sides},
        "not_measured": [] if arguments.others else list(REQUIREMENTS),
        "rows": rows,
        "verdict": verdict(rows),
    }
    print(json.dumps(result))


def _processor() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(lines)} x {lines[0].partition(':')[2].strip()}" if lines else platform.processor()


if __name__ == "__main__":
    main()
