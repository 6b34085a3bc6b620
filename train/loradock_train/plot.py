"""The pictures of a run: loss over steps, and which classes are taken for which.

matplotlib is imported when something is drawn, and never opens a window.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the lines of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)


def plot_confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], path: Path) -> None:
    """Rows are what is true, columns what was answered; the numbers stand in the squares of up to 12 classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(12.0, 2.5 + 0.6 * len(labels))
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(matrix, cmap="Blues")
    names = [label if len(label) <= 16 else label[:15] + "…" for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), names)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    middle = max(max(row) for row in matrix) / 2
    for row, counts in enumerate(matrix if len(labels) <= 12 else ()):
        for column, count in enumerate(counts):
            axes.text(column, row, str(count), ha="center", va="center", color="white" if count > middle else "black")
    figure.savefig(path)
