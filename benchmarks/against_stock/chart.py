"""The chart of the table: tokens/s and 99th percentile of latency over adapters in traffic, one column for each number
of slots. Draws what a result says; measures nothing. matplotlib is imported when it is drawn, and opens no window."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from against_stock.figures import OURS, SIDES, STOCK

LINES = ((STOCK, "stock vLLM", "#8c8c8c", "s--"), (OURS, "Loradock", "#0b6e4f", "o-"))
PANELS = (("tokens_per_s", "tokens/s"), ("p99_s", "p99 latency (s)"))
HEADROOM = 1.15


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of the table scenario."""
    figure_of(result).savefig(path)


def figure_of(result: dict[str, Any]) -> Any:
    """The chart as matplotlib has it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks: Sequence[dict[str, Any]] = result["blocks"]
    figure = Figure(figsize=(5.2 * len(blocks), 7.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(blocks), squeeze=False, sharex="col")
    for column, block in enumerate(blocks):
        for row, (key, label) in enumerate(PANELS):
            axes = panels[row][column]
            # Speeds on one scale for all numbers of slots; waits with few slots would flatten those with many.
            seen = blocks if key == "tokens_per_s" else [block]
            top = max(cell[side][key] for one in seen for cell in one["cells"] for side in SIDES)
            _panel(axes, block["cells"], key, HEADROOM * top)
            if column == 0:
                axes.set_ylabel(label)
        panels[0][column].set_title(f"{block['slots']} slots")
        panels[1][column].set_xlabel("adapters in traffic")
    panels[0][0].legend()
    figure.suptitle(f"{result['in_flight']} requests in flight, {result['max_tokens']} tokens each")
    return figure


def _panel(axes: Any, cells: Sequence[dict[str, Any]], key: str, top: float) -> None:
    places = range(len(cells))
    for side, name, colour, style in LINES:
        axes.plot(places, [cell[side][key] for cell in cells], style, color=colour, label=name, linewidth=2)
    if key == "tokens_per_s":
        for place, cell in zip(places, cells, strict=True):
            at = (place, max(cell[side][key] for side in SIDES))
            axes.annotate(f"{cell['ratio']:.2f}×", at, xytext=(0, 7), textcoords="offset points", ha="center")
    axes.margins(x=0.1)
    axes.set_ylim(0, top)
    axes.grid(alpha=0.3)
    axes.set_xticks(list(places), [str(cell["adapters"] or "base") for cell in cells])
