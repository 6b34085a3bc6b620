"""`loradock inspect PATH [--base BASE]`: the gate's verdict, offline and without anything heavy."""

from pathlib import Path
from typing import Annotated

import typer

from loradock_adapters.commands.options import Json
from loradock_adapters.engine_rules import DEFAULT_MAX_LORA_RANK


def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory, or run directory of `loradock train`.")],
    base: Annotated[
        str | None, typer.Option(help="Directory of the base model, or its hub id if it is in the local cache.")
    ] = None,
    max_lora_rank: Annotated[
        int, typer.Option(help="The server's engine.max_lora_rank.", min=1, max=512)
    ] = DEFAULT_MAX_LORA_RANK,
    json: Json = False,
) -> None:
    """Say what the server would make of a checkpoint. Exit code 1 if it would refuse it."""
    from tempfile import TemporaryDirectory

    from loradock_adapters import console
    from loradock_adapters.base import base_from, find_base
    from loradock_adapters.checkpoint import read_checkpoint
    from loradock_adapters.engine_rules import EngineLimits
    from loradock_adapters.gate import judge
    from loradock_adapters.repair import plan_repair, write_repaired

    checkpoint = read_checkpoint(path)
    served = base_from(find_base(base), model_id=base) if base is not None else None
    limits = EngineLimits(max_lora_rank)
    repair = plan_repair(checkpoint, served, find_base(base) if base is not None else None)
    if repair:  # judged as the server does it: the repaired files, made for a moment
        with TemporaryDirectory(prefix="loradock-") as scratch:
            write_repaired(repair, Path(scratch))
            verdict = judge(read_checkpoint(Path(scratch)), served, limits, found=repair.findings)
    else:
        verdict = judge(checkpoint, served, limits, found=repair.findings)
    size_bytes = sum((checkpoint.directory / name).stat().st_size for name in checkpoint.file_names)
    facts = {
        "directory": str(checkpoint.directory),
        "files": len(checkpoint.file_names),
        "size_bytes": size_bytes,
        "tensors": len(checkpoint.tensors),
        "chat_template": checkpoint.chat_template is not None,
        "stop_token_ids": list(checkpoint.stop_token_ids),
        "repairs": [problem.to_json() for problem in repair.done],
        "trained_on": checkpoint.passport.base.model_id if checkpoint.passport is not None else None,
    }
    if json:
        console.out_json({**verdict.to_json(), **facts})
    else:
        for key, value in {"kind": verdict.kind, "placement": verdict.placement, "rank": verdict.rank, **facts}.items():
            if value not in (None, []) and key != "repairs":
                console.out(f"{key + ':':<16}{value}")
        for problem in repair.done:
            console.out(f"{'would repair:':<16}[{problem.code}] {problem}")
        for line in console.problem_lines(verdict.reasons):
            console.out(line)
    if verdict.placement == "rejected":
        raise typer.Exit(1)
