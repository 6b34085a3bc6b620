"""Names in `lora_config` that must mean some module of the model: PEFT leaves out in silence what matches none.

`target_modules` has checks of its own (model.py).
"""

import re
from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from loradock_train.config_sections import LoraOptions
from loradock_train.errors import ModelError


def check_names(model: nn.Module, options: LoraOptions) -> None:
    """Before the model is wrapped: every module that is saved whole or left out is there. Raises ModelError."""
    names = [name for name, _ in model.named_modules()]
    for field in ("modules_to_save", "exclude_modules"):
        for wanted in getattr(options, field):
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                raise ModelError(
                    f"lora_config.{field}: no module {wanted!r} in this model; it has {', '.join(_leaves(names))}"
                )


def check_patterns(wrapped: nn.Module, options: LoraOptions) -> None:
    """After it: every key of rank_pattern and alpha_pattern is for some adapter. Raises ModelError."""
    names = [name for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)]
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(options, field):
            if not any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names):
                raise ModelError(
                    f"lora_config.{field}: no module with an adapter matches {key!r}; those with one are "
                    f"{', '.join(_leaves(names))}"
                )


def _leaves(names: Sequence[str]) -> list[str]:
    """Last parts of the names, without the numbers of layers."""
    return sorted({leaf for name in names if (leaf := name.rsplit(".", 1)[-1]) and not leaf.isdigit()})
