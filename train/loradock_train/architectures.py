"""Architectures by name: `model: {name: gpt2-small}` stands for the fields of a transformers config.

Fields that stand beside the name win. The vocabulary is the tokenizer's: with GPT-2's own (50,257 entries) gpt2-small
has 124,439,808 parameters.
"""

import difflib
from collections.abc import Mapping
from typing import Any

_GPT2 = {"model_type": "gpt2", "n_positions": 1024}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2-small": {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-small-6-layers": {**_GPT2, "n_embd": 768, "n_layer": 6, "n_head": 12},
    "gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-1b": {**_GPT2, "n_positions": 512, "n_embd": 1600, "n_layer": 32, "n_head": 32},
}


def with_named(model: Any) -> Any:
    """The fields with their name replaced by what it stands for. Raises ValueError for an unknown one."""
    if not isinstance(model, Mapping) or "name" not in model:
        return model
    name = str(model["name"])
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(ARCHITECTURES)}"
        raise ValueError(f"unknown architecture {name!r}; {known}")
    return {**ARCHITECTURES[name], **{key: value for key, value in model.items() if key != "name"}}
