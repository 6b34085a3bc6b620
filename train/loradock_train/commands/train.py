"""`loradock train CONFIG.yaml`: train what the YAML says. Imports nothing heavy until it is called.

loradock train lora.yaml --set lora_config.r=16 --output runs/lora-16
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer


def _print_schema(wanted: bool) -> None:
    if wanted:
        from loradock_adapters.console import out_json
        from loradock_train.schema import train_schema

        out_json(train_schema())
        raise typer.Exit


def train(
    config: Annotated[Path, typer.Argument(help="The YAML that describes the run.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, dotted: lora_config.r=16.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/<name of the YAML>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's summary as JSON.")] = False,
    _schema: Annotated[
        bool,
        typer.Option(
            "--schema", help="Print the JSON Schema of a config, for editors.", callback=_print_schema, is_eager=True
        ),
    ] = False,
) -> None:
    """Train a LoRA adapter, a full fine-tune, or a model from scratch."""
    from loradock_train.config_file import load_config

    load_config(config, set_ or [])  # a typo is told before the heavy imports, not after ten seconds
    from transformers.utils import logging

    from loradock_adapters.console import err, note, out, out_json
    from loradock_train.errors import RunStopped
    from loradock_train.run import train as run_training

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        run = run_training(config, overrides=set_ or [], output=output, overwrite=overwrite, resume=resume, console=err)
    except RunStopped as stop:
        note(f"stopped at step {stop.step}, saved in {stop.save}; resume with")
        note(f"    {_again(config, set_, output)}")
        return
    if as_json:
        out_json(run.summary)
    else:
        out(str(run.checkpoint))


def _again(config: Path, overrides: list[str] | None, output: Path | None) -> str:
    """The command that goes on with this run."""
    words = ["loradock", "train", str(config)]
    for override in overrides or []:
        words += ["--set", override]
    if output is not None:
        words += ["--output", str(output)]
    return shlex.join([*words, "--resume"])
