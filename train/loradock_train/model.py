"""The model of a run: loaded or made from an architecture, its weights' type, its adapter. Says what is trainable.

Knows nothing of data, and does not train.
"""

import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file

from loradock_adapters.errors import UsageError
from loradock_train.adapter_names import check_names, check_patterns
from loradock_train.compiled import check_compiler
from loradock_train.config import TrainConfig
from loradock_train.config_sections import LoraOptions
from loradock_train.errors import ModelError
from loradock_train.parameters import count_parameters as count_parameters
from loradock_train.quantised import check_quantisation, keep_differentiable, loading_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING_NAMES = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings"})


@dataclass(frozen=True)
class Precision:
    """The types of one run, decided."""

    weights: torch.dtype
    arithmetic: Literal["no", "bf16", "fp16"]
    saved: torch.dtype


def has_fast_bf16() -> bool:
    """Whether this machine is quicker in bf16 than in float32: a GPU that has it, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        # GPUs before Ampere only emulate it, slowly; asked plainly, torch says they support it.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def decide_precision(config: TrainConfig, base_dtype: torch.dtype | None) -> Precision:
    """Resolve the three `auto`s. base_dtype: the type of the base's weights on disk, None from scratch."""
    arithmetic: Any = config.mixed_precision
    if arithmetic == "auto":
        arithmetic = "bf16" if has_fast_bf16() else "no"
    if config.dtype != "auto":
        weights = DTYPES[config.dtype]
    else:
        # Trained weights are kept in float32: at a learning rate of 1e-5 a bf16 weight would round every update away.
        is_frozen = config.kind == "lora" and not config.has_head
        weights = base_dtype if is_frozen and base_dtype is not None else torch.float32
    if config.save_dtype != "auto":
        saved = DTYPES[config.save_dtype]
    elif base_dtype is not None:
        saved = base_dtype
    else:
        saved = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    return Precision(weights, arithmetic, saved)


def base_config(config: TrainConfig) -> Any:
    """The transformers config of `model_id`. Raises ModelError."""
    assert config.model_id is not None
    try:
        return AutoConfig.from_pretrained(config.model_id, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"model_id {config.model_id}: no model could be loaded: {first}") from error


def base_files(model_id: str) -> Path | None:
    """Where the config of a base lies, a hub model's in the local cache; None where it is not there."""
    if Path(model_id).is_dir():
        return Path(model_id)
    found = cached_file(
        model_id, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return None if found is None else Path(found).parent


def base_directory(model_id: str) -> Path | None:
    """Where the weights of a base lie, a hub model's in the local cache; None where it has no safetensors files."""
    directory = base_files(model_id)
    return directory if directory is not None and any(directory.glob("*.safetensors")) else None


def check_machine(config: TrainConfig, processes: int = 1) -> None:
    """Refuse, before anything is loaded, what this machine cannot do. Raises ModelError and UsageError."""
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ModelError("mixed_precision: fp16 needs a GPU; on a CPU use bf16, or no")
    if ("8bit" in config.optim or "paged" in config.optim) and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"optim: {config.optim} needs bitsandbytes, which is not installed: pip install 'loradock[quantised]'"
        )
    if "paged" in config.optim and not torch.cuda.is_available():
        raise ModelError(f"optim: {config.optim} pages between a GPU and its host; without a GPU use adamw_8bit")
    check_quantisation(config.quantisation)
    if config.on_out_of_memory == "adapt" and processes > 1:
        raise UsageError(
            f"on_out_of_memory: adapt works with one process, this run has {processes}: processes that cut "
            "their batches differently would wait for each other; set on_out_of_memory: error"
        )
    if config.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ModelError("attn_implementation: flash_attention_2 needs flash-attn, which is not installed; use sdpa")
    if config.torch_compile:
        check_compiler()


def check_base(architecture: Any, vocabulary: int, context_length: int) -> None:
    """Refuse a base that its tokenizer or the context does not fit, before an index runs out of bounds. Raises
    ModelError."""
    text = architecture.get_text_config()
    positions, rows = getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)
    if isinstance(positions, int) and positions < context_length:
        raise ModelError(f"context_length {context_length} is over the model's max_position_embeddings {positions}")
    if isinstance(rows, int) and rows < vocabulary:
        raise ModelError(f"the tokenizer has {vocabulary} entries, but the model's embedding only {rows} rows")


def sees(architecture: Any) -> bool:
    """Whether a transformers config is that of a model of images and text."""
    return getattr(architecture, "model_type", None) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def attention_options(config: TrainConfig) -> dict[str, Any]:
    """What loading a model is told about its attention."""
    return {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}


