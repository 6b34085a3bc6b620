"""From rows to what the trainer eats: token ids and labels in a `datasets.Dataset`, with nothing cut or dropped unsaid.

Also the collator, which pads a batch to its own longest row. Knows nothing of models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch

from loradock_train.encode import IGNORED, Encoder, Example
from loradock_train.errors import DataError, Problem
from loradock_train.packing import join, pack, split_long
from loradock_train.rows import Rows

PAD_TO_MULTIPLE = 8


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of one split."""

    format: str
    num_rows: int
    num_examples: int
    """Training rows after packing, truncating and dropping."""
    num_tokens: int
    num_trained_tokens: int
    """Tokens with a loss."""
    longest_tokens: int
    num_truncated: int
    num_dropped: int
    num_split: int
    """Documents of raw text over context_length that became several."""
    num_documents: int
    """What was packed into the rows; num_examples where nothing was packed."""
    sha256: str

    def plus(self, other: "DataReport") -> "DataReport":
        """Of the rows of both: parts of one split."""
        mine, theirs = asdict(self), asdict(other)
        sums = {name: value + theirs[name] for name, value in mine.items() if isinstance(value, int)}
        sums["longest_tokens"] = max(self.longest_tokens, other.longest_tokens)
        return replace(self, **sums)

    def notices(self, key: str, context_length: int) -> list[str]:
        """What the user must hear about."""
        told: list[str] = []
        if self.num_truncated:
            told.append(
                f"{key}: {self.num_truncated} of {self.num_rows} rows were cut to context_length {context_length}"
            )
        if self.num_dropped:
            told.append(
                f"{key}: {self.num_dropped} of {self.num_rows} rows over context_length {context_length} were left out"
            )
        if self.num_split:
            told.append(
                f"{key}: {self.num_split} of {self.num_rows} documents over context_length {context_length} were split "
                "(nothing was left out)"
            )
        return told


def build_dataset(
    rows: Rows,
    encoder: Encoder,
    context_length: int,
    on_long_rows: Literal["error", "truncate", "drop"],
    packing: bool,
    key: str,
    is_part: bool = False,
) -> tuple[datasets.Dataset, DataReport]:
    """Encode every row. Raises DataError for rows over context_length (unless told otherwise) or without a learnt
    token. is_part: more rows come, so that these alone may be left out entirely."""
    examples = [encoder.encode(row, rows.format) for row in rows.rows]
    longest = max(len(example.input_ids) for example in examples)
    split = 0
    if packing and rows.format == "text":
        split = sum(len(example.input_ids) > context_length for example in examples)
        kept, truncated, dropped = [part for each in examples for part in split_long(each, context_length)], 0, 0
    else:
        kept, truncated, dropped = _fit(examples, rows, context_length, on_long_rows, key)
    num_documents, positions = len(kept), None
    if packing and any(example.images for example in kept):
        raise DataError(f"{key} cannot be packed:", [Problem(key, "rows with images are not packed; packing: false")])
    if packing:
        packed = pack([len(example.input_ids) for example in kept], context_length)
        joined = [join([kept[index] for index in row]) for row in packed]
        kept, positions = [example for example, _ in joined], [positions for _, positions in joined]
    if not is_part and not any(example.num_trained_tokens for example in kept):
        raise DataError(f"{key} has nothing to learn:", [Problem(key, f"no row fits into {context_length} tokens")])
    report = DataReport(
        format=rows.format,
        num_rows=len(rows.rows),
        num_examples=len(kept),
        num_tokens=sum(len(example.input_ids) for example in kept),
        num_trained_tokens=sum(example.num_trained_tokens for example in kept),
        longest_tokens=longest,
        num_truncated=truncated,
        num_dropped=dropped,
        num_split=split,
        num_documents=num_documents,
        sha256=rows.sha256,
    )
    return _as_dataset(kept, positions), report


