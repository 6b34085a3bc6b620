"""What vLLM 0.32 does with adapters, as data: rank ladder, refused PEFT features, and what each architecture can wrap.

From its sources (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/lora/layers/logits_processor.py`, the model
registry) and kept in step by tests against the installed vLLM. Says what the engine would do; what follows from that
for an upload is the gate's decision.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

VLLM_VERSION = "0.32.0"

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` may be. An adapter's own rank may be anything up to it."""

DEFAULT_MAX_LORA_RANK = 64
"""What `loradock serve` starts its engine with where its config is silent."""

MAX_LM_HEAD_VOCAB = 258_048
"""An engine with LoRA refuses to wrap an output matrix over more tokens than this."""

TOWER_PARTS = frozenset(
    {
        "visual", "vision_tower", "vision_model", "vision_encoder", "audio_tower", "audio_model", "connector",
        "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio", "merger",
    }
)  # fmt: skip
"""Parts of module names outside a multimodal model's language model. The engine loads their LoRA and leaves it out,
with no more than a line in its log, unless it runs with enable_tower_connector_lora."""

FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
"""Tensor types that an adapter's matrices may have; the engine casts them to its own."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The settings of the served base engine that bear on adapters."""

    max_lora_rank: int = 16
    """One of LORA_RANKS; vLLM's own default is 16."""
    enable_lora: bool = True
    """False where the base engine runs without LoRA: then nothing is shared."""
    tower_lora: bool = False
    """Whether it runs with enable_tower_connector_lora: what lies outside the language model is applied too."""

    def to_json(self) -> dict[str, Any]:
        return {
            "max_lora_rank": self.max_lora_rank,
            "enable_lora": self.enable_lora,
            "tower_lora": self.tower_lora,
        }

    @classmethod
    def from_json(cls, document: object) -> "EngineLimits":
        """From a server's answer. Raises ValueError where that does not say."""
        told = document if isinstance(document, dict) else {}
        rank, lora = told.get("max_lora_rank"), told.get("enable_lora")
        if type(rank) is not int or not isinstance(lora, bool):
            raise ValueError(f"no engine's limits: {ascii(document)[:120]}")
        return cls(rank, lora, told.get("tower_lora") is True)


@dataclass(frozen=True, slots=True)
class ArchitectureRules:
    """What the engine can do with one architecture."""

    name: str
    lora: bool
    embedding_modules: frozenset[str]
    """Last parts of the embedding modules that can carry LoRA; the linear layers of a LoRA architecture all can."""
    tower: bool = False
    """Whether what lies outside the language model can carry LoRA, where the engine is told to."""


def ladder_rank(rank: int) -> int | None:
    """The smallest `max_lora_rank` that an adapter of this rank fits; None where there is none."""
    return next((step for step in LORA_RANKS if step >= rank), None)


SUCCESSORS = {
    "Idefics2ForConditionalGeneration": (
        "vLLM has no Idefics2, and its processor cannot run there either; train Idefics3ForConditionalGeneration or "
        "SmolVLMForConditionalGeneration, which have the same text_model and connector and are served"
    ),
}
"""Architectures that train, and that no engine serves: what to take instead."""


def architecture_rules(name: str) -> ArchitectureRules | None:
    """The rules for an architecture of config.json, None if vLLM does not list it."""
    row = _table()["architectures"].get(name)
    if row is None:
        return None
    return ArchitectureRules(
        name=name,
        lora=row["lora"],
        embedding_modules=frozenset(row.get("embeddings", ())),
        tower=row.get("tower", False),
    )


def known_architectures() -> tuple[str, ...]:
    return tuple(_table()["architectures"])


