"""A classification head instead of the language model's: its rows, its model, its loss and its score.

A text is what `/classify` will see: tokenised as it stands, with the special tokens that the tokenizer adds; its class
is read off the last token. The head is new, trained in full beside an adapter or all weights. Legend: B rows of a
batch, T tokens of the longest, D hidden size, C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from loradock_train.config import TrainConfig
from loradock_train.config_task import TaskOptions
from loradock_train.dataset import Collator, DataReport
from loradock_train.encode import IGNORED
from loradock_train.errors import DataError, ModelError, Problem
from loradock_train.model import inner_model
from loradock_train.rows import Row, Rows
from loradock_train.task import Scores, as_it_answers
from loradock_train.task_metrics import best_constant, classification
from loradock_train.task_rows import scored_rows

# ---- rows ----------------------------------------------------------------------------------------------------------


def head_dataset(
    rows: Rows, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> tuple[datasets.Dataset, DataReport]:
    """Rows {"text", "label"} as ids and the number of their class. Raises DataError for rows over context_length."""
    assert config.task is not None
    kept: list[tuple[list[int], int]] = []
    problems: list[Problem] = []
    longest = truncated = dropped = 0
    for row in rows.rows:
        ids = text_ids(row, tokenizer)
        longest = max(longest, len(ids))
        if len(ids) > config.context_length:
            if config.on_long_rows == "error":
                told = f"{len(ids)} tokens are over context_length {config.context_length}"
                problems.append(Problem(row.where, told))
            dropped += config.on_long_rows == "drop"
            truncated += config.on_long_rows == "truncate"
        if len(ids) <= config.context_length or config.on_long_rows == "truncate":
            kept.append((ids[: config.context_length], config.task.labels.index(row.values["label"])))
        if not ids:
            problems.append(Problem(row.where, "the text is empty: there is no token to read a class off"))
    if problems or not kept:
        raise DataError(
            f"{key} has {len(problems)} rows that cannot be trained on (for long ones raise context_length, or set "
            "on_long_rows: truncate or drop):",
            problems or [Problem(key, f"no row fits into {config.context_length} tokens")],
        )
    report = DataReport(
        format=rows.format, num_rows=len(rows.rows), num_examples=len(kept),
        num_tokens=sum(len(ids) for ids, _ in kept), num_trained_tokens=len(kept), longest_tokens=longest,
        num_truncated=truncated, num_dropped=dropped, num_split=0, num_documents=len(kept), sha256=rows.sha256,
    )  # fmt: skip
    columns = {
        "input_ids": [np.asarray(ids, dtype=np.int32) for ids, _ in kept],
        "class": [number for _, number in kept],
        "length": [len(ids) for ids, _ in kept],
    }
    dataset = datasets.Dataset.from_dict(columns)
    dataset.set_format("numpy")
    return dataset, report


def text_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As `/classify` tokenises it."""
    ids: list[int] = list(tokenizer(row.values["text"])["input_ids"])
    return ids


@dataclass(frozen=True)
class HeadCollator:
    """Pads as the others do. Labels are B, 2: the class stands second, since a causal model's first label is never
    counted."""

    collate: Collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        plain = [{"input_ids": row["input_ids"], "labels": np.full(len(row["input_ids"]), IGNORED)} for row in rows]
        classes = torch.tensor([[IGNORED, int(row["class"])] for row in rows])  # B, 2
        return {**self.collate(plain), "labels": classes}


# ---- model ---------------------------------------------------------------------------------------------------------


def load_head_model(
    config: TrainConfig, tokenizer_pad: int, dtype: torch.dtype, options: Mapping[str, Any]
) -> PreTrainedModel:
    """The base with a fresh head, which depends on the seed alone. Raises ModelError."""
    assert config.task is not None
    labels = list(config.task.labels)
    torch.manual_seed(config.seed)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            str(config.model_id),
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            dtype=dtype,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"model_id {config.model_id}: no model with a classification head: {first}") from error
    model.config.pad_token_id = tokenizer_pad
    return cast(PreTrainedModel, model)


