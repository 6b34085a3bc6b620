"""A plan held against this device: three real steps on the longest rows, and a batch of validation.

The learning rate of these steps is 0, so that every part of a step is done and no weight changes; the random numbers
are put back.
"""

import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from loradock_train.before import RunData
from loradock_train.config import TrainConfig
from loradock_train.dataset import Collator
from loradock_train.feed import Collate
from loradock_train.head import HeadCollator, head_loss
from loradock_train.loss import can_own_loss
from loradock_train.model import Precision, inner_model
from loradock_train.peak import PeakMeter
from loradock_train.plan import Measured
from loradock_train.schedule import length_of
from loradock_train.tokenizer import padding_id
from loradock_train.trainer import loss_context, training_arguments

STEPS = 3
MOST_BATCHES = 2
"""Of a step's batches: with two, gradients stand beside activations as they do with many."""


def calibrate(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    precision: Precision,
    meter: PeakMeter,
) -> Measured:
    """Measure. meter: started before the model was loaded."""
    # What a stream's longest row is, nobody knows: its batches are taken as wide as they may be.
    width_tokens = config.context_length if config.padding == "max_length" or config.streaming else None
    collate: Collate = Collator(padding_id(tokenizer), config.padding_side, width_tokens)
    if config.has_head:
        collate = HeadCollator(Collator(padding_id(tokenizer), width_tokens=width_tokens))
    batch = _longest(data.train, config.train_batch_size_per_device, collate, model.device)
    inner, was_training = inner_model(model), model.training
    arguments = training_arguments(config, length_of(config, len(data.train), num_devices=1), precision, Path())
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, inner)
    if config.gradient_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    loss = head_loss(inner) if config.has_head else loss_context(inner, can_own_loss(inner, batch["input_ids"][0]))
    with loss, torch.random.fork_rng(devices=devices):
        optimiser = kind([p for p in model.parameters() if p.requires_grad], **{**options, "lr": 0.0})
        model.train()
        timed = [_step(config, model, batch, optimiser, precision) for _ in range(STEPS)]
        model.eval()
        eval_seconds = None
        if data.valid is not None:
            batch = _longest(data.valid, config.eval_batch_size_per_device, collate, model.device)
            started_s = time.monotonic()
            with torch.no_grad(), _autocast(model, precision):
                float(model(**batch).loss)
            eval_seconds = time.monotonic() - started_s
    if config.gradient_checkpointing:
        cast(Any, inner).gradient_checkpointing_disable()
    model.train(was_training)
    batch_s, update_s = timed[-1]  # the first warms up
    seconds = batch_s * config.gradient_accumulation_steps + update_s
    return Measured(meter.growth_bytes(), seconds, eval_seconds)


def _step(
    config: TrainConfig, model: nn.Module, batch: dict[str, Any], optimiser: torch.optim.Optimizer, precision: Precision
) -> tuple[float, float]:
    """Seconds of one batch, and of the update."""
    batches = min(MOST_BATCHES, config.gradient_accumulation_steps)
    started_s = time.monotonic()
    for _ in range(batches):
        with _autocast(model, precision):
            loss = model(**batch).loss
        loss.backward()
        float(loss.detach())  # waits for the device
    between_s = time.monotonic()
    if config.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (between_s - started_s) / batches, time.monotonic() - between_s


def _autocast(model: Any, precision: Precision) -> torch.autocast:
    dtype = torch.float16 if precision.arithmetic == "fp16" else torch.bfloat16
    return torch.autocast(model.device.type, dtype=dtype, enabled=precision.arithmetic != "no")


def _longest(rows: Any, count: int, collate: Collate, device: Any) -> dict[str, Any]:
    order = sorted(range(len(rows)), key=lambda index: -int(rows[index]["length"]))[:count]
    batch = collate([rows[index] for index in order])
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "num_tokens"}
