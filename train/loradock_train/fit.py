"""The training itself: the trainer put together from its parts, run to its end or to where it is asked to stop."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from loradock_train.agree import Agreement, common_clock
from loradock_train.before import RunData
from loradock_train.compiled import Tally, compiled_layers
from loradock_train.config import TrainConfig
from loradock_train.dataset import Collator
from loradock_train.errors import RunStopped
from loradock_train.feed import Batching, Collate, Feed, Place
from loradock_train.head import HeadCollator, head_loss
from loradock_train.loss import can_own_loss
from loradock_train.memory import facts_of, out_of_memory_told
from loradock_train.model import Precision, inner_model
from loradock_train.order import Order
from loradock_train.preference import preference_trainer
from loradock_train.processes import is_main, rank, world_size
from loradock_train.progress import Meter, Reporter
from loradock_train.report import Outcome
from loradock_train.samples import FILE as SAMPLES
from loradock_train.samples import SampleWriter
from loradock_train.saves import Save
from loradock_train.schedule import intervals_of, learning_rate_factor, length_of, length_of_stream
from loradock_train.scoring import Scoring
from loradock_train.shard import shard, unshard
from loradock_train.stop import Saver, StopRequest
from loradock_train.tokenizer import padding_id
from loradock_train.trackers import Trackers
from loradock_train.trainer import LoradockTrainer, Write, loss_context, training_arguments
from loradock_train.vision import VisionCollator, loss_sample
from loradock_train.watch import Watch


def fit(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    precision: Precision,
    directory: Path,
    console: Console,
    save: Save | None,
    write: Write,
) -> Outcome:
    """Train to the end. Raises RunStopped where a signal ends it earlier."""
    collate = _collator(config, tokenizer, data)
    use_own = config.has_head or (config.preference is None and _can_own_loss(model, data))
    feed = None if data.stream is None else _feed(config, data, collate, save)
    length = (
        length_of(config, len(data.train), num_devices=world_size())
        if feed is None
        else length_of_stream(config, lambda: feed.place.passes)
    )
    whole = model
    if config.fsdp is not None and config.is_sharded:
        model = shard(whole, config.fsdp)
    meter = Meter() if save is None else Meter(save.position.tokens, save.position.elapsed_s)
    history = [] if save is None else save.position.history
    trackers = Trackers(
        config.report_to if is_main() else (), directory, config.model_dump(mode="json"), history
    )  # fmt: skip
    path = directory / "metrics.jsonl" if is_main() else None
    reporter = Reporter(path, length, meter, console, history, trackers.send)
    request = StopRequest()
    scoring = Scoring(config, model, data.scorer, precision.arithmetic, directory, reporter)
    scoring.begin(is_new=save is None)
    clock = common_clock(meter) if config.max_time_s is not None else lambda: meter.elapsed_s
    arguments = partial(training_arguments, config, length, precision, directory)
    if config.preference is None:
        make_trainer: Callable[..., LoradockTrainer] = partial(LoradockTrainer, args=arguments(), data_collator=collate)
    else:
        make_trainer = partial(preference_trainer, config.preference, tokenizer, arguments, collate)
    loss = head_loss(inner_model(model)) if config.has_head else loss_context(inner_model(model), use_own)
    with loss, request.on_signals():
        trainer = make_trainer(
            rate=lambda step: learning_rate_factor(config, length, step, clock()),
            order=_order(config, data.train),
            feed=feed,
            steps_per_epoch=length.steps_per_epoch,
            meter=meter,
            reporter=reporter,
            saver=Saver(config, request, intervals_of(config, length).saving),
            agreement=Agreement(meter, request),
            write=write,
            score=scoring.metrics,
            keeper=scoring.keeper,
            b_ratio=config.lora_config.loraplus_lr_ratio if config.lora_config is not None else None,
            model=model,
            train_dataset=data.train,
            eval_dataset=data.valid,
        )
        watch = _watch_over(trainer, config, model, tokenizer, data, precision, reporter, directory, console)
        trainer.facts, trainer.may_cut = facts_of(config, model, precision), config.on_out_of_memory == "adapt"
        watch.compiled = Tally() if config.torch_compile else None
        compiled = contextlib.nullcontext() if watch.compiled is None else compiled_layers(model, watch.compiled)
        try:
            with out_of_memory_told(trainer), compiled:
                if save is None:
                    trainer.train()
                else:
                    trainer.go_on(save)
            meter.stop()
            steps = trainer.state.global_step
            if request.is_set and trainer.last_save is not None and trainer.last_save[0] == steps:
                raise RunStopped(*trainer.last_save)
            if data.valid is not None and not any(
                "eval_loss" in line and line["step"] == steps for line in reporter.history
            ):
                trainer.evaluate()
        finally:
            reporter.close()
            trackers.close()
    for each in (model, inner_model(model)):  # accelerate's autocast, TRL's loss: proof and export want the bare model
        each.__dict__.pop("forward", None)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    scored = scoring.end(steps)
    if model is not whole:
        unshard(model, whole)
    return Outcome(
        steps=steps,
        epochs=steps / length.steps_per_epoch if feed is None else feed.place.passes,
        seconds=meter.elapsed_s,
        tokens=meter.tokens,
        history=reporter.history,
        used_own_loss=use_own,
        device=device,
        stream_report=None if feed is None else feed.report,
        scored=scored,
        notices=(*watch.notices, *trainer.notices),
        compiled=watch.compiled,
    )


def _collator(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: RunData) -> Any:
    width_tokens = config.context_length if config.padding == "max_length" else None
    if config.has_head:
        return HeadCollator(Collator(padding_id(tokenizer), width_tokens=width_tokens))
    collate = Collator(padding_id(tokenizer), config.padding_side, width_tokens)
    return collate if data.processor is None else VisionCollator(collate, data.processor.image_processor)


def _can_own_loss(model: Any, data: RunData) -> bool:
    ids, pixels = loss_sample(data.train, data.processor)
    pixels = {name: value.to(model.device) for name, value in pixels.items()}
    return can_own_loss(inner_model(model), ids.to(model.device), pixels)


def _watch_over(
    trainer: LoradockTrainer,
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    precision: Precision,
    reporter: Reporter,
    directory: Path,
    console: Console,
) -> Watch:
    """Callbacks that look on and change nothing."""

    def show(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    report = data.reports["train"]
    watch = Watch(
        config,
        precision,
        reporter,
        report.num_trained_tokens / max(1, report.num_tokens),
        len(tokenizer),
        trainer.padded_share,
        "position_ids" in data.train.column_names,
        show,
    )
    trainer.show = show
    trainer.add_callback(watch)
    if config.samples is not None:
        path = directory / SAMPLES if is_main() else None
        trainer.add_callback(SampleWriter(config.samples, model, tokenizer, precision.arithmetic, path, console))
    return watch


def _feed(config: TrainConfig, data: RunData, collate: Collate, save: Save | None) -> Feed:
    assert data.stream is not None
    assert data.encode is not None
    batching = Batching(
        rows_per_batch=config.train_batch_size_per_device,
        batches_per_step=config.gradient_accumulation_steps,
        by_length=config.group_by_length,
        seed=config.seed,
        num_epochs=None if config.num_epochs is None else int(config.num_epochs),
        rank=rank(),
        world_size=world_size(),
    )
    place = Place() if save is None or save.position.stream is None else Place(**save.position.stream)
    return Feed(data.stream, data.encode, collate, batching, data.splits["train"].sha256, place)


def _order(config: TrainConfig, rows: datasets.Dataset) -> Order:
    lengths = [int(length) for length in rows["length"]]
    rows_per_step = config.train_batch_size_per_device * config.gradient_accumulation_steps * world_size()
    return Order(lengths, rows_per_step, config.group_by_length, config.seed)
