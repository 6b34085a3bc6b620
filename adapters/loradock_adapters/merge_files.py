"""What stands beside merged weights: tokenizer, generation config, chat template, stop tokens. No weights."""

import json
from pathlib import Path
from typing import Any

from loradock_adapters.checkpoint import Checkpoint
from loradock_adapters.filetypes import INITIAL_FOLDERS, role_of

_NOT_COPIED = ("adapter_config.json", "config.json", "loradock.json", "README.md", "LICENSE", "NOTICE")
_OWN_TOKENIZER = ("tokenizer.json", "tokenizer.model")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    return not checkpoint.file_names.isdisjoint(_OWN_TOKENIZER)


def copy_files(source: Path, out: Path) -> None:
    """The tokenizer, the generation config and what else is small; no weights."""
    folders = ["", *(path.name for path in source.iterdir() if path.is_dir() and path.name not in INITIAL_FOLDERS)]
    for folder in folders:
        for path in sorted((source / folder).iterdir()):
            name = f"{folder}/{path.name}" if folder else path.name
            weights = name.endswith((".safetensors", ".safetensors.index.json"))
            if path.is_file() and role_of(name) == "kept" and not weights and name not in _NOT_COPIED:
                (out / name).parent.mkdir(exist_ok=True)
                (out / name).write_bytes(path.read_bytes())


def write_template_and_stops(checkpoint: Checkpoint, out: Path) -> None:
    """The adapter's own chat template and stop tokens, which a model of its own has to bring along."""
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