def _fit(
    examples: Sequence[Example], rows: Rows, context_length: int, policy: str, key: str
) -> tuple[list[Example], int, int]:
    """Apply `on_long_rows`. Returns the rows kept and the numbers truncated and dropped."""
    kept: list[Example] = []
    problems: list[Problem] = []
    truncated = dropped = 0
    for row, example in zip(rows.rows, examples, strict=True):
        num_tokens = len(example.input_ids)
        if num_tokens <= context_length:
            if not example.num_trained_tokens:
                problems.append(Problem(row.where, "nothing to learn: the row has no answer token"))
            kept.append(example)
        elif policy == "error":
            problems.append(Problem(row.where, f"{num_tokens} tokens are over context_length {context_length}"))
        elif policy == "drop":
            dropped += 1
        else:
            truncated += 1
            cut = replace(example, input_ids=example.input_ids[:context_length], labels=example.labels[:context_length])
            if example.images_end > context_length:
                problems.append(
                    Problem(
                        row.where,
                        f"cut to context_length {context_length}, half an image would be left ({num_tokens} tokens, "
                        f"of which images take up to {example.images_end}); raise it, or set on_long_rows: drop",
                    )
                )
            elif not cut.num_trained_tokens:
                problems.append(
                    Problem(
                        row.where,
                        f"cut to context_length {context_length}, nothing of the answer is left ({num_tokens} tokens)",
                    )
                )
            kept.append(cut)
    if problems:
        fix = "" if policy != "error" else " (raise context_length, or set on_long_rows: truncate or drop)"
        raise DataError(
            f"{key} has {len(problems)} row{'s' if len(problems) != 1 else ''} that cannot be trained on{fix}:",
            problems,
        )
    return kept, truncated, dropped


def _as_dataset(examples: Sequence[Example], positions: Sequence[Sequence[int]] | None) -> datasets.Dataset:
    columns: dict[str, Any] = {
        "input_ids": [np.asarray(example.input_ids, dtype=np.int32) for example in examples],
        "labels": [np.asarray(example.labels, dtype=np.int32) for example in examples],
        "length": [len(example.input_ids) for example in examples],
    }
    if any(example.images for example in examples):
        columns["images"] = [list(example.images) for example in examples]
    if positions is not None:
        columns["position_ids"] = [np.asarray(row, dtype=np.int32) for row in positions]
    dataset = datasets.Dataset.from_dict(columns)
    dataset.set_format("numpy")
    return dataset


@dataclass(frozen=True)
class Collator:
    """Pads a batch to its longest row (a multiple of 8), with the mask that says so.

    On the left, rows bring positions that begin at their own first token: models with learnt positions would else see
    them elsewhere. Packed rows bring positions anyway, and get no mask: their padding is one more document, which
    nothing sees. `num_tokens` is for the meter; the trainer takes it out before the model sees the batch.

    B: rows, T: tokens of the longest row.
    """

    pad_token_id: int
    side: Literal["right", "left"] = "right"
    width_tokens: int | None = None
    """Of every batch; default: its longest row decides."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        width = math.ceil(longest / PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE if longest > PAD_TO_MULTIPLE else longest
        width = width if self.width_tokens is None else max(width, self.width_tokens)
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)  # B, T
        labels = torch.full(shape, IGNORED, dtype=torch.long)  # B, T
        mask = torch.zeros(shape, dtype=torch.long)  # B, T
        positions = torch.zeros(shape, dtype=torch.long)  # B, T
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            begin = width - length if self.side == "left" else 0
            held = slice(begin, begin + length)
            input_ids[index, held] = torch.as_tensor(row["input_ids"])
            labels[index, held] = torch.as_tensor(row["labels"])
            labels[index, begin] = IGNORED  # nothing comes before the first token: it has no loss, and does not count
            mask[index, held] = 1
            positions[index, held] = (
                torch.as_tensor(row["position_ids"]) if "position_ids" in row else torch.arange(length)
            )
            if "position_ids" in row:
                padding = slice(0, begin) if self.side == "left" else slice(length, width)
                positions[index, padding] = torch.arange(width - length)
        batch = {"input_ids": input_ids, "labels": labels, "num_tokens": mask.sum()}
        if "position_ids" in rows[0]:
            is_plain = bool((positions[:, -1] == width - 1).all())  # one document in every row
            return batch if is_plain else {**batch, "position_ids": positions}
        if bool(mask.all()):
            return batch  # without padding no mask: attention then takes its causal fast path
        batch["attention_mask"] = mask
        return batch if self.side == "right" else {**batch, "position_ids": positions}
