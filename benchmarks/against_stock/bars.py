"""What Loradock must reach, and whether a result does. Pure."""

from typing import Any

from against_stock.figures import OURS

BASE_ONLY = 0.95
TABLE = {
    64: {0: BASE_ONLY, 1: 2.1, 4: 2.0, 16: 1.9, 32: 1.8, 64: 1.6},
    4: {0: BASE_ONLY, 1: 1.6, 4: 1.8, 16: 1.5, 32: 1.5, 64: 1.6},
}
"""Throughput over stock's, by slots and adapters in traffic."""
WIDE = {0: BASE_ONLY, 4: 1.3, 16: 1.3}
DEFAULTS = 15.0
ZIPF_KEPT = 0.8
FLOOD_QUEUE_P99_S, FLOOD_LATENCY = 0.5, 1.5
LOADS_GAP_P99 = 1.2


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of a scenario that has a bar, with it. What was not measured has not reached its bar."""
    scenario = result["scenario"]
    if scenario in ("table", "wide"):
        return [
            _at_least(
                f"{scenario}: {block['slots']} slots, {cell['adapters'] or 'no'} adapters", cell["ratio"], cell["bar"]
            )
            for block in result["blocks"]
            for cell in block["cells"]
            if cell["bar"] is not None
        ]
    ours = result.get(OURS, {})
    if scenario == "defaults":
        return [_at_least("defaults: 64 adapters", result["ratio"], DEFAULTS)]
    if scenario == "zipf":
        return [_at_least("zipf: share of the 8-adapter throughput", ours["kept"], ZIPF_KEPT)]
    if scenario == "flood":
        return [
            _at_most("flood: B's p99 in our queue, s", ours["flood"]["queue_p99_s"], FLOOD_QUEUE_P99_S),
            _at_most("flood: B's median latency over quiet", ours["latency_ratio_p50"], FLOOD_LATENCY),
            _at_most("flood: B's p99 latency over quiet", ours["latency_ratio_p99"], FLOOD_LATENCY),
        ]
    if scenario == "loads":
        return [_at_most("loads: p99 of gaps over quiet", ours["loads_to_quiet"], LOADS_GAP_P99)]
    raise ValueError(f"no bars are known for the scenario {scenario!r}")


def _at_least(what: str, measured: float | None, bar: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "bar": f">= {bar:g}", "held": measured is not None and measured >= bar}


def _at_most(what: str, measured: float | None, bar: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "bar": f"<= {bar:g}", "held": measured is not None and measured <= bar}
