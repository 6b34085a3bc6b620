"""`loradock export RUN OUT`: a checkpoint for other tools. Imports nothing heavy until it is called.

loradock export runs/lora exported --format merged
"""

from pathlib import Path
from typing import Annotated

import typer


def export(
    path: Annotated[Path, typer.Argument(help="A run or checkpoint directory.", metavar="RUN")],
    out: Annotated[Path, typer.Argument(help="Where it goes.", metavar="OUT")],
    form: Annotated[
        str | None,
        typer.Option("--format", help="peft (the adapter alone) or merged (a whole model). Default: as it is."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base to merge into. Default: what the adapter names.")] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What the adapter shall call its base elsewhere: a hub id.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 merged, else as it is.")
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest file of a merged model, in GB.", min=0.000001)] = 5.0,
    prove: Annotated[bool, typer.Option("--prove/--no-prove", help="Compare logits before and after.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Write an adapter or a whole model in the layout that other tools load."""
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters import console
    from loradock_adapters.errors import UsageError
    from loradock_train.merging import export_checkpoint as export_files

    if form not in (None, "peft", "merged"):
        raise UsageError(f"--format {form!r} is none of peft, merged (GGUF: convert the merged model with llama.cpp)")
    found = export_files(
        path,
        out,
        form=form,  # type: ignore[arg-type]
        base=base,
        base_name=base_name,
        dtype=dtype,
        shard_bytes=int(shard_gb * 1e9),
        prove=prove,
        tell=console.note,
    )
    if as_json:
        console.out_json(found)
        return
    named = found.get("base")
    if isinstance(named, str) and Path(named).is_absolute():
        console.note(f"its base is a directory of this machine, {named}; --base-name gives it another name", "yellow")
    if found.get("left_out"):
        console.note(f"left out: {found['left_out']} matrices of the base itself, which the base brings", "yellow")
    console.note(f"{found['tensors']} tensors, {console.size(found['checkpoint_bytes'])}", "green")
    console.out(found["directory"])
