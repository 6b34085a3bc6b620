"""Before a run trains: its rows as tokens, its model with its adapter, and what is refused or told first.

Writes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets  # type: ignore[import-untyped]
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from loradock_train.config import TrainConfig
from loradock_train.config_task import TaskOptions
from loradock_train.continued import check_adapter_base, load_adapter
from loradock_train.dataset import Collator, DataReport, build_dataset
from loradock_train.encode import Encoder
from loradock_train.errors import ModelError
from loradock_train.feed import Encode
from loradock_train.head import HeadScorer, head_dataset, load_head_model, text_ids
from loradock_train.model import (
    Precision,
    add_adapter,
    attention_options,
    decide_precision,
    inner_model,
    load_model,
    make_model,
)
from loradock_train.packing import can_pack
from loradock_train.parameters import count_parameters, parameter_lines, select_trainable
from loradock_train.preference import build_pairs
from loradock_train.proof import MAX_PROMPT_TOKENS, probe_logits
from loradock_train.rows import Rows, read_rows
from loradock_train.shared import Alone
from loradock_train.stream import Stream, open_stream
from loradock_train.task import Scorer, make_scorer
from loradock_train.task_rows import check_answers
from loradock_train.tokenizer import padding_id
from loradock_train.vision import check_images, make_encoder, probes_of


@dataclass(frozen=True)
class RunData:
    """Both splits, ready for the trainer."""

    splits: dict[str, Rows]
    train: datasets.Dataset
    valid: datasets.Dataset | None
    reports: dict[str, DataReport]
    probes: list[list[int]]
    encoder: Encoder
    processor: Any = None
    """Of a model that sees."""
    probe_pixels: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """What the model gets beside the probes that show an image, by their numbers."""
    scorer: Scorer | None = None
    """Of the run's task."""
    stream: Stream | None = None
    """Where the rows of training come from; then `train` and its report are those of the first block."""
    encode: Encode | None = None
    """Makes `train` of other blocks."""


def open_rows(config: TrainConfig) -> tuple[Rows, Stream | None]:
    """The rows of training; of a stream those of its first block, and the stream. Raises DataError."""
    if not config.streaming:
        return read_rows(config.train_path, config.format, "train_path"), None
    stream, rows = open_stream(config.train_path, config.format, "train_path", config.shuffle_buffer, config.seed)
    return rows, stream


def _load_head_data(config: TrainConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskOptions) -> RunData:
    """As load_data, for a classification head."""
    splits = {"train": rows}
    if config.valid_path is not None:
        splits["valid"] = read_rows(config.valid_path, rows.format, "valid_path")
    built = {}
    for split, each in splits.items():
        check_answers(each, task, f"{split}_path")
        built[split] = head_dataset(each, config, tokenizer, f"{split}_path")
    reports = {split: report for split, (_, report) in built.items()}
    probed = splits.get("valid", rows).rows[: config.num_probe_prompts]
    probes = [text_ids(row, tokenizer)[:MAX_PROMPT_TOKENS] for row in probed]
    valid = built["valid"][0] if "valid" in built else None
    scorer = None
    if "valid" in splits:
        scorer = HeadScorer(task, splits["valid"], tokenizer, Collator(padding_id(tokenizer)), config)
    encoder = make_encoder(config, tokenizer, None)
    return RunData(splits, built["train"][0], valid, reports, probes, encoder, scorer=scorer)


