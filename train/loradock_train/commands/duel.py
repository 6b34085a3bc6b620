"""`loradock duel CONFIG.yaml`: LoRA and full-parameter training from one config, compared.

loradock duel lora.yaml --full-learning-rate 2e-5
"""

from pathlib import Path
from typing import Annotated

import typer


def duel(
    config: Annotated[Path, typer.Argument(help="The YAML of the LoRA run.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key of both, dotted.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where both runs go. Default: runs/<name of the YAML>-duel.")
    ] = None,
    full_learning_rate: Annotated[
        float | None, typer.Option(help="Of the full-parameter leg. Default: a tenth of LoRA's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew what is already there.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures as well.", metavar="FILE.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of Markdown.")] = False,
) -> None:
    """Train a config twice, with LoRA and with all parameters, and compare the two."""
    from loradock_adapters.console import note, out, out_json
    from loradock_train.duelling import DuelStopped
    from loradock_train.duelling import duel as run_duel

    try:
        comparison = run_duel(
            config,
            overrides=set_ or [],
            output=output,
            full_learning_rate=full_learning_rate,
            overwrite=overwrite,
            tell=lambda line: note(f"note: {line}"),
        )
    except DuelStopped as stop:
        note(str(stop))
        return
    if plot is not None:
        comparison.plot(plot)
        note(f"drawn in {plot}")
    if as_json:
        out_json(comparison.to_json())
    else:
        out(comparison.markdown().rstrip("\n"))
