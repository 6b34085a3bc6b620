"""Nothing is cut or dropped unsaid; batches are padded to their own longest row."""

from typing import Any

import pytest
import torch

from loradock_testing.letters import BEGIN, END, Letters, ids
from loradock_train.dataset import Collator, build_dataset
from loradock_train.encode import IGNORED, Encoder
from loradock_train.errors import DataError
from loradock_train.rows import Format, Row, Rows


def rows_of(row_format: Format, *values: dict[str, Any]) -> Rows:
    rows = tuple(Row("rows.jsonl", line, value) for line, value in enumerate(values, start=1))
    return Rows(row_format, rows, "0" * 64)


COMPLETIONS = rows_of(
    "completion",
    {"prompt": "ab", "completion": "c"},
    {"prompt": "abcdef", "completion": "ghijkl"},
    {"prompt": "a", "completion": "b"},
)


def build(rows: Rows, length: int, policy: Any = "error", packing: bool = False) -> Any:
    return build_dataset(rows, Encoder(Letters()), length, policy, packing, "train_path")


def test_rows_that_fit_are_all_kept_and_counted() -> None:
    dataset, report = build(COMPLETIONS, 20)
    assert dataset[0]["input_ids"].tolist() == [BEGIN, *ids("abc"), END]
    assert (report.num_rows, report.num_examples, report.longest_tokens) == (3, 3, 14)
    assert (report.num_tokens, report.num_trained_tokens) == (5 + 14 + 4, 2 + 7 + 2)
    assert report.notices("train_path", 20) == []


def test_long_row_stops_the_run_and_is_named() -> None:
    with pytest.raises(DataError) as caught:
        build(COMPLETIONS, 8)
    assert "1 row that cannot be trained on (raise context_length, or set on_long_rows: truncate or drop)" in str(
        caught.value
    )
    assert "rows.jsonl, line 2: 14 tokens are over context_length 8" in str(caught.value)


def test_long_row_truncated_is_counted_and_told() -> None:
    dataset, report = build(COMPLETIONS, 10, "truncate")
    assert dataset[1]["input_ids"].tolist() == [BEGIN, *ids("abcdefghi")]
    assert dataset[1]["labels"].tolist() == [IGNORED] * 7 + ids("ghi")
    assert (report.num_examples, report.num_truncated) == (3, 1)
    assert report.notices("train_path", 10) == ["train_path: 1 of 3 rows were cut to context_length 10"]


def test_long_row_dropped_is_counted_and_told() -> None:
    dataset, report = build(COMPLETIONS, 10, "drop")
    assert (len(dataset), report.num_dropped) == (2, 1)
    assert report.notices("train_path", 10) == ["train_path: 1 of 3 rows over context_length 10 were left out"]


def test_row_whose_answer_is_cut_away_is_refused_not_trained_on_nothing() -> None:
    with pytest.raises(
        DataError, match=r"line 2: cut to context_length 6, nothing of the answer is left \(14 tokens\)"
    ):
        build(COMPLETIONS, 6, "truncate")


def test_all_rows_dropped_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        build(rows_of("completion", {"prompt": "abcdef", "completion": "ghi"}), 8, "drop")


def test_packing_off_keeps_one_document_a_row() -> None:
    dataset, _ = build(rows_of("text", {"text": "abcd"}, {"text": "ef"}), 8)
    assert [len(row["input_ids"]) for row in dataset] == [6, 4]


def test_collator_pads_to_the_longest_row_in_eights() -> None:
    batch = Collator(pad_token_id=9)(
        [
            {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
            {"input_ids": list(range(10, 20)), "labels": list(range(10, 20))},
        ]
    )
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [9] * 13
    assert batch["labels"][0].tolist() == [IGNORED, 6, 7] + [IGNORED] * 13
    assert batch["attention_mask"][0].tolist() == [1] * 3 + [0] * 13
    assert batch["attention_mask"][1].tolist() == [1] * 10 + [0] * 6


def test_collator_without_padding_sends_no_mask() -> None:
    batch = Collator(0)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2)
    assert set(batch) == {"input_ids", "labels", "num_tokens"}
    assert int(batch["num_tokens"]) == 6
    assert batch["input_ids"].shape == (2, 3)


def test_collator_never_counts_the_first_token() -> None:
    batch = Collator(0)([{"input_ids": [5, 6], "labels": [5, 6]}])
    assert torch.equal(batch["labels"], torch.tensor([[IGNORED, 6]]))


def test_padding_that_is_also_the_end_token_does_not_mask_a_learnt_end() -> None:
    batch = Collator(pad_token_id=END)(
        [{"input_ids": [5, END], "labels": [IGNORED, END]}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    )
    assert batch["labels"][0].tolist() == [IGNORED, END, IGNORED]
    assert batch["attention_mask"][0].tolist() == [1, 1, 0]
