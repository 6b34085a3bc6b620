"""`loradock compare RUN_A RUN_B…`: finished runs in one table. Imports nothing heavy.

loradock compare runs/lora runs/full --plot runs.png
"""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories of `loradock train`, two or more.", metavar="RUN…")
    ],
    plot: Annotated[Path | None, typer.Option(help="Draw the figures as well.", metavar="FILE.png")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compare runs of different data too; what differs is told.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of Markdown.")] = False,
) -> None:
    """Put finished runs side by side: time, memory, size, scores, cost."""
    from loradock_adapters.console import note, out, out_json
    from loradock_train.comparison import compare as compare_runs

    comparison = compare_runs(runs, force=force)
    if plot is not None:
        comparison.plot(plot)
        note(f"drawn in {plot}")
    if as_json:
        out_json(comparison.to_json())
    else:
        out(comparison.markdown().rstrip("\n"))
