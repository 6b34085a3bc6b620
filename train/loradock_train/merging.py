"""An adapter merged into its base, or a checkpoint made ready for other tools: `loradock merge` and `loradock export`.

Tensor by tensor (merge_plan.py and merge_stream.py of loradock_adapters): what the merge itself holds in memory does
not grow with the base. The proof does: it loads base and result, one after the other, and compares their logits.
Everything is written under a temporary name and renamed when it is proven.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from loradock_adapters.base import base_from, find_base
from loradock_adapters.checkpoint import ADAPTER_CONFIG, Checkpoint, read_checkpoint, resolve_checkpoint_dir
from loradock_adapters.engine_rules import EngineLimits
from loradock_adapters.errors import RefusedError, UsageError
from loradock_adapters.gate import judge
from loradock_adapters.merge_files import copy_files, has_tokenizer, write_template_and_stops
from loradock_adapters.merge_plan import MergePlan, NotPlainError, plan_copy, plan_merge, sharded
from loradock_adapters.passport import Passport, PassportBase, weights_sha256, write_passport
from loradock_train.errors import ModelError, OutputError

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
SHARD_BYTES = 5_000_000_000
MAX_RANK = 1 << 12
"""Merging sets no limit on the rank."""


@dataclass(frozen=True)
class Request:
    """A merge, checked and planned; nothing is written yet."""

    checkpoint: Checkpoint
    base: str | None
    """None: the checkpoint is a full model, and nothing is merged."""
    base_dir: Path
    plan: MergePlan | None
    """None: only PEFT knows how, with the base in memory."""
    why_peft: str | None
    dtype: str | None
    base_sha256: str | None

    def figures(self) -> dict[str, Any]:
        """What it would make, without making it."""
        if self.plan is None:
            return {"how": "PEFT, the base in memory", "why": self.why_peft}
        tensors = [tensor for file in self.plan.files.values() for tensor in file.values()]
        changed = [change.replaced for change in self.plan.changes.values() if change.replaced is not None]
        items = [(tensor, ITEM_BYTES.get(self.dtype or "", tensor.item_bytes)) for tensor in tensors]
        return {
            "how": "tensor by tensor",
            "tensors": len(tensors),
            "changed": len(self.plan.changes),
            "replaced": len(changed),
            "files": len(self.plan.files),
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "bytes": sum(math.prod(tensor.shape) * item_bytes for tensor, item_bytes in items),
        }


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    prove: bool = True,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Write base + adapter as one model to `out`, and return what was made.

    base: directory, run directory or cached hub id; default the one that the adapter names. dtype: of the new weights;
    default the base's. shard_bytes: size of a file; default as the base has them. prove: compare the logits of base +
    adapter with those of the merged model on the passport's probe prompts. dry_run: check and count, write nothing.
    Raises UsageError and its kin (another base, a quantised base, `out` is there), RefusedError (the gate's
    problems), ProofError.
    """
    request = plan_request(Path(adapter), Path(out), base, dtype, shard_bytes)
    if request.base is None:
        raise UsageError(f"{adapter} is a full model already: there is nothing to merge (`loradock export` copies it)")
    found = request.figures()
    if dry_run:
        return found
    return found | write(request, Path(out), prove, tell)


