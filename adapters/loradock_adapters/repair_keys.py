"""The first repair: tensor names that drifted from PEFT's, put back under the names of the base's own modules.

    base_model.model.                      missing, or there twice
    _orig_mod., module., _fsdp_wrapped_module., _checkpoint_wrapped_module.     left by compile, DDP, FSDP and others
    .lora_A.default.weight                 the adapter's name, which save_pretrained leaves out
    .modules_to_save.default.weight        the same, for whole modules
    model.language_model.layers            where the base has language_model.model.layers, or model.layers

Only where there is one way to read every tensor: each ends up on a module that the base has, under one name, no two on
the same, in the shape that the base asks for. Else nothing is renamed, and the gate says what is wrong.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loradock_adapters.base import BaseModel
from loradock_adapters.lora_keys import PEFT_PREFIX, LoraKey, parse_key, suffixes
from loradock_adapters.safetensors_header import TensorInfo
from loradock_adapters.tensor_files import TensorStream

_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that wrappers put in, which no model's own module is called."""
_NESTING = frozenset({"base_model", "model", "language_model", "text_model", "module", "transformer"})
"""Parts before the first layer that differ between versions of one architecture, and between tools."""

_NAMED = (
    (re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.(?P<name>[\w-]+)\.(?P<end>weight|bias)"), "{part}.{end}"),
    (re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_[AB])\.(?P<name>[\w-]+)"), "{part}"),
    (re.compile(r"(?P<module>.+)\.lora_magnitude_vector\.(?P<name>(?!weight$)[\w-]+)(\.weight)?"), "{magnitude}"),
    (re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<name>[\w-]+)\.(?P<end>weight|bias)"), "{end}"),
)
"""Names as they are inside a PEFT model, with the adapter's own name in them."""
_KEPT_ORIGINAL = ".original_module.weight"


@dataclass(frozen=True, slots=True)
class Renaming:
    """How an adapter's tensors should be called."""

    names: Mapping[str, str]
    """Every tensor's name -> its name in PEFT's layout."""
    modules: Mapping[str, str]
    """Of the modules whose place differs: as it was called -> as the base calls it."""

    @property
    def changed(self) -> list[str]:
        return [old for old, new in self.names.items() if old != new]


def plan_renaming(tensors: Mapping[str, TensorInfo] | Mapping[str, TensorStream], base: BaseModel) -> Renaming | None:
    """The one way to read all names; None where there is none or more than one."""
    if not base.known:
        return None
    places = _places(base)
    names: dict[str, str] = {}
    modules: dict[str, str] = {}
    adapter_names: set[str] = set()
    for tensor in tensors:
        text, adapter_name = _without_adapter_name(_without_wrappers(tensor))
        if adapter_name is not None:
            adapter_names.add(adapter_name)
        key = parse_key(text)
        module = _place(key.module, base, places)
        if key.part == "unknown" or module is None:
            return None
        names[tensor] = PEFT_PREFIX + module + text.removeprefix(PEFT_PREFIX)[len(key.module) :]
        if module != key.module:
            modules[key.module] = module
    if len(adapter_names) > 1 or len(set(names.values())) != len(names):
        return None
    fits = _fits({new: tensors[old].shape for old, new in names.items()}, base)
    return Renaming(names, modules) if fits else None


def renamed_config(config: Mapping[str, Any], renaming: Renaming) -> dict[str, Any]:
    """The config with the modules that it names in full called as the base calls them."""
    changed = dict(config)
    moved = _moved(renaming)
    for setting in ("rank_pattern", "alpha_pattern"):
        if isinstance(patterns := config.get(setting), Mapping) and patterns:
            changed[setting] = {moved.get(pattern, pattern): value for pattern, value in patterns.items()}
    targets = config.get("target_modules")
    if isinstance(targets, list):
        changed["target_modules"] = [
            moved.get(target, target) if isinstance(target, str) else target for target in targets
        ]
    elif isinstance(targets, str) and renaming.modules:  # a pattern over the old names
        keys = (parse_key(name) for name in renaming.names.values())
        changed["target_modules"] = sorted({key.module for key in keys if key.part in ("A", "embedding_A")})
    return changed


def _moved(renaming: Renaming) -> dict[str, str]:
    """Names that meant a module where it was, and do not where it is: the module's name now."""
    moved: dict[str, str] = {}
    for old, new in renaming.modules.items():
        still = set(suffixes(new))
        for name in suffixes(old):
            if "." in name and name not in still:
                moved.setdefault(name, new)
    return moved


def _without_wrappers(tensor: str) -> str:
    parts = [part for part in tensor.split(".") if part not in _ANYWHERE]
    while parts[:1] == ["module"]:
        del parts[0]
    return ".".join(parts)


def _without_adapter_name(tensor: str) -> tuple[str, str | None]:
    """The name as save_pretrained would write it, and the adapter's name that was in it."""
    if tensor.endswith(_KEPT_ORIGINAL):  # modules_to_save keeps the base's own module beside the copy that it trains
        return tensor.removesuffix(_KEPT_ORIGINAL) + ".base_layer.weight", None
    for pattern, form in _NAMED:
        found = pattern.fullmatch(tensor)
        if found is not None:
            end = form.format(**{**found.groupdict(), "magnitude": "lora_magnitude_vector"})
            return f"{found['module']}.{end}", found["name"]
    return tensor, None


def _places(base: BaseModel) -> dict[str, list[str]]:
    """The base's modules by their names without what comes before the first layer."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in {*base.modules, *(name.rpartition(".")[0] for name in base.tensor_names)}:
        places[_core(module)].append(module)
    return places


def _core(module: str) -> str:
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _NESTING:
        del parts[0]
    return ".".join(parts)


def _place(module: str, base: BaseModel, places: Mapping[str, list[str]]) -> str | None:
    """What the base calls a module: the very name, or the only one with the same core."""
    if base.has(module):
        return module
    candidates = places.get(_core(module), [])
    return candidates[0] if len(candidates) == 1 else None


def _fits(shapes: Mapping[str, tuple[int, ...]], base: BaseModel) -> bool:
    """Whether the factors come in pairs of the base's shapes. What else is wrong with them the gate says."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key in _factors(shapes):
        pairs[key.module][key.part] = shapes[key.tensor]
    for module, pair in pairs.items():
        a, b = pair.get("A", pair.get("embedding_A")), pair.get("B", pair.get("embedding_B"))
        shape = base.modules.get(module)
        if shape is None or a is None or b is None or len(a) != 2 or len(b) != 2 or len(pair) != 2:
            return False
        wanted = shape[::-1] if "embedding_A" in pair else shape
        if (b[0], a[1]) != wanted or a[0] != b[1]:
            return False
    return True


def _factors(names: Iterable[str]) -> list[LoraKey]:
    keys = [parse_key(name) for name in names]
    return [key for key in keys if key.part in ("A", "B", "embedding_A", "embedding_B")]
