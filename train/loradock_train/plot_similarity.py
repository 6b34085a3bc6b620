"""similarity.png: the score of every row before and after training, the best after it first. matplotlib is imported
when it is drawn, and never opens a window."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_similarity(scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """scores: for `after`, and where it was measured `before`, one a row, in the order of the rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    order = sorted(range(len(scores["after"])), key=scores["after"].__getitem__)
    for name, style in (("before", "."), ("after", "o")):
        if name in scores:
            mean = sum(scores[name]) / len(scores[name])
            drawn = axes.plot([scores[name][row] for row in order], style, label=f"{name}: {mean:.3f} on average")
            axes.axhline(mean, color=drawn[0].get_color(), linewidth=1, alpha=0.5)
    axes.set_xlabel("rows, the best first")
    axes.set_ylabel("1 - cosine (0 is best)")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_title("similarity of answers and truth")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