def plan_request(path: Path, out: Path, base: str | None, dtype: str | None, shard_bytes: int | None) -> Request:
    """Everything that can be refused, before anything is written."""
    code = _code(dtype)
    if out.exists():
        raise OutputError(f"{out} is there already; give another directory")
    checkpoint = read_checkpoint(path)
    if checkpoint.problems:
        raise RefusedError(checkpoint.problems)
    plan: MergePlan | None = None
    why: str | None = None
    digest: str | None = None
    if checkpoint.kind == "full":
        base, base_dir = None, checkpoint.directory
        _refuse_quantised(str(path), checkpoint.config)
    else:
        base = base if base is not None else _named_base(checkpoint)
        base_dir = resolve_checkpoint_dir(find_base(base))
        digest = _check_base(checkpoint, base, base_dir)
    try:
        plan = plan_copy(base_dir) if base is None else plan_merge(base_dir, checkpoint)
    except NotPlainError as reason:
        why = str(reason)
    if plan is None and (base is None or code is not None or shard_bytes is not None):
        raise ModelError(
            f"{path}: {why}; only PEFT can merge this, into the base's own format: `loradock merge` without --dtype"
        )
    if plan is not None and shard_bytes is not None:
        plan = sharded(plan, shard_bytes, ITEM_BYTES[code] if code is not None else None)
    if plan is not None and code is not None:
        settings = {key: value for key, value in plan.config.items() if key != "torch_dtype"}
        plan = replace(plan, config=settings | {"dtype": dtype})
    return Request(checkpoint, base, base_dir, plan, why, code, digest)


