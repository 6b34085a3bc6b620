"""The names of an adapter's tensors, taken apart as the engine does it (vllm/lora/utils.py parse_fine_tuned_lora_name).

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   ->  model.layers.0.self_attn.q_proj, A
    base_model.model.model.embed_tokens.lora_embedding_B             ->  model.embed_tokens, B of an embedding

Pure text: whether such a module exists, and with which shape, is the gate's question.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

PEFT_PREFIX = "base_model.model."

Part = Literal[
    "A",
    "B",
    "embedding_A",
    "embedding_B",
    "magnitude",
    "lora_bias",
    "trained_tokens",
    "base_layer",
    "full",
    "bias",
    "unknown",
]

FACTORS: tuple[Part, ...] = ("A", "B", "embedding_A", "embedding_B")

_SUFFIXES: tuple[tuple[str, Part], ...] = (
    (".lora_A.weight", "A"),
    (".lora_B.weight", "B"),
    (".lora_embedding_A", "embedding_A"),
    (".lora_embedding_B", "embedding_B"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_B.bias", "lora_bias"),
    (".token_adapter.trainable_tokens_delta", "trained_tokens"),
    (".trainable_tokens_delta", "trained_tokens"),
    (".base_layer.weight", "base_layer"),
    (".base_layer.bias", "bias"),
)


@dataclass(frozen=True, slots=True)
class LoraKey:
    """One tensor of an adapter: which part of which module's change it is."""

    tensor: str
    module: str
    part: Part


def parse_key(tensor: str) -> LoraKey:
    name = tensor.removeprefix(PEFT_PREFIX)
    for suffix, part in _SUFFIXES:
        if name.endswith(suffix):
            return LoraKey(tensor, name.removesuffix(suffix), part)
    module, _, parameter = name.rpartition(".")
    if "lora_" in name or not module:
        return LoraKey(tensor, name, "unknown")
    plain: dict[str, Part] = {"weight": "full", "bias": "bias"}
    return LoraKey(tensor, module, plain.get(parameter, "unknown"))


# PEFT matches a pattern's key as a regular expression. A hostile one would hang the engine, which evaluates it in its
# loop: no nested repetition, and few repetitions at all.
_MAX_PATTERN_CHARS = 256
_SAFE_PATTERN = re.compile(r"[\w.^$\\|()\[\]*+?:-]*")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_MAX_REPETITIONS = 3


def is_safe_pattern(pattern: str) -> bool:
    """Whether a module-name pattern is one that cannot take long to match."""
    if len(pattern) > _MAX_PATTERN_CHARS or not _SAFE_PATTERN.fullmatch(pattern):
        return False
    if _REPEATED_GROUP.search(pattern) or sum(pattern.count(sign) for sign in "*+?") > _MAX_REPETITIONS:
        return False
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except re.error:
        return False
    return True


class Numbers:
    """The numbers that PEFT and the engine take for modules: that of the first matching pattern, else the general one.

    Only for patterns that `is_safe_pattern`. An adapter may have a pattern for every module (EVA does), so those
    without wildcards are looked up and not searched.
    """

    def __init__(self, general: float, patterns: Mapping[str, float]) -> None:
        self._general = general
        self._literal: dict[str, tuple[int, float]] = {}
        self._wild: list[tuple[int, re.Pattern[str], float]] = []
        for order, (pattern, number) in enumerate(patterns.items()):
            if is_literal(pattern):
                self._literal[pattern] = (order, number)
            else:
                self._wild.append((order, re.compile(rf"(.*\.)?({pattern})$"), number))

    def of(self, module: str) -> float:
        hits = [self._literal[suffix] for suffix in suffixes(module) if suffix in self._literal]
        hits += [(order, number) for order, pattern, number in self._wild if pattern.match(module)]
        return min(hits)[1] if hits else self._general


class RankPatterns:
    """The ranks of modules, by `rank_pattern` and `r`."""

    def __init__(self, rank: int, patterns: Mapping[str, int]) -> None:
        self.largest = max([rank, *patterns.values()])
        self._ranks = Numbers(rank, patterns)

    def rank_of(self, module: str) -> int:
        return int(self._ranks.of(module))


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a plain module name."""
    return re.fullmatch(r"[\w.]+", pattern) is not None


def suffixes(module: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`: the names by which patterns and targets may mean a module."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module