@cache
def _table() -> dict[str, Any]:
    """Written by tables/make_engine_rules.py from the installed vLLM."""
    file = files("loradock_adapters.tables").joinpath(f"vllm-{VLLM_VERSION}.json")
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True, slots=True)
class Feature:
    """A setting of adapter_config.json that the engine's LoRA does not implement."""

    setting: str
    used: Callable[[Any], bool]
    """Whether a value of the setting asks for the feature."""
    outcome: Literal["dedicated", "rejected"]
    """`dedicated`: merging into the base gives the same function. `rejected`: not even that."""
    code: str
    message: str
    fix: str = ""


PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Initialisations that leave the base's weights alone, so that the saved adapter is a plain LoRA."""


def _set(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != {} and value != ""


def _changes_base(value: Any) -> bool:
    return isinstance(value, str) and value.lower() not in PLAIN_INITS and not _is_loftq(value)


def _is_loftq(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "loftq"


FEATURES: tuple[Feature, ...] = (
    Feature(
        "use_dora", _set, "dedicated", "dora", "DoRA scales every column of the merged matrix; it cannot be swapped"
    ),
    Feature(
        "bias",
        lambda value: value is not None and value != "none",
        "dedicated",
        "trained_bias",
        "trained biases cannot be swapped",
    ),
    Feature("lora_bias", _set, "dedicated", "lora_bias", "biases beside the LoRA matrices cannot be swapped"),
    Feature(
        "modules_to_save",
        _set,
        "dedicated",
        "modules_to_save",
        "whole retrained modules cannot be swapped",
        "to share the base's engine, target those modules with LoRA instead of modules_to_save",
    ),
    Feature(
        "trainable_token_indices",
        _set,
        "dedicated",
        "trainable_tokens",
        "retrained rows of the embedding cannot be swapped",
    ),
    Feature(
        "init_lora_weights",
        _changes_base,
        "rejected",
        "init_changes_base",
        "PiSSA, OLoRA, CorDA and their like train against a modified base; without the initial adapter nobody can tell "
        "what was changed",
        "publish the adapter as it was before training beside it, as the folder initial_adapter (adapter_config.json, "
        "adapter_model.safetensors): it is then converted; or convert it yourself: "
        "model.save_pretrained(path, path_initial_model_for_weight_conversion=INITIAL)",
    ),
    Feature(
        "init_lora_weights",
        _is_loftq,
        "rejected",
        "loftq",
        "LoftQ trains against a quantised base, which is not the one that is served, and no initial adapter undoes it",
        "merge it into its own base, dequantised, and publish the full weights",
    ),
    Feature(
        "alora_invocation_tokens",
        _set,
        "rejected",
        "alora",
        "an activated LoRA applies to a part of the tokens only; neither swapping nor merging gives that",
        "train a plain LoRA",
    ),
    Feature("layer_replication", _set, "rejected", "layer_replication", "replicated layers make another architecture"),
    Feature("use_bdlora", _set, "rejected", "bdlora", "block-diagonal LoRA is not served", "train a plain LoRA"),
    Feature(
        "use_qalora", _set, "rejected", "qalora", "QA-LoRA pools its inputs; it is not served", "train a plain LoRA"
    ),
    Feature(
        "kasa_config",
        _set,
        "rejected",
        "kasa",
        "KaSA cuts singular values off the base's weights, which the served base still has",
    ),
    Feature("monteclora_config", _set, "rejected", "monteclora", "MonteCLoRA adds sampled weights to the factors"),
    Feature(
        "target_parameters",
        _set,
        "rejected",
        "target_parameters",
        "LoRA on bare parameters (fused experts), which the engine lays out in another way",
    ),
    Feature("arrow_config", _set, "rejected", "arrow", "Arrow routes every token among adapters; it is not served"),
)

KNOWN_SETTINGS = frozenset(
    {
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
        "monteclora_config", "runtime_config", "target_parameters", "kasa_config", "ensure_weight_tying", "task_type",
        "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    }
    | {feature.setting for feature in FEATURES}
)  # fmt: skip
"""The settings of PEFT 0.21's LoraConfig. One that is not among them may change what the adapter means."""