def _code(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in CODES:
        raise UsageError(f"--dtype {dtype!r} is none of {', '.join(CODES)}")
    return None if dtype is None else CODES[dtype]


def _named_base(checkpoint: Checkpoint) -> str:
    passport = checkpoint.passport
    name = passport.base.model_id if passport is not None else checkpoint.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{checkpoint.directory} does not say which base it is for; give --base")
    return name


def _refuse_quantised(name: str, config: Any) -> None:
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else "unknown method"
        raise ModelError(
            f"{name} is quantised ({method}): rounded weights cannot take up an adapter's small changes; "
            "merge into the unquantised model that it was made from"
        )


def _check_base(checkpoint: Checkpoint, base: str, base_dir: Path) -> str:
    """The hash of the base's weights. Raises ModelError for a quantised or another base, RefusedError where the adapter
    cannot be this base's."""
    served = base_from(base_dir, model_id=base)
    _refuse_quantised(base, served.config)
    digest = weights_sha256(base_dir)
    wanted = checkpoint.passport.base.weights_sha256 if checkpoint.passport is not None else None
    if wanted is not None and wanted != digest:
        named = checkpoint.passport.base.model_id if checkpoint.passport is not None else ""
        raise ModelError(
            f"{checkpoint.directory} was trained on another base: its passport names {named} with weights "
            f"{wanted[:12]}…, {base} has {digest[:12]}…; give that base with --base"
        )
    verdict = judge(checkpoint, served, EngineLimits(MAX_RANK), check_values=False)
    if verdict.placement == "rejected":
        raise RefusedError(verdict.reasons)
    return digest


# ---- writing --------------------------------------------------------------------------------------------------------


def write(request: Request, out: Path, prove: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Write and prove what was planned. torch is imported now."""
    from loradock_adapters.merge_stream import BrokenAdapterError, write_merged
    from loradock_train.errors import ProofError
    from loradock_train.export import write_atomically
    from loradock_train.merging_proof import prove_merged

    checkpoint, made = request.checkpoint, {}

    def fill(temporary: Path) -> None:
        if request.plan is None:
            from loradock_adapters.merge_peft import merge_with_peft

            tell(f"merging with PEFT, the base in memory: {request.why_peft}")
            merge_with_peft(str(request.base_dir), checkpoint.directory, temporary)
        else:
            try:
                write_merged(request.plan, temporary, request.dtype)
            except BrokenAdapterError as error:
                raise ProofError(str(error)) from error
            copy_files(request.base_dir, temporary)
        if has_tokenizer(checkpoint):
            copy_files(checkpoint.directory, temporary)
        write_template_and_stops(checkpoint, temporary)
        proof = prove_merged(request, temporary) if prove else None
        if proof is not None:
            made["proof"] = {"difference": proof.reloaded_difference, "prompts": len(proof.prompts)}
            made["proof"] |= {"from_base": proof.base_difference} if request.base is not None else {}
        passport = _passport(request)
        entry = proof.passport_entry() if proof is not None and request.base is not None else None
        write_passport(temporary, passport.model_copy(update={"probe": entry}))
        (temporary / "README.md").write_text(_card(request, out.name), encoding="utf-8")

    write_atomically(out, fill)
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"directory": str(out), "checkpoint_bytes": size_bytes, **made}


def _passport(request: Request) -> Passport:
    """The checkpoint's own, as that of a full model made now; its base stays what it was."""
    own = request.checkpoint.passport
    base = PassportBase(model_id=request.base or str(request.base_dir), weights_sha256=request.base_sha256)
    if own is None:
        return Passport(base=base, created_at=datetime.now(UTC))
    metrics = own.metrics | ({"merged_adapter": request.checkpoint.directory.resolve().name} if request.base else {})
    return own.model_copy(update={"metrics": metrics, "created_at": datetime.now(UTC)})


def _card(request: Request, name: str) -> str:
    source = request.checkpoint.directory.resolve()
    label = source.parent.name if source.name == "checkpoint" else source.name
    base = (request.base or "").rstrip("/").rsplit("/", 1)[-1]
    what = f"The adapter {label} merged into its base {base}" if request.base is not None else f"The model {label}"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- loradock\n---\n\n# {name}\n\n"
        f"{what}, written by Loradock as safetensors that transformers, vLLM and others load as they are.\n"
    )


# ---- PEFT's layout --------------------------------------------------------------------------------------------------


def export_adapter(path: Path, out: Path, *, base_name: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The adapter in PEFT's layout without any matrix of its base, for tools that load adapters. Raises as `merge`."""
    import json

    code = _code(dtype)
    if out.exists():
        raise OutputError(f"{out} is there already; give another directory")
    checkpoint = read_checkpoint(path)
    if checkpoint.problems:
        raise RefusedError(checkpoint.problems)
    if checkpoint.kind == "full":
        raise UsageError(
            f"{path} is a full model and has no adapter: export it with --format merged, "
            "or make an adapter of what it changed with `loradock extract`"
        )
    from loradock_adapters.checkpoint import ADAPTER_WEIGHTS
    from loradock_adapters.merge_stream import cast
    from loradock_adapters.tensor_files import stream_of, write_safetensors
    from loradock_train.export import write_atomically

    source = checkpoint.directory / ADAPTER_WEIGHTS
    kept = {name: info for name, info in checkpoint.tensors.items() if ".base_layer." not in name}
    config = dict(checkpoint.config) | ({} if base_name is None else {"base_model_name_or_path": base_name})

    def fill(temporary: Path) -> None:
        copy_files(checkpoint.directory, temporary)
        streams = {name: cast(name, stream_of(source, info), code) for name, info in kept.items()}
        write_safetensors(temporary / ADAPTER_WEIGHTS, streams)
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in ("README.md", "loradock.json"):
            if (checkpoint.directory / name).is_file():
                (temporary / name).write_bytes((checkpoint.directory / name).read_bytes())

    write_atomically(out, fill)
    size_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {
        "directory": str(out),
        "base": config.get("base_model_name_or_path"),
        "tensors": len(kept),
        "left_out": len(checkpoint.tensors) - len(kept),
        "checkpoint_bytes": size_bytes,
    }


def export_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    form: Literal["peft", "merged"] | None = None,
    base: str | None = None,
    base_name: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    prove: bool = True,
    tell: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Make a run's checkpoint ready for other tools.

    form: `peft` (the adapter alone) or `merged` (a whole model); default by what the checkpoint is. base_name: what the
    adapter shall call its base elsewhere, a hub id. dtype: default bfloat16 for a merged model, the adapter's own else.
    Raises as `merge`.
    """
    checkpoint = read_checkpoint(Path(path))
    if form is None:
        form = "peft" if checkpoint.kind == "lora" else "merged"
    if form == "peft":
        return export_adapter(Path(path), Path(out), base_name=base_name, dtype=dtype)
    request = plan_request(Path(path), Path(out), base, dtype or "bfloat16", shard_bytes)
    return request.figures() | write(request, Path(out), prove, tell)
