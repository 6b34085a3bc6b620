"""A whole extraction: find both checkpoints, take their difference apart, write an adapter that the gate lets pass."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loradock_adapters.base import BaseModel, base_from, find_base
from loradock_adapters.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, read_checkpoint
from loradock_adapters.engine_rules import EngineLimits, ladder_rank
from loradock_adapters.errors import RefusedError, UsageError
from loradock_adapters.gate import judge
from loradock_adapters.passport import Passport, PassportBase, weights_sha256, write_passport
from loradock_train.errors import OutputError
from loradock_train.export import write_atomically
from loradock_train.extract import (
    LOST,
    Extraction,
    adapter_config,
    check,
    extract,
    short_targets,
    summary,
    write_json,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def extract_to(
    full: Path,
    base: str,
    rank: int,
    out: Path | None,
    *,
    max_error: float,
    drop: Sequence[str],
    dtype: str,
    show: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Writes the adapter and returns what was found, with its directory.

    Raises UsageError, OutputError, ExtractError with what would be lost, RefusedError with the gate's problems.
    """
    if unknown := sorted(set(drop) - set(LOST)):
        raise UsageError(f"--drop {unknown[0]!r} is none of {', '.join(LOST)}")
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    checkpoint = read_checkpoint(full)
    if checkpoint.kind != "full":
        raise UsageError(f"{full} is an adapter already; FULL is a full fine-tune")
    directory = out if out is not None else full.with_name(f"{full.resolve().name}-r{rank}")
    if directory.exists():
        raise OutputError(f"{directory} is there already; give another --out")
    base_dir = find_base(base)
    served = base_from(base_dir, model_id=base)
    began = time.monotonic()
    extraction = extract(checkpoint.directory, base_dir, served, rank, max_error, show or (lambda _module: None))
    check(extraction, max_error, drop)
    found = summary(extraction, rank) | {"seconds": round(time.monotonic() - began, 3), "directory": str(directory)}

    def fill(temporary: Path) -> None:
        tensors = {name: tensor.to(_DTYPES[dtype]) for name, tensor in extraction.factors.items()}
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = adapter_config(extraction, base, rank)
        config["target_modules"] = short_targets(config["target_modules"], served)
        write_json(temporary / ADAPTER_CONFIG, config)
        if checkpoint.chat_template is not None:
            (temporary / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
        write_passport(temporary, _passport(checkpoint, base, base_dir, found))
        (temporary / "README.md").write_text(_card(full, base, extraction, found), encoding="utf-8")
        _pass_the_gate(temporary, served, rank)

    write_atomically(directory, fill)
    return found


def _pass_the_gate(directory: Path, base: BaseModel, rank: int) -> None:
    verdict = judge(read_checkpoint(directory), base, EngineLimits(ladder_rank(rank) or rank))
    if verdict.placement == "rejected":
        raise RefusedError(verdict.reasons)


def _passport(checkpoint: Checkpoint, base: str, base_dir: Path, found: dict[str, Any]) -> Passport:
    own = checkpoint.passport
    return Passport(
        base=PassportBase(model_id=base, weights_sha256=weights_sha256(base_dir)),
        tokenizer_sha256=own.tokenizer_sha256 if own is not None else None,
        chat_template=checkpoint.chat_template,
        stop_token_ids=checkpoint.stop_token_ids,
        context_length=own.context_length if own is not None else None,
        metrics={"extracted_rank": found["rank"], "worst_error": found["worst"]["error"]},
        seed=own.seed if own is not None else None,
        data_sha256=own.data_sha256 if own is not None else None,
        versions={package: version(package) for package in ("loradock", "torch")},
        created_at=datetime.now(UTC),
    )


def _card(full: Path, base: str, extraction: Extraction, found: dict[str, Any]) -> str:
    lines = [
        f"# {full.resolve().name} as an adapter",
        "",
        f"What a full fine-tune changed about {base}, as a LoRA of rank {found['rank']}, by truncated SVD.",
        f"The worst layer is {found['worst']['module']}: relative error {found['worst']['error']:.3g}.",
    ]
    lines += [f"Not kept: {len(names)} changed {kind}." for kind, names in extraction.lost.items()]
    return "\n".join(lines) + "\n"
