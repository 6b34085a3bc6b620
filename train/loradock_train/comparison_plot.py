"""The picture of a comparison: a panel for each figure, a bar for each run. Never opens a window."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loradock_train.comparison import RunFacts

COLUMNS = 4


def panels(runs: "Sequence[RunFacts]") -> list[tuple[str, list[float | None]]]:
    """Title, and a value for each run; figures that no run has are left out."""
    metrics = {run.score_metric for run in runs if run.score is not None}
    score_title = f"{metrics.pop()} (score)" if len(metrics) == 1 else "score"
    wanted: list[tuple[str, Callable[[RunFacts], float | None]]] = [
        ("training time (s)", lambda run: run.train_seconds),
        ("peak memory (MB)", lambda run: None if run.peak_memory_bytes is None else run.peak_memory_bytes / 1e6),
        ("checkpoint (MB)", lambda run: run.checkpoint_bytes / 1e6),
        ("trained parameters (%)", lambda run: run.share * 100),
        (score_title, lambda run: run.score),
        ("eval loss (nats per token)", lambda run: run.eval_loss),
        ("push to first token (s)", lambda run: run.first_token_s),
        ("energy (Wh)", lambda run: run.energy_wh),
        ("cost", lambda run: run.price),
    ]
    drawn = [(title, [value(run) for run in runs]) for title, value in wanted]
    return [(title, values) for title, values in drawn if any(value is not None for value in values)]


def plot_comparison(runs: "Sequence[RunFacts]", path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = panels(runs)
    rows = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(3.2 * min(COLUMNS, len(drawn)), 2.8 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    names = [run.name for run in runs]
    colours = [f"C{number}" for number in range(len(runs))]
    for number, (title, values) in enumerate(drawn):
        axes = figure.add_subplot(rows, min(COLUMNS, len(drawn)), number + 1)
        heights = [0.0 if value is None else value for value in values]
        bars = axes.bar(range(len(names)), heights, color=colours)
        axes.bar_label(bars, ["–" if value is None else f"{value:.3g}" for value in values], fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=20 if max(map(len, names)) > 10 else 0)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.15)
    figure.savefig(path)
