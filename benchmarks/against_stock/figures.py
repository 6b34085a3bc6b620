"""From answers to figures: percentiles, medians of rounds, ratios, tables. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STOCK, OURS = "stock", "loradock"
SIDES = (STOCK, OURS)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above (nearest rank)."""
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)  # rounded up
    return ordered[max(0, int(rank) - 1)]


@dataclass(frozen=True)
class Round:
    """One pass of a list of requests through one side."""

    tokens_per_s: float
    latencies_s: tuple[float, ...]
    """Of every request, from sending it to its last byte."""


@dataclass(frozen=True)
class Summary:
    """All rounds of one side in one cell: the median of the rounds' throughputs, latencies of all requests together."""

    tokens_per_s: float
    slowest_round: float
    fastest_round: float
    p50_s: float
    p99_s: float
    longest_s: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> "Summary":
        speeds = [one.tokens_per_s for one in rounds]
        latencies = [latency for one in rounds for latency in one.latencies_s]
        return cls(
            tokens_per_s=round(statistics.median(speeds), 1),
            slowest_round=round(min(speeds), 1),
            fastest_round=round(max(speeds), 1),
            p50_s=round(statistics.median(latencies), 3),
            p99_s=round(percentile(latencies, 0.99), 3),
            longest_s=round(max(latencies), 3),
        )


def compared(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Both sides' summaries, and Loradock's throughput over stock's: of the medians, and round by round."""
    sides = {side: Summary.of(rounds[side]) for side in SIDES}
    by_round = [
        round(ours.tokens_per_s / stock.tokens_per_s, 3)
        for stock, ours in zip(rounds[STOCK], rounds[OURS], strict=True)
    ]
    return {
        "ratio": round(sides[OURS].tokens_per_s / sides[STOCK].tokens_per_s, 3),
        "ratio_by_round": by_round,
        **{side: asdict(summary) for side, summary in sides.items()},
    }


def order_of(round_number: int) -> tuple[str, ...]:
    """Who goes first: turns from round to round, so that neither side always gets the warmer machine."""
    return SIDES if round_number % 2 == 0 else SIDES[::-1]


def agreement(stock: Sequence[str], ours: Sequence[str]) -> float:
    """Share of requests that both sides answered with the same text."""
    return round(sum(a == b for a, b in zip(stock, ours, strict=True)) / max(1, len(stock)), 3)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of right-aligned columns."""
    cells = [[str(column) for column in columns], *([_shown(value) for value in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    return "\n".join("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)) for row in cells)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
