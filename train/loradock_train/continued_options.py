"""What an adapter that is gone on from says about itself: where it lies and its options, against the config's.

Reads no weights; continued.py loads them.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loradock_train.config_sections import LoraOptions
from loradock_train.errors import ConfigError, Problem

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FREE = frozenset({"lora_dropout"})
"""What may be another: it is in no weight."""


def adapter_directory(name: str, folder: Path) -> Path:
    """Where the adapter lies; a run directory stands for its checkpoint. Raises ConfigError."""
    path = folder / Path(name).expanduser()
    inside = path / "checkpoint"
    place = inside if not (path / CONFIG).is_file() and (inside / CONFIG).is_file() else path
    missing = [file for file in (CONFIG, WEIGHTS) if not (place / file).is_file()]
    if missing:
        raise ConfigError("the config has 1 problem:", [Problem("adapter_path", f"no {missing[0]} in {path}")])
    return place.resolve()


def adapter_options(directory: Path, given: LoraOptions | None) -> LoraOptions:
    """The adapter's own options, with what the config may say anew. Raises ConfigError with every contradiction."""
    try:
        saved = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        known = {name: saved[name] for name in LoraOptions.model_fields if saved.get(name) is not None}
        known["task_type"] = "CAUSAL_LM"
        own = LoraOptions.model_validate(known)
    except (OSError, ValueError, TypeError, AttributeError, ValidationError) as error:
        told = f"{directory / CONFIG} cannot be gone on from: {str(error).strip().splitlines()[0]}"
        raise ConfigError("the config has 1 problem:", [Problem("adapter_path", told)]) from error
    if given is None:
        return own
    problems = [
        Problem(
            f"lora_config.{name}", f"{_shown(given, name)}, but the adapter of adapter_path has {_shown(own, name)}"
        )
        for name in sorted(given.model_fields_set - FREE)
        if _comparable(given, name) != _comparable(own, name)
    ]
    if problems:
        raise ConfigError("an adapter that is gone on from keeps its shape (leave these keys out):", problems)
    return own.model_copy(update={name: getattr(given, name) for name in FREE & given.model_fields_set})


def _comparable(options: LoraOptions, name: str) -> Any:
    value = getattr(options, name)
    return set(value) if isinstance(value, tuple) else value


def _shown(options: LoraOptions, name: str) -> str:
    value = getattr(options, name)
    return ", ".join(sorted(value)) if isinstance(value, tuple) else str(value)
