"""What merging an adapter does to each tensor of its base, decided from names, shapes and configs alone.

Knows LoRA, rsLoRA and DoRA on linear layers and embeddings, rank and alpha patterns, whole modules, biases and token
rows, on bases whose weights are plain matrices under the names of their modules. Whatever else it meets is a
`NotPlainError`: then PEFT merges. Reads no values and does no arithmetic (merge_stream.py).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loradock_adapters.base_shapes import text_config
from loradock_adapters.checkpoint import ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_INDEX, MODEL_WEIGHTS, Checkpoint
from loradock_adapters.engine_rules import FEATURES
from loradock_adapters.lora_keys import Numbers, Part, parse_key
from loradock_adapters.safetensors_header import read_header
from loradock_adapters.tensor_files import TensorStream, stream_of

OUTPUT_MODULE = "lm_head"
_EMBEDDINGS = ("model.embed_tokens", "embed_tokens", "transformer.wte", "wte")
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc")}
"""Families with matrices stored [in, out], and which these are."""
_OTHER_CONV1D = frozenset({"openai-gpt", "imagegpt", "decision_transformer", "ctrl"})
_MERGED_SETTINGS = frozenset({"use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices"})
_FLOATS = frozenset({"F16", "BF16", "F32"})


class NotPlainError(Exception):
    """Something that only PEFT's own merge knows how to do."""


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base. In this order: replaced, then its rows, then A and B, then the norm."""

    replaced: TensorStream | None = None
    """Instead of the base's values, perhaps with more rows."""
    token_rows: TensorStream | None = None
    tokens: tuple[int, ...] = ()
    a: TensorStream | None = None
    """[rank, in]"""
    b: TensorStream | None = None
    """[out, rank]"""
    scaling: float = 1.0
    magnitude: TensorStream | None = None
    """DoRA's, [out]."""
    added_bias: TensorStream | None = None
    transposed: bool = False
    """The base's matrix is [in, out]: embeddings, and GPT-2's layers."""


@dataclass
class MergePlan:
    """The new weights: file -> tensor -> (what the base has there, what becomes of it)."""

    files: dict[str, dict[str, TensorStream]]
    changes: dict[str, Change]
    """By tensor name; what is not here is copied."""
    config: dict[str, Any]
    index: dict[str, Any] | None = None

    @property
    def largest_factor_bytes(self) -> int:
        """Of any A, B or magnitude, as float32: these are held in memory."""
        parts = (part for change in self.changes.values() for part in (change.a, change.b, change.magnitude))
        return max((math.prod(part.shape) * 4 for part in parts if part is not None), default=0)


def plan_copy(directory: Path) -> MergePlan:
    """A model as it stands, with nothing merged into it. Raises NotPlainError where it has no safetensors."""
    files, index = _base_files(directory)
    return MergePlan(files, {}, json.loads((directory / MODEL_CONFIG).read_text()), index)


def sharded(plan: MergePlan, shard_bytes: int, item_bytes: int | None = None) -> MergePlan:
    """The same plan with files of at most this size (a larger tensor has one of its own), named as transformers does.

    `item_bytes`: of a number in the new files, where the format changes.
    """
    shards: list[dict[str, TensorStream]] = [{}]
    filled_bytes = 0
    for file in plan.files.values():
        for name, tensor in file.items():
            is_cast = item_bytes is not None and tensor.dtype in _FLOATS
            size_bytes = tensor.size_bytes // tensor.item_bytes * (item_bytes or 1) if is_cast else tensor.size_bytes
            if shards[-1] and filled_bytes + size_bytes > shard_bytes:
                shards.append({})
                filled_bytes = 0
            shards[-1][name] = tensor
            filled_bytes += size_bytes
    if len(shards) == 1:
        return replace(plan, files={MODEL_WEIGHTS: shards[0]}, index=None)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return replace(plan, files=dict(zip(names, shards, strict=True)), index={})


def plan_merge(base_dir: Path, checkpoint: Checkpoint) -> MergePlan:
    """The plan, or NotPlainError."""
    config = json.loads((base_dir / MODEL_CONFIG).read_text())
    _check_settings(config, checkpoint.config)
    files, index = _base_files(base_dir)
    planner = _Planner(files, config, checkpoint)
    for name, info in checkpoint.tensors.items():
        planner.add(name, stream_of(checkpoint.directory / ADAPTER_WEIGHTS, info))
    planner.untie()
    planner.check()
    return MergePlan(planner.files, planner.changes, planner.config, index)


