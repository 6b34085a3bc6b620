"""A run's model without its weights: every module, name and shape, on torch's meta device.

What the run will make can be judged, and what it will need can be counted, before a byte of weights is loaded. Made by
the functions that make the real model, so that the two cannot differ.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from loradock_train.config import TrainConfig
from loradock_train.errors import ModelError
from loradock_train.model import (
    Precision,
    add_adapter,
    architecture_config,
    auto_class,
    base_config,
    check_base,
    decide_precision,
)
from loradock_train.parameters import select_trainable


def _maker(config: TrainConfig, architecture: Any) -> Any:
    """What makes the model; the architecture learns how many classes its head has. Raises ModelError."""
    if config.task is None or not config.has_head:
        return auto_class(architecture)
    if type(architecture) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"model_id {config.model_id}: no model with a classification head in transformers")
    architecture.num_labels = len(config.task.labels)
    return AutoModelForSequenceClassification


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device, its adapter on it, and the types that it would have."""

    model: Any
    precision: Precision


def blueprint(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """The model that the run trains. Raises ModelError as the run itself would."""
    if config.model_id is None:
        architecture = architecture_config(dict(config.model or {}), tokenizer, config.context_length)
        base_dtype = None
    else:
        architecture = base_config(config)
        check_base(architecture, len(tokenizer), config.context_length)
        base_dtype = getattr(architecture, "dtype", None) or torch.float32
    precision = decide_precision(config, base_dtype)
    with torch.device("meta"):
        model: Any = _maker(config, architecture).from_config(architecture, dtype=precision.weights)
        model.config._name_or_path = str(config.model_id)
        if config.lora_config is not None:
            model = add_adapter(model, config.lora_config)
    if config.trainable is not None:
        select_trainable(model, config.trainable)
    return Blueprint(model, precision)
