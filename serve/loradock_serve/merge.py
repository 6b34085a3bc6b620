"""Merge an adapter into its base, for an engine of its own: `python -m loradock_serve.merge BASE ADAPTER OUT`.

Tensor by tensor where that is all there is to it (merge_plan.py, merge_stream.py): a few hundred MB of memory, whatever
the base's size. Else with PEFT, which holds the base once, in the checkpoint's own format. A process of its own, with a
limit on its memory, which is gone afterwards. `OUT` is complete or the status is not 0.
"""

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

from loradock_adapters.base import find_base
from loradock_adapters.checkpoint import Checkpoint, read_checkpoint
from loradock_adapters.errors import LoradockError, NotFoundError
from loradock_adapters.filetypes import INITIAL_FOLDERS, role_of
from loradock_serve.merge_plan import MergePlan, NotPlainError, plan_merge

_GIB = 1 << 30
_NOT_COPIED = ("adapter_config.json", "config.json", "loradock.json", "README.md", "LICENSE", "NOTICE")
_OWN_TOKENIZER = ("tokenizer.json", "tokenizer.model")


def merge(base: str, adapter: Path, out: Path) -> None:
    """Write full weights and a tokenizer to `out`."""
    checkpoint = read_checkpoint(adapter)
    out.mkdir(parents=True)
    try:
        base_dir = find_base(base)
        plan = plan_merge(base_dir, checkpoint)
    except (NotPlainError, LoradockError, OSError) as reason:
        _say(f"merging with PEFT, the base in memory: {reason}")
        _merge_with_peft(base, adapter, out)
    else:
        _merge_streamed(plan, out)
        _copy_files(base_dir, out)
    if _has_tokenizer(checkpoint):
        _copy_files(adapter, out)
    _write_template_and_stops(checkpoint, out)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    _say(f"merged; at most {peak_mib} MiB were in memory")


def _merge_streamed(plan: MergePlan, out: Path) -> None:
    from loradock_serve.merge_stream import BLOCK_BYTES, write_merged

    _bound_memory(2 * _GIB + 8 * plan.largest_factor_bytes + 16 * BLOCK_BYTES)
    _say(f"merging tensor by tensor: {len(plan.changes)} are changed")
    write_merged(plan, out)


def _merge_with_peft(base: str, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (weights := _weights(base, adapter)) is not None:  # else they come from the Hub, at a size that nobody knows yet
        _bound_memory(6 * _GIB + 4 * sum(path.stat().st_size for path in weights))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", low_cpu_mem_usage=True)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(out))
    AutoTokenizer.from_pretrained(base).save_pretrained(str(out))


def _weights(base: str, adapter: Path) -> list[Path] | None:
    with contextlib.suppress(NotFoundError):
        return [path for folder in (find_base(base), adapter) for path in folder.glob("*.safetensors")]
    return None


def _bound_memory(limit_bytes: int) -> None:
    """Beyond this, allocating fails here, before the host runs out. Files that are mapped do not count."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    return not checkpoint.file_names.isdisjoint(_OWN_TOKENIZER)


def _copy_files(source: Path, out: Path) -> None:
    """The tokenizer, the generation config and what else is small; no weights."""
    folders = ["", *(path.name for path in source.iterdir() if path.is_dir() and path.name not in INITIAL_FOLDERS)]
    for folder in folders:
        for path in sorted((source / folder).iterdir()):
            name = f"{folder}/{path.name}" if folder else path.name
            weights = name.endswith((".safetensors", ".safetensors.index.json"))
            if path.is_file() and role_of(name) == "kept" and not weights and name not in _NOT_COPIED:
                (out / name).parent.mkdir(exist_ok=True)
                (out / name).write_bytes(path.read_bytes())


def _write_template_and_stops(checkpoint: Checkpoint, out: Path) -> None:
    """The adapter's own chat template and stop tokens, which the gateway leaves to an engine of its own."""
    if checkpoint.chat_template is not None:
        (out / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    path = out / "generation_config.json"
    own = checkpoint.directory / "generation_config.json"
    source = own if own.is_file() else path
    settings: dict[str, Any] = json.loads(source.read_text()) if source.is_file() else {}
    known = settings.get("eos_token_id")
    stops = [token for token in (known if isinstance(known, list) else [known]) if isinstance(token, int)]
    stops += [token for token in checkpoint.stop_token_ids if token not in stops]
    if stops:
        settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    if settings:
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    merge(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
