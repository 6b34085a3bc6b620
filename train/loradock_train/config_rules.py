"""Which keys of a training run go together, and which need each other.

A rule looks at a whole configuration whose keys are right one by one, and raises ValueError with what to change. The
rules have an order: the first that is broken is told. Knows nothing of files, data or models.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from loradock_train.config_task import METRICS
from loradock_train.urls import LOGIN_TOLD, keys_with_login

if TYPE_CHECKING:
    from loradock_train.config import TrainConfig


def require_keys_that_fit(config: "TrainConfig") -> None:
    """Raises ValueError for the first rule that is broken."""
    for rule in RULES:
        rule(config)


def _holds_no_login(config: "TrainConfig") -> None:
    for keys in keys_with_login(config.model_dump()):
        raise ValueError(f"{'.'.join(keys)}: {LOGIN_TOLD}")


def _one_start(config: "TrainConfig") -> None:
    if (config.model_id is None) == (config.model is None):
        raise ValueError("give exactly one of model_id (train an existing model) and model (train from scratch)")


def _scratch_fits(config: "TrainConfig") -> None:
    if config.model is not None and config.tokenizer is None:
        raise ValueError("model (from scratch) needs tokenizer: {train_vocab_size: …} or {path: …}")
    if config.adapter_path is not None and (config.model is not None or config.has_head):
        raise ValueError("adapter_path needs model_id, the base that the adapter was trained on, and no new head")
    if config.model is not None and config.lora_config is not None:
        raise ValueError(
            "lora_config needs a trained base: a model from scratch has nothing to adapt; remove one of the two"
        )
    if config.model_id is not None and config.tokenizer is not None:
        raise ValueError("tokenizer belongs to model (from scratch); with model_id the model's own tokenizer is used")


def _trainable_fits(config: "TrainConfig") -> None:
    if config.quantisation is not None and config.lora_config is None:
        raise ValueError("quantisation keeps a frozen base in few bits: it needs lora_config, an adapter over it")
    if config.quantisation is not None and (config.has_head or config.is_sharded):
        other = "a classification head" if config.has_head else "fsdp"
        raise ValueError(f"quantisation and {other} do not go together; remove one of the two")
    if config.trainable is None:
        return
    if config.lora_config is not None:
        raise ValueError(
            "trainable belongs to full-parameter training; a LoRA run trains its adapter, whose modules are "
            "lora_config.target_modules (remove one of the two)"
        )
    for pattern in config.trainable:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"trainable: {pattern!r} is no regular expression: {error}") from None


def _chat_template_is_one(config: "TrainConfig") -> None:
    template = config.chat_template
    if template is not None and not template.endswith(".jinja") and not re.search(r"\{[{%]", template):
        raise ValueError("chat_template is neither a Jinja template ({{ … }}, {% … %}) nor the path of a .jinja file")


def _template_has_instruction(config: "TrainConfig") -> None:
    if config.prompt_template is not None and "{instruction}" not in config.prompt_template:
        raise ValueError("prompt_template must contain {instruction} (and {input} where rows have one)")


def _stream_ends(config: "TrainConfig") -> None:
    if not config.streaming:
        return
    if config.num_epochs is None and config.max_steps is None and config.max_time_s is None:
        raise ValueError(
            "streaming needs max_steps, max_time_s or num_epochs: how many steps a stream has is not known before "
            "it was read"
        )
    if config.num_epochs is not None and config.num_epochs % 1:
        raise ValueError(
            f"num_epochs: {config.num_epochs:g} of a stream: it is read in whole passes; give a whole number, or "
            "max_steps"
        )


def _shares_are_of_a_known_number(config: "TrainConfig") -> None:
    is_known = config.max_steps is not None or (not config.streaming and config.epoch_limit is not None)
    for key in ("logging_steps", "eval_steps", "save_steps"):
        steps = getattr(config, key)
        if steps is not None and steps < 1 and not is_known:
            why = "a stream has" if config.streaming else "fit into max_time_s"
            raise ValueError(
                f"{key} {steps:g} is a share of the run's steps, and how many {why} is not known before; give a whole "
                "number, or max_steps"
            )


def _sweep_shares_a_frozen_base(config: "TrainConfig") -> None:
    if not config.sweep:
        return
    if config.lora_config is None or config.has_head or config.lora_config.bias != "none":
        raise ValueError(
            "sweep trains adapters on one frozen base: give lora_config, without bias and without a new head"
        )
    if config.streaming or config.num_devices > 1 or config.adapter_path is not None:
        raise ValueError("sweep goes with neither streaming, num_devices nor adapter_path; remove one of the two")
    names = [entry.name for entry in config.sweep]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sweep has names twice: {', '.join(twice)}")


def _validation_is_there(config: "TrainConfig") -> None:
    asked = [name for name in ("task", "early_stopping", "best_by") if getattr(config, name) is not None]
    if asked and config.valid_path is None:
        raise ValueError(f"{asked[0]} needs valid_path: the rows that are scored")
    if config.similarity is not None and config.similarity.path is None and config.valid_path is None:
        raise ValueError("similarity needs similarity.path or valid_path: the rows that are asked")
    if config.has_head and config.model_id is None:
        raise ValueError("task.kind sequence_classification puts a head on a trained base: give model_id")
    if config.has_head and (config.packing or config.streaming):
        raise ValueError("packing, streaming: a classification head reads one class off each row; remove them")
    known = ("eval_loss", *(METRICS[config.task.kind] if config.task is not None else ()))
    if config.best_by is not None and config.best_by not in known:
        raise ValueError(f"best_by {config.best_by}: this run has {', '.join(known)}; task: gives more")


def _preference_fits(config: "TrainConfig") -> None:
    if config.preference is None:
        return
    if config.model is not None:
        raise ValueError("preference needs a trained base (model_id): it learns how to answer, not to write")
    others = ("packing", "task", "early_stopping", "best_by", "streaming", "similarity")
    odd = [name for name in others if getattr(config, name)]
    if odd:
        raise ValueError(f"preference and {', '.join(odd)} do not go together; remove one of the two")


RULES: tuple[Callable[["TrainConfig"], None], ...] = (
    _holds_no_login,
    _one_start,
    _scratch_fits,
    _trainable_fits,
    _chat_template_is_one,
    _template_has_instruction,
    _stream_ends,
    _shares_are_of_a_known_number,
    _sweep_shares_a_frozen_base,
    _validation_is_there,
    _preference_fits,
)
