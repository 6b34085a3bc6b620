"""The gate's comparison of what a config targets with what was saved and what the base has.

An adapter that lost a part on its way (a shard that was not gathered, a name that drifted) still loads, and answers
worse than it was trained to. A target that the base lacks is no such sign: PEFT lets a list name more modules than a
model has.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from loradock_adapters.base import BaseModel
from loradock_adapters.engine_rules import TOWER_PARTS
from loradock_adapters.findings import Findings
from loradock_adapters.lora_keys import suffixes

_LAYER_NUMBER = re.compile(r"\.(\d{1,9})\.")


def judge_targets(config: Mapping[str, Any], saved: Iterable[str], base: BaseModel, findings: Findings) -> None:
    """`saved` are the modules with factors. Patterns are left alone: they are the trainer's, and nobody's time."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        return
    named = set(targets)
    found = set(saved)
    meant = _meant(named, config, base)
    empty, partly = [], []
    for target, modules in meant.items():
        missing = [module for module in modules if module not in found]
        if missing and len(missing) == len(modules):
            empty.append(target)
        elif missing:
            partly.append(missing[0])
    findings.refuse_all("target_without_tensors", "targeted, the base has it, and nothing was saved for it", empty)
    message = "targeted, but nothing was saved for it, as it was for its like in other layers"
    findings.remark_all("target_layers_missing", message, partly)
    absent = named - {suffix for module in base.modules for suffix in suffixes(module) if suffix in named}
    printable = [ascii(target)[1:-1][:120] for target in sorted(absent)]
    findings.remark_all("target_not_in_base", "the base has no module of this name", printable)
    strays = [m for m in sorted(found) if m in base.modules and named.isdisjoint(suffixes(m))]
    findings.remark_all(
        "tensor_not_targeted", "not among target_modules, but it has tensors, which are applied", strays
    )


def _meant(named: set[str], config: Mapping[str, Any], base: BaseModel) -> dict[str, list[str]]:
    """Target -> the base's modules that PEFT would have given factors.

    Only where every trainer would: see `_is_plain`.
    """
    left_out = {name for key in ("exclude_modules", "modules_to_save") for name in _texts(config.get(key))}
    if isinstance(config.get("exclude_modules"), str):
        return {}  # a pattern
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    wanted = {number for number in numbers if isinstance(number, int)} or None
    meant: dict[str, list[str]] = defaultdict(list)
    for module in base.modules:
        names = set(suffixes(module))
        number = _LAYER_NUMBER.search(module)
        of_wanted_layer = wanted is None or (number is not None and int(number[1]) in wanted)
        if not of_wanted_layer or names & left_out or not _is_plain(module, base):
            continue
        for target in names & named:
            meant[target].append(module)
    return meant


def _is_plain(module: str, base: BaseModel) -> bool:
    """Whether every trainer would target it.

    Not so for experts (files keep them apart, transformers fused, where no target finds them), for what is outside the
    language model (left out in ways of each trainer's own), and for what lies past its last layer.
    """
    in_tower = base.multimodal and not TOWER_PARTS.isdisjoint(module.split("."))
    return ".experts." not in module and not in_tower and not base.is_beyond_layers(module)


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
