"""The chart of the table: tokens/s and 99th percentile of latency over adapters in traffic, one column for each number
of slots. Draws what a result says; measures nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from against_stock.figures import OURS, STOCK

LINES = ((STOCK, "stock vLLM", "#8c8c8c", "s--"), (OURS, "Loradock", "#0b6e4f", "o-"))
PANELS = (("tokens_per_s", "tokens/s"), ("p99_s", "p99 latency (s)"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of the table scenario."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks: Sequence[dict[str, Any]] = result["blocks"]
    figure = Figure(figsize=(5.2 * len(blocks), 7.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(blocks), squeeze=False, sharex="col", sharey="row")
    for column, block in enumerate(blocks):
        cells = block["cells"]
        places = range(len(cells))
        for row, (key, label) in enumerate(PANELS):
            axes = panels[row][column]
            for side, name, colour, style in LINES:
                axes.plot(places, [cell[side][key] for cell in cells], style, color=colour, label=name, linewidth=2)
            if key == "tokens_per_s":
                for place, cell in zip(places, cells, strict=True):
                    higher = max(cell[side][key] for side in (STOCK, OURS))
                    axes.annotate(
                        f"{cell['ratio']:.2f}×", (place, higher), xytext=(0, 7), textcoords="offset points", ha="center"
                    )
                axes.set_title(f"{block['slots']} slots")
            axes.margins(y=0.15)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.set_xticks(list(places), [str(cell["adapters"] or "base") for cell in cells])
            axes.tick_params(labelleft=True)
            if column == 0:
                axes.set_ylabel(label)
            if row == 1:
                axes.set_xlabel("adapters in traffic")
    panels[0][0].legend()
    figure.suptitle(f"{result['in_flight']} requests in flight, {result['max_tokens']} tokens each")
    figure.savefig(path)
