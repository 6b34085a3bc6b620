"""`loradock extract FULL --base BASE --rank R`: a full fine-tune's change as a LoRA adapter.

Imports nothing heavy until it is called.

loradock extract runs/full/checkpoint --base runs/base/checkpoint --rank 32 --out runs/full-as-lora
"""

from pathlib import Path
from typing import Annotated

import typer


def extract(
    full: Annotated[Path, typer.Argument(help="The full fine-tune: a checkpoint or run directory.", metavar="FULL")],
    base: Annotated[
        str, typer.Option(help="The base it was made from: a directory, or its hub id if it is in the local cache.")
    ],
    rank: Annotated[int, typer.Option(help="The adapter's rank.", min=1, max=512)],
    out: Annotated[Path | None, typer.Option(help="Where the adapter goes. Default: FULL-r<rank>.")] = None,
    max_error: Annotated[
        float, typer.Option(help="The largest relative error of a layer's change that is accepted.", min=0.0, max=1.0)
    ] = 0.1,
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave these as the base has them: embeddings, norms, biases.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Number format of the adapter: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Make a LoRA adapter of what a full fine-tune changed, and say how much of it is kept."""
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters import console
    from loradock_train.extract_run import extract_to

    found = extract_to(
        full, base, rank, out, max_error=max_error, drop=drop or [], dtype=dtype, show=None if as_json else console.note
    )
    if as_json:
        console.out_json(found)
        return
    rows = [
        [layer["module"], str(layer["rank"]), f"{layer['change']:.3g}", f"{layer['error']:.3g}"]
        for layer in found["layers"]
    ]
    console.out_table(["LAYER", "RANK", "CHANGE", "ERROR"], rows)
    for kind, names in found["lost"].items():
        console.note(f"left as the base has them: {len(names)} {kind}, the first is {names[0]}", "yellow")
    console.note(f"the worst layer keeps all but {found['worst']['error']:.3g} of its change", "green")
    console.out(found["directory"])