def load_data(
    config: TrainConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    processor: Any = None,
    stream: Stream | None = None,
) -> RunData:
    if config.task is not None and config.task.has_head:
        return _load_head_data(config, rows, tokenizer, config.task)
    packing = config.packing if config.packing is not None else rows.format == "text" and processor is None
    if config.preference is not None and processor is not None:
        raise ModelError("preference trains on text alone, and this base sees images: take a text model")
    encoder = make_encoder(config, tokenizer, processor)
    check_images(encoder, rows, packing, config.task is not None)
    options = (encoder, config.context_length, config.on_long_rows, packing)
    encode = partial(_encode, options, config.task)
    build: Callable[[Rows, str], tuple[datasets.Dataset, DataReport]] = (
        (lambda split, key: build_dataset(split, *options, key))
        if config.preference is None
        else (lambda split, key: build_pairs(split, encoder, config.context_length, config.on_long_rows, key))
    )
    train_set, report = build(rows, "train_path") if stream is None else encode(rows)
    reports = {"train": report}
    valid_set, valid_rows = None, None
    if config.valid_path is not None:
        valid_rows = read_rows(config.valid_path, rows.format, "valid_path")
        valid_set, reports["valid"] = build(valid_rows, "valid_path")
    probed = (valid_rows if valid_rows is not None else rows).rows[: config.num_probe_prompts]
    probes, pixels = probes_of(encoder, probed, rows.format)
    splits = {"train": rows} if valid_rows is None else {"train": rows, "valid": valid_rows}
    scorer = None
    if config.task is not None and valid_rows is not None:
        for key, each in (("train_path", rows), ("valid_path", valid_rows)):
            check_answers(each, config.task, key)
        scorer = make_scorer(config, valid_rows, encoder, tokenizer)
    return RunData(splits, train_set, valid_set, reports, probes, encoder, processor, pixels, scorer, stream, encode)


def _encode(
    options: tuple[Encoder, int, Literal["error", "truncate", "drop"], bool], task: TaskOptions | None, rows: Rows
) -> tuple[datasets.Dataset, DataReport]:
    """A block of a stream."""
    if task is not None:
        check_answers(rows, task, "train_path")
    return build_dataset(rows, *options, "train_path", is_part=True)


def prepare_model(
    config: TrainConfig, architecture: Any, tokenizer: PreTrainedTokenizerBase, data: RunData, shared: Alone
) -> tuple[Precision, Any, torch.Tensor]:
    """The model with its adapter, its types, and what it said to the probes before either was trained."""
    base_dtype = None if architecture is None else getattr(architecture, "dtype", None) or torch.float32
    precision = decide_precision(config, base_dtype)
    model: Any
    if config.has_head:
        model = load_head_model(config, padding_id(tokenizer), precision.weights, attention_options(config))
    else:
        is_new = config.kind == "scratch"
        make = partial(make_model, config, tokenizer, precision) if is_new else partial(load_model, config, precision)
        model = shared.model(make)
    is_there = config.is_sharded or config.quantisation is not None  # divided ones go part by part
    if torch.cuda.is_available() and not is_there:
        model.to("cuda")
    base_logits = probe_logits(model, data.probes, data.probe_pixels)
    torch.manual_seed(config.seed)  # a new adapter follows from the seed, not from what loading the base drew before
    if config.lora_config is not None and config.adapter_path is not None:
        model = load_adapter(model, Path(config.adapter_path), config.lora_config)
    elif config.lora_config is not None:
        model = add_adapter(model, config.lora_config)
    if config.trainable is not None:
        select_trainable(model, config.trainable)
    return precision, model, base_logits


def adapter_notices(config: TrainConfig) -> list[str]:
    """What must be heard about an adapter that is gone on from. Raises ModelError for another base's."""
    if config.adapter_path is None or config.model_id is None:
        return []
    return check_adapter_base(Path(config.adapter_path), config.model_id)


def check_packing(model: nn.Module, data: RunData, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError where documents of one row would see each other."""
    if "position_ids" in data.train.column_names and not can_pack(inner_model(model), len(tokenizer)):
        raise ModelError(
            f"packing: {type(inner_model(model)).__name__} with this attention lets packed documents see each other; "
            "set packing: false, or attn_implementation: sdpa"
        )


def announce(
    console: Console,
    config: TrainConfig,
    model: nn.Module,
    data: RunData,
    precision: Precision,
    notices: Sequence[str],
) -> None:
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False)
    count, report = count_parameters(model), data.reports["train"]
    is_packed = "position_ids" in data.train.column_names
    packed = f" packed into {report.num_examples:,}" if is_packed else ""
    if data.stream is not None:
        packed += f" in the first block of a stream of {len(data.stream.shards):,} shards"
    console.print(
        f"{config.kind}: {count.trainable:,} of {count.total:,} parameters trained ({count.share:.3%}), "
        f"{report.num_documents:,} {report.format} rows{packed}, {report.num_trained_tokens:,} tokens with a loss, "
        f"arithmetic {precision.arithmetic}, learning rate {config.peak_learning_rate:g}",
        markup=False,
        highlight=False,
    )
    for line in parameter_lines(model):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