def _check_settings(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise NotPlainError("the base is quantised")
    if config.get("model_type") in _OTHER_CONV1D:
        raise NotPlainError(f"the layout of {config['model_type']} is not known")
    for setting in ("ensure_weight_tying", "target_parameters", "megatron_config"):
        if adapter.get(setting):
            raise NotPlainError(f"the adapter sets {setting}")
    for feature in FEATURES:
        if feature.setting not in _MERGED_SETTINGS and feature.used(adapter.get(feature.setting)):
            raise NotPlainError(f"the adapter sets {feature.setting}")


def _base_files(base_dir: Path) -> tuple[dict[str, dict[str, TensorStream]], dict[str, Any] | None]:
    index: dict[str, Any] | None = None
    names = [MODEL_WEIGHTS]
    if not (base_dir / MODEL_WEIGHTS).is_file():
        if not (base_dir / MODEL_INDEX).is_file():
            raise NotPlainError("the base has no safetensors weights here")
        index = json.loads((base_dir / MODEL_INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
    files = {}
    for name in names:
        path = base_dir / name
        files[name] = {tensor: stream_of(path, info) for tensor, info in read_header(path).items()}
    return files, index


@dataclass
class _Planner:
    files: dict[str, dict[str, TensorStream]]
    config: dict[str, Any]
    checkpoint: Checkpoint
    changes: dict[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {name: tensor for file in self.files.values() for name, tensor in file.items()}
        settings = self.checkpoint.config
        self._ranks = Numbers(settings["r"], settings.get("rank_pattern") or {})
        self._alphas = Numbers(settings["lora_alpha"], settings.get("alpha_pattern") or {})
        self._embedding = next((f"{e}.weight" for e in _EMBEDDINGS if f"{e}.weight" in self.tensors), None)
        self._tied = f"{OUTPUT_MODULE}.weight" not in self.tensors and self._embedding is not None

    def add(self, name: str, tensor: TensorStream) -> None:
        """One tensor of the adapter."""
        key = parse_key(name)
        parameter = "bias" if key.part in ("bias", "lora_bias") else "weight"
        target = self._target(key.module, parameter)
        change = self.changes.get(target, Change())
        self.changes[target] = replace(change, **self._fields(key.part, key.module, tensor))

    def _fields(self, part: Part, module: str, tensor: TensorStream) -> dict[str, Any]:
        scaling = self._scaling(module)
        match part:
            case "A" | "embedding_A":
                return {"a": tensor, "scaling": scaling, "transposed": part != "A" or self._is_conv1d(module)}
            case "B" | "embedding_B":
                return {"b": tensor}
            case "magnitude":
                return {"magnitude": tensor}
            case "full" | "bias" | "base_layer":
                return {"replaced": tensor}
            case "lora_bias":
                return {"added_bias": tensor, "scaling": scaling}
            case "trained_tokens":
                return {"token_rows": tensor, "tokens": self._token_ids(module)}
        raise NotPlainError(f"a tensor of another kind: {module}")

    def _scaling(self, module: str) -> float:
        """As PEFT scales: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self._ranks.of(module), self._alphas.of(module)
        return float(alpha / math.sqrt(rank) if self.checkpoint.config.get("use_rslora") else alpha / rank)

    def _is_conv1d(self, module: str) -> bool:
        return module.rpartition(".")[2] in _CONV1D.get(self.config.get("model_type", ""), ())

    def _token_ids(self, module: str) -> tuple[int, ...]:
        indices = self.checkpoint.config.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            indices = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(indices, list) or not all(type(index) is int for index in indices):
            raise NotPlainError("which tokens' rows were trained is not said")
        return tuple(indices)

    def _target(self, module: str, parameter: str) -> str:
        """The base's tensor that a module's parameter is; the output matrix gets one of its own where it is tied."""
        name = f"{module}.{parameter}"
        if name in self.tensors or (self._tied and name == f"{OUTPUT_MODULE}.weight"):
            return name
        shorter = name.partition(".")[2]
        if shorter in self.tensors:  # a file without the prefix of the model inside: GPT-2 on the hub
            return shorter
        raise NotPlainError(f"the base's weights have no {name}")

    def untie(self) -> None:
        """A tied output matrix of its own, where the embedding and it are no longer the same."""
        output = f"{OUTPUT_MODULE}.weight"
        if not self._tied or self._embedding is None:
            return
        change = self.changes.get(self._embedding)
        only_rows = change is not None and change.token_rows is not None and change.a is None and not change.replaced
        if output not in self.changes and (change is None or only_rows):
            return  # PEFT gives retrained rows to both, and so does a tied matrix
        original = self.tensors[self._embedding]
        holder = next(file for file in self.files.values() if self._embedding in file)
        self.tensors[output] = holder[output] = original
        for part in (self.config, text_config(self.config)):
            if part is self.config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False  # type: ignore[index]

    def check(self) -> None:
        """That every change is whole and fits; and the new vocabulary, where the embeddings have grown."""
        sizes = set()
        for name, change in self.changes.items():
            own = self.tensors[name]
            if own.dtype not in _FLOATS or (change.a is None) != (change.b is None):
                raise NotPlainError(f"{name} is {own.dtype}, or half of a pair")
            if change.magnitude is not None and change.a is None:
                raise NotPlainError(f"{name} has a DoRA magnitude and no factors")
            if change.replaced is not None and change.replaced.shape != own.shape:
                if name not in (self._embedding, f"{OUTPUT_MODULE}.weight") or change.a is not None:
                    raise NotPlainError(f"{name} is {list(change.replaced.shape)}, the base's {list(own.shape)}")
                sizes.add(change.replaced.shape[0])
            if change.a is not None and change.b is not None:
                shape = (change.a.shape[1], change.b.shape[0])
                if own.shape != (shape if change.transposed else shape[::-1]):
                    raise NotPlainError(f"{name} is {list(own.shape)}, the factors make {list(shape[::-1])}")
        if sizes:
            resized = {self._embedding, f"{OUTPUT_MODULE}.weight"} & self.changes.keys()
            if len(sizes) != 1 or len(resized) != 2:
                raise NotPlainError("the vocabulary of the embedding and that of the output matrix differ")
            dict_of = text_config(self.config)
            dict_of["vocab_size"] = sizes.pop()  # type: ignore[index]