def class_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """B, C. Of a decoder, read off each row's last token by its mask (transformers looks for the padding's value, and
    would take a text's own end for padding where the two are one token); of others, as their own forward does."""
    whole = cast(Any, model)
    if not hasattr(whole, "score"):
        return cast(Tensor, type(model).forward(model, input_ids=input_ids, attention_mask=attention_mask).logits)
    body = getattr(whole, whole.base_model_prefix)
    hidden = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # B, T, D
    width = input_ids.shape[1]
    last = torch.full((len(input_ids),), width - 1, device=input_ids.device)
    if attention_mask is not None:
        last = attention_mask.sum(1) - 1
    return cast(Tensor, whole.score(hidden[torch.arange(len(input_ids), device=input_ids.device), last]))


def _forward(model: nn.Module) -> Callable[..., SequenceClassifierOutput]:
    def forward(
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput:
        logits = class_logits(model, input_ids, attention_mask).float()  # B, C
        total = functional.cross_entropy(logits, labels[:, 1], reduction="sum")
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return SequenceClassifierOutput(loss=cast(Any, total / count), logits=cast(Any, logits))

    return forward


@contextmanager
def head_loss(model: nn.Module) -> Iterator[None]:
    """The loss of rows, divided by the rows of the whole step, while the block runs. `model` is below PEFT."""
    model.forward = _forward(model)
    try:
        yield
    finally:
        del model.forward


# ---- score ---------------------------------------------------------------------------------------------------------


class HeadScorer:
    """The class with the highest probability, as `/classify` answers it."""

    def __init__(
        self, task: TaskOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase, collate: Collator,
        config: TrainConfig,
    ) -> None:  # fmt: skip
        chosen = [(row, text_ids(row, tokenizer)) for row in scored_rows(rows.rows, task.max_rows)]
        self.task = task
        self._rows = [(row, ids) for row, ids in chosen if len(ids) <= config.context_length]
        self._collate, self._batch_size = collate, config.eval_batch_size_per_device
        self.notices: list[str] = []
        if len(chosen) < len(rows.rows):
            self.notices.append(f"task: {len(chosen)} of {len(rows.rows)} validation rows are scored (task.max_rows)")
        if len(self._rows) < len(chosen):
            count = len(chosen) - len(self._rows)
            self.notices.append(f"task: {count} of {len(chosen)} validation rows are over context_length, not scored")

    def constant(self) -> dict[str, Any]:
        """See task.Scorer."""
        truths = [str(row.values["label"]) for row, _ in self._rows]
        return best_constant("classification", truths, self.task.labels, self.task.chosen_metric)

    def score(self, model: nn.Module, arithmetic: Literal["no", "bf16", "fp16"] | str) -> Scores:
        """See task.Scorer."""
        labels, device = self.task.labels, next(model.parameters()).device
        order = sorted(range(len(self._rows)), key=lambda index: -len(self._rows[index][1]))
        found: dict[int, list[float]] = {}
        with as_it_answers(model, arithmetic):
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                rows = [{"input_ids": self._rows[i][1], "labels": [IGNORED] * len(self._rows[i][1])} for i in batch]
                padded = self._collate(rows)
                mask = padded.get("attention_mask")
                ids = padded["input_ids"].to(device)
                logits = class_logits(inner_model(model), ids, None if mask is None else mask.to(device))
                found.update(zip(batch, logits.float().softmax(-1).tolist(), strict=True))
        predictions = []
        for index, (row, _) in enumerate(self._rows):
            answer = labels[max(range(len(labels)), key=found[index].__getitem__)]
            truth = str(row.values["label"])
            told = {"row": row.where, "prompt": row.values["text"], "answer": answer, "truth": truth}
            probabilities = {label: round(value, 6) for label, value in zip(labels, found[index], strict=True)}
            predictions.append({**told, "right": answer == truth, "probabilities": probabilities})
        truths, answers = ([str(each[key]) for each in predictions] for key in ("truth", "answer"))
        return Scores(classification(truths, answers, labels), predictions)
