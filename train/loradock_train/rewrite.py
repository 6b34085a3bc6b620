"""What to change in a config so that its adapter can be hot-swapped: one change for each reason of the gate.

Pure: from the options of the adapter and the gate's reasons to changes of keys. Whether the changes suffice is not
claimed here: the rewritten config is judged by the gate as well (check.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loradock_adapters.engine_rules import EngineLimits, ladder_rank
from loradock_adapters.problems import Problem
from loradock_train.config_sections import LoraOptions


@dataclass(frozen=True)
class Change:
    """One key with another value."""

    key: str
    """Dotted."""
    old: Any
    new: Any
    reason: str
    effect: str
    is_optional: bool = False
    """Worth knowing, but nothing that stands in the way."""

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key, "old": _plain(self.old), "new": _plain(self.new), "reason": self.reason,
            "effect": self.effect, "optional": self.is_optional,
        }  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_Rule = Callable[[LoraOptions, Sequence[Problem], EngineLimits], dict[str, tuple[Any, str]]]
"""From the options and the reasons of one code to new values, each with its effect."""


def propose(options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits) -> list[Change]:
    """Changes that take the reasons away, as far as there are any, one for each key.

    What a change brings up in turn shows when its result is judged again.
    """
    found: dict[str, Change] = {}
    for code, rule in _RULES.items():
        of_code = [reason for reason in reasons if reason.code == code]
        for key, (new, effect) in (rule(options, of_code, limits) if of_code else {}).items():
            old = getattr(options, key)
            if (new != old and new != ()) or key == "modules_to_save":
                found.setdefault(key, Change(f"lora_config.{key}", old, new, of_code[0].message, effect))
    return list(found.values())


def untie(options: LoraOptions, tied: Sequence[str]) -> list[Change]:
    """For adapters on an embedding and a head that are one matrix, which training refuses."""
    if isinstance(options.target_modules, str):
        return []
    new, effect = _without(options, tied)
    reason = f"{', '.join(sorted(tied))}: embedding and head of this model are one tied matrix"
    return [Change("lora_config.target_modules", options.target_modules, new, reason, effect)]


def advise_rank(options: LoraOptions, limits: EngineLimits) -> list[Change]:
    """A rank between two steps of vLLM's ladder takes the room of the higher one."""
    step = ladder_rank(options.r)
    if step is None or step == options.r or step > limits.max_lora_rank or options.rank_pattern:
        return []
    scaled = _scaled_alpha(options, step)
    reason = f"vLLM's slots come in ranks of 8, 16, 32, 64, …: rank {options.r} needs slots of rank {step} all the same"
    effect = f"more to learn with, at no cost in slots; with lora_alpha: {scaled:g} the scale of the update stays"
    return [Change("lora_config.r", options.r, step, reason, effect, is_optional=True)]


def _lower_rank(options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits) -> dict[str, tuple[Any, str]]:
    most = limits.max_lora_rank
    changes: dict[str, tuple[Any, str]] = {}
    if options.r > most:
        step = ladder_rank(options.r)
        instead = f"; or serve with engine.max_lora_rank: {step}" if step is not None else ""
        changes["r"] = (most, f"an adapter of {most / options.r:.0%} of the size{instead}")
        changes["lora_alpha"] = (_scaled_alpha(options, most), "the scale of the update stays what it was")
    if any(rank > most for rank in options.rank_pattern.values()):
        capped = {name: min(rank, most) for name, rank in options.rank_pattern.items()}
        changes["rank_pattern"] = (capped, f"these modules have rank {most}")
    return changes


def _scaled_alpha(options: LoraOptions, rank: int) -> float:
    """lora_alpha that scales an update of this rank as before."""
    ratio = rank / options.r
    return float(f"{options.lora_alpha * (math.sqrt(ratio) if options.use_rslora else ratio):.4g}")


def _plain_lora(options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits) -> dict[str, tuple[Any, str]]:
    return {"use_dora": (False, "a plain LoRA of the same rank; a step takes less time and memory")}


def _no_bias(options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits) -> dict[str, tuple[Any, str]]:
    return {"bias": ("none", "biases stay the base's; the adapter's matrices learn alone")}


def _no_whole_modules(
    options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits
) -> dict[str, tuple[Any, str]]:
    names = ", ".join(options.modules_to_save)
    changes: dict[str, tuple[Any, str]] = {
        "modules_to_save": ((), f"{names} is not trained whole, and no whole matrix stands in the checkpoint")
    }
    if not isinstance(options.target_modules, str):
        missing = tuple(name for name in options.modules_to_save if name not in options.target_modules)
        changes["target_modules"] = ((*options.target_modules, *missing), f"{names} gets a low-rank adapter instead")
    return changes


def _no_embeddings(
    options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits
) -> dict[str, tuple[Any, str]]:
    if isinstance(options.target_modules, str):
        return {}
    return {"target_modules": _without(options, [reason.where.rpartition(".")[2] for reason in reasons])}


def _without(options: LoraOptions, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    left = tuple(name for name in options.target_modules if name not in names)
    return left, f"{', '.join(sorted(names))} stays the base's"


def _ordinary_start(
    options: LoraOptions, reasons: Sequence[Problem], limits: EngineLimits
) -> dict[str, tuple[Any, str]]:
    return {"init_lora_weights": (True, "A starts random and B as zero; the base's weights stay as they are")}


_RULES: Mapping[str, _Rule] = {
    "rank_over_limit": _lower_rank,
    "dora": _plain_lora,
    "trained_bias": _no_bias,
    "modules_to_save": _no_whole_modules,
    "embedding_lora": _no_embeddings,
    "vocab_over_limit": _no_embeddings,
    "init_changes_base": _ordinary_start,
    "loftq": _ordinary_start,
}
"""By the gate's code."""
