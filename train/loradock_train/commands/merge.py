"""`loradock merge ADAPTER OUT --base BASE`: base + adapter as one model. Imports nothing heavy until it is called.

loradock merge runs/lora merged --base runs/base
"""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter: a checkpoint or run directory.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Argument(help="Where the merged model goes.", metavar="OUT")],
    base: Annotated[
        str | None,
        typer.Option(help="Its base: a directory, or its hub id if it is in the local cache. Default: what it names."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the base's weights.")
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove/--no-prove", help="Compare logits before and after; loads the base.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and count; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor, and prove that it answers as before."""
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters import console
    from loradock_train.merging import merge as merge_files

    found = merge_files(
        adapter,
        out,
        base=base,
        dtype=dtype,
        prove=prove,
        dry_run=dry_run,
        tell=console.note,
    )
    if as_json:
        console.out_json(found)
        return
    if "tensors" in found:
        size = console.size(found["bytes"])
        console.note(f"{found['changed']} of {found['tensors']} tensors changed, {size} in {found['files']} files")
    if "proof" in found:
        told = f"{found['proof']['difference']:.3g} logits from base + adapter, {found['proof']['from_base']:.3g}"
        console.note(f"proven on {found['proof']['prompts']} prompts: {told} from the base alone", "green")
    console.out("nothing was written" if dry_run else found["directory"])
