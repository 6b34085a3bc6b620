"""From a config, its data and its model without weights to the counts that a plan is made of.

Loads nothing and measures nothing.
"""

import math
from dataclasses import replace
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from loradock_train.activations import count_activations
from loradock_train.before import RunData
from loradock_train.blueprint import Blueprint, blueprint
from loradock_train.config import TrainConfig
from loradock_train.config_sections import LoraOptions
from loradock_train.dataset import PAD_TO_MULTIPLE
from loradock_train.model import inner_model
from loradock_train.peak import available_bytes
from loradock_train.placement import foretell
from loradock_train.plan import Facts, Plan, Remedy, memory_of, optimiser_bytes
from loradock_train.processes import local_world_size
from loradock_train.quantised import in_few_bits
from loradock_train.schedule import intervals_of, length_of, length_of_stream


def plan_run(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: RunData, processes: int = 1) -> Plan:
    """By arithmetic alone. Raises ModelError as the run itself would. processes: of the run, on all machines."""
    made = blueprint(config, tokenizer)
    checkpoint = _checkpoint_bytes(config, made, tokenizer)
    trained_bytes = sum(p.numel() * p.element_size() for p in made.model.parameters() if p.requires_grad)
    facts = facts_of(config, made, data, processes)
    save_bytes = trained_bytes + (optimiser_bytes(facts) if facts is not None else 2 * trained_bytes)
    steps, eval_batches = _lengths(config, data, processes)
    plan = Plan(
        memory=None if facts is None else memory_of(facts),
        facts=facts,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        available_bytes=_available_bytes(max(config.num_devices, local_world_size())),
        steps=steps,
        eval_batches=eval_batches,
        max_time_s=config.max_time_s,
        save_bytes=save_bytes,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint + save_bytes * (config.keep + 1),
        price_per_hour=config.price_per_hour,
    )
    return replace(plan, adapter=_as_adapter(config, tokenizer, data, processes)) if plan.fits is False else plan


def _checkpoint_bytes(config: TrainConfig, made: Blueprint, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of the tensors that are exported. With a new head that is the whole model, an adapter merged into it."""
    if not config.has_head:
        return foretell(made.model, tokenizer, config.model_id, made.precision.saved).checkpoint_bytes
    bare = blueprint(config.model_copy(update={"lora_config": None}), tokenizer).model
    return sum(int(p.numel()) for p in bare.parameters()) * made.precision.saved.itemsize


def _available_bytes(processes_here: int) -> int | None:
    """For one process. A GPU is its own; RAM is that of all on this machine."""
    found = available_bytes()
    return found if found is None or torch.cuda.is_available() else found // processes_here


def _as_adapter(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: RunData, processes: int
) -> Remedy | None:
    """What the run would need as a LoRA run; None where it is one, or has no base to adapt."""
    if config.kind != "full":
        return None
    options = LoraOptions()
    smaller = config.model_copy(update={"lora_config": options, "trainable": None})
    facts = facts_of(smaller, blueprint(smaller, tokenizer), data, processes)
    return None if facts is None else Remedy(f"lora_config: {{r: {options.r}}}", memory_of(facts).peak_bytes)


def facts_of(config: TrainConfig, made: Blueprint, data: RunData, processes: int = 1) -> Facts | None:
    """The counts; None where the activations cannot be counted. The blueprint's types are those of the arithmetic
    afterwards."""
    model, precision = made.model, made.precision
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights_bytes, trained_bytes = (sum(p.numel() * p.element_size() for p in of) for of in (parameters, trained))
    few_bits = None if config.quantisation is None else in_few_bits(model, config.quantisation)
    weights_bytes -= 0 if few_bits is None else few_bits.saved_bytes
    head: Any = cast(Any, inner_model(model)).get_output_embeddings()
    trains_head = head is not None and any(p is head.weight for p in trained)
    factored = sum(p.shape[0] + p.numel() // p.shape[0] if p.dim() > 1 else p.numel() for p in trained)
    compute = precision.weights if precision.arithmetic == "no" else torch.bfloat16
    rows, tokens = largest_batch(config, data)
    # Quantised layers answer in the type that they are asked in, which is that of the weights around them.
    activations = count_activations(model.to(compute if few_bits is None else precision.weights), rows, tokens)
    if activations is None:
        return None
    text = inner_model(model).config.get_text_config()
    return Facts(
        weights_bytes=weights_bytes,
        trained=sum(p.numel() for p in trained),
        trained_bytes=trained_bytes,
        factored=factored,
        optim=config.optim,
        rows=rows,
        tokens=tokens,
        eval_rows=0 if data.valid is None else min(config.eval_batch_size_per_device, len(data.valid)),
        kept_bytes=activations.kept_bytes,
        largest_bytes=activations.largest_bytes,
        hidden_bytes=activations.hidden_bytes,
        layers=activations.layers,
        vocabulary=int(text.vocab_size) if config.task is None or not config.has_head else len(config.task.labels),
        width=int(text.hidden_size),
        compute_bytes=compute.itemsize,
        weight_bytes=precision.weights.itemsize,
        trains_head=trains_head,
        adapts_head=isinstance(head, LoraLayer),
        checkpointing=config.gradient_checkpointing,
        accumulation=config.gradient_accumulation_steps,
        processes=processes,
        unpacked_bytes=0 if few_bits is None else few_bits.largest_numbers * compute.itemsize,
    )


def largest_batch(config: TrainConfig, data: RunData) -> tuple[int, int]:
    """Rows, and tokens of each with its padding. Of data that is not all known: the most that the config allows."""
    rows, tokens = config.train_batch_size_per_device, config.context_length
    if data.stream is not None or not isinstance(data.train, datasets.Dataset):
        return rows, tokens
    rows = min(rows, len(data.train))
    if config.padding == "max_length":
        return rows, tokens
    longest = max(int(length) for length in data.train["length"])
    return rows, math.ceil(longest / PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE


def _lengths(config: TrainConfig, data: RunData, processes: int) -> tuple[int | None, int]:
    """Steps of the run (None: the clock ends it), and batches of all its validations in one process."""
    if data.stream is not None:
        length = length_of_stream(config, lambda: 0.0)
    elif isinstance(data.train, datasets.Dataset):
        length = length_of(config, len(data.train), num_devices=processes)
    else:
        return config.max_steps, 0
    if length.is_clock_bound:
        return None, 0
    if data.valid is None:
        return length.max_steps, 0
    validations = math.ceil(length.max_steps / intervals_of(config, length).evaluation)
    return length.max_steps, validations * math.ceil(len(data.valid) / (config.eval_batch_size_per_device * processes))
