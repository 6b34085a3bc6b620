"""`loradock train CONFIG.yaml`: train what the YAML says. Imports nothing heavy until it is called.

loradock train lora.yaml --set lora_config.r=16 --output runs/lora-16
"""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="The YAML that describes the run.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, dotted: lora_config.r=16.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/<name of the YAML>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's summary as JSON.")] = False,
) -> None:
    """Train a LoRA adapter, a full fine-tune, or a model from scratch."""
    from loradock_train.config_file import load_config

    load_config(config, set_ or [])  # a typo is told before the heavy imports, not after ten seconds
    from transformers.utils import logging

    from loradock_adapters.console import err, out, out_json
    from loradock_train.run import train as run_training

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    run = run_training(config, overrides=set_ or [], output=output, overwrite=overwrite, console=err)
    if as_json:
        out_json(run.summary)
    else:
        out(str(run.checkpoint))