def auto_class(architecture: Any) -> Any:
    """What loads a model of this config."""
    return AutoModelForImageTextToText if sees(architecture) else AutoModelForCausalLM


def load_model(config: TrainConfig, precision: Precision) -> PreTrainedModel:
    """The model of `model_id`, weights in `precision.weights`. Raises ModelError."""
    options = attention_options(config)
    try:
        model = auto_class(base_config(config)).from_pretrained(
            str(config.model_id),
            dtype=precision.weights,
            trust_remote_code=False,
            **loading_options(config.quantisation, precision.arithmetic),
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"model_id {config.model_id}: no model could be loaded: {first}") from error
    keep_differentiable(model)
    return cast(PreTrainedModel, model)


def make_model(config: TrainConfig, tokenizer: Any, precision: Precision) -> PreTrainedModel:
    """A model with fresh weights from `model:`. The vocabulary is the tokenizer's unless the config says more."""
    architecture = architecture_config(dict(config.model or {}), tokenizer, config.context_length)
    options = attention_options(config)
    model = cast(Any, AutoModelForCausalLM).from_config(architecture, dtype=precision.weights, **options)
    return cast(PreTrainedModel, model)


def architecture_config(fields: dict[str, Any], tokenizer: Any, context_length: int) -> Any:
    """The transformers config that `model:` describes. transformers keeps unknown fields in silence; we name them."""
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; for example llama"
        raise ModelError(f"model.model_type: {model_type!r} is no causal language model of transformers{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ModelError(
                f"model.{name}: unknown field of {model_type}" + (f"; did you mean {near[0]}?" if near else "")
            )
    vocabulary = len(tokenizer)
    fields.setdefault("vocab_size", vocabulary)
    if not isinstance(fields["vocab_size"], int) or fields["vocab_size"] < vocabulary:
        raise ModelError(f"model.vocab_size: {fields['vocab_size']} is less than the tokenizer's {vocabulary} entries")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        made = config_class(**{**special, **fields})
    except Exception as error:  # transformers validates with exceptions of its own, huggingface_hub's among them
        raise ModelError(f"model: transformers refuses this {model_type}: {str(error).strip()}") from error
    check_base(made, vocabulary, context_length)
    return made


def has_head(model: nn.Module) -> bool:
    """Whether the model ends in a classification head instead of the language model's."""
    return type(inner_model(model)).__name__.endswith("ForSequenceClassification")


def add_adapter(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Wrap the model with LoRA; a classification head is trained in full beside it. Raises ModelError where the adapter
    could not be what the config says."""
    _check_targets(model, options)
    check_names(model, options)
    values = options.model_dump(exclude={"loraplus_lr_ratio"})
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values[name], tuple):
            values[name] = list(values[name]) or None
    if has_head(model):
        values["task_type"] = "SEQ_CLS"
    try:
        with warnings.catch_warnings():
            # PEFT warns while it sets it itself, as our documentation of the field promises.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # refused below
            wrapped = cast(PeftModel, get_peft_model(model, LoraConfig(**values)))
    except ValueError as error:
        raise ModelError(f"lora_config: PEFT refuses it: {error}") from error
    check_patterns(wrapped, options)
    return wrapped


def _check_targets(model: PreTrainedModel, options: LoraOptions) -> None:
    names = [name for name, _ in model.named_modules()]
    if options.target_modules == "all-linear":
        return
    if isinstance(options.target_modules, str):
        _check_pattern(names, options.target_modules)
        return
    for target in options.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted(
                {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_adaptable(module)}
            )
            raise ModelError(
                f"lora_config.target_modules: no module {target!r} in this model; it has {', '.join(leaves)}"
            )
    both = EMBEDDING_NAMES.intersection(options.target_modules)
    if both and model.config.tie_word_embeddings:
        raise ModelError(
            f"lora_config.target_modules: {', '.join(sorted(both))} cannot be adapted here: the embedding and head "
            "of this model are one tied matrix (tie_word_embeddings), an adapter on one would leave the other as is; "
            "remove them from target_modules"
        )


def _check_pattern(names: Sequence[str], pattern: str) -> None:
    """A pattern must match the whole of some name, as PEFT asks."""
    if not any(re.fullmatch(pattern, name) for name in names):
        raise ModelError(
            f"lora_config.target_modules: {pattern!r} is a regular expression, and matches no module's whole name; "
            f"one of them is {names[-1]}"
        )


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model below PEFT's wrapper."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
