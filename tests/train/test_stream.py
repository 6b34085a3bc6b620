"""Streams: what is read when, in which order, that it goes on from any place, and that little of it is held."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest

from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_tokenizer
from loradock_train import hub_rows, stream
from loradock_train.before import _encode
from loradock_train.config import TrainConfig
from loradock_train.dataset import Collator
from loradock_train.encode import Encoder
from loradock_train.errors import DataError
from loradock_train.feed import Batching, Feed, Place
from loradock_train.stream import Cursor, Stream, open_stream


def shards(folder: Path, counts: Sequence[int] = (7, 5, 9)) -> list[str]:
    for shard, count in enumerate(counts):
        rows = "".join(json.dumps({"text": f"{shard}-{i}"}) + "\n" for i in range(count))
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return [str(folder)]


def opened(paths: Sequence[str], buffer_rows: int = 4, seed: int = 1) -> Stream:
    return open_stream(paths, "auto", "train_path", buffer_rows, seed)[0]


def of_pass(found: Stream, epoch: int) -> list[str]:
    blocks = takewhile(lambda block: block.cursor.epoch == epoch, found.blocks(Cursor(epoch, passes=float(epoch))))
    return [row.values["text"] for block in blocks for row in block.rows]


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_pass_reads_every_row_once_and_the_shards_in_an_order_of_its_own(tmp_path: Path) -> None:
    found = opened(shards(tmp_path))
    passes = [of_pass(found, epoch) for epoch in range(4)]
    assert all(sorted(rows) == sorted(passes[0]) and len(set(rows)) == 21 for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 1
    assert of_pass(opened(shards(tmp_path)), 2) == passes[2]


def test_stream_goes_on_from_the_beginning_of_any_block(tmp_path: Path) -> None:
    found = opened(shards(tmp_path))
    blocks = list(islice(found.blocks(Cursor()), 14))
    for at, block in enumerate(blocks):
        again = Cursor(**json.loads(json.dumps(asdict(block.cursor))))
        assert list(islice(found.blocks(again), 14 - at)) == blocks[at:]
    assert [block.ends for block in blocks] == sorted(block.ends for block in blocks)
    assert {len(block.rows) for block in blocks} == {4, 1}


def test_block_ends_early_where_its_rows_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 40)  # a row has 16 bytes
    assert {len(block.rows) for block in islice(opened(shards(tmp_path), 1000).blocks(Cursor()), 7)} == {3}


def test_raw_text_comes_in_pieces_of_whole_lines_and_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 10)
    text = "\ufeffone\ntwo\nthree\n" + "é€𝄞" * 9 + "\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    rows = next(iter(opened([str(tmp_path)], 1000).blocks(Cursor()))).rows
    assert "".join(row.values["text"] for row in rows) == text.removeprefix("\ufeff")
    assert [row.is_continued for row in rows] == [True] * (len(rows) - 1) + [False]
    assert rows[0].values["text"] == "one\ntwo\n"
    assert (rows[0].line, rows[1].line) == (1, 3)


def test_end_of_text_stands_behind_the_last_piece_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_text("one\ntwo\nend")
    tokenizer: Any = make_tokenizer(tmp_path / "tokenizer")
    rows = next(iter(opened([str(tmp_path / "a.txt")], 1000).blocks(Cursor()))).rows
    ends = [Encoder(tokenizer).encode(row, "text").input_ids[-1] == tokenizer.eos_token_id for row in rows]
    assert ends == [False, False, True]


def test_stream_larger_than_a_bound_is_read_without_holding_it(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 4000}) + "\n"
    with gzip.open(tmp_path / "big.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(16_000):
            file.write(line.encode())
    found = opened([str(tmp_path)], 100)
    tracemalloc.start()
    num_rows = sum(len(b.rows) for b in takewhile(lambda b: b.cursor.epoch == 0, found.blocks(Cursor())))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 16_000  # 64 MB
    assert peak_bytes < 3_000_000


# ---- what is wrong with it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"1 broken line:\n  .*b\.jsonl, line 9: not valid JSON"),
        ("[1]", r"1 broken line:\n  .*b\.jsonl, line 9: expected a JSON object, found list"),
        ('{"prompt": "x", "completion": "y"}', r"1 problem:\n  .*b\.jsonl, line 9: missing key 'text'"),
        ('{"text": 5}', r"1 problem:\n  .*b\.jsonl, line 9: 'text' must be a string, found int"),
    ],
)
def test_bad_row_is_told_with_its_line_when_it_is_met(tmp_path: Path, line: str, message: str) -> None:
    good = [json.dumps({"text": f"{i}"}) for i in range(12)]
    (tmp_path / "b.jsonl").write_text("\n".join([*good[:8], line, *good[8:]]) + "\n")
    feed = make_feed(opened([str(tmp_path / "b.jsonl")]), tmp_path, packing=False)
    with pytest.raises(DataError, match=rf"^train_path has {message}"):
        list(feed)
    assert feed.place.taken + feed.place.before == 7, "the blocks before it were trained on, but for their last step"


def test_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_LINE_BYTES", 50)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * 90 + '"}\n')
    with pytest.raises(DataError, match=r"a line is too long:\n  .*a\.jsonl, line 2: over 50 bytes"):
        opened([str(tmp_path)])


def test_stream_without_rows_or_of_bytes_that_are_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"train_path has no data:\n  .*a\.jsonl: no rows"):
        opened([str(tmp_path)])
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"b\.txt, line 2: not valid UTF-8"):
        opened([str(tmp_path / "b.txt")])


def test_pass_of_which_no_row_fits_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "def " * 90}) + "\n")
    batches = iter(make_feed(opened([str(tmp_path)]), tmp_path, packing=False, on_long_rows="drop"))
    with pytest.raises(DataError, match="no row of a whole pass can be trained on"):
        next(batches)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "streaming needs max_steps, max_time_s or num_epochs"),
        ({"num_epochs": 1.5}, "num_epochs: 1.5 of a stream: it is read in whole passes"),
    ],
)
def test_stream_without_a_limit_that_can_be_kept_is_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(model_id="x", train_path=("y",), streaming=True, **limits)


# ---- the feed --------------------------------------------------------------------------------------------------------


def make_feed(
    found: Stream,
    folder: Path,
    place: Place | None = None,
    packing: bool = True,
    on_long_rows: Any = "error",
    **more: Any,
) -> Feed:
    encoder = Encoder(make_tokenizer(folder / "tokenizer"))
    options = {"rows_per_batch": 1, "batches_per_step": 1, "by_length": True, "seed": 1, "num_epochs": None}

    def encode(rows: Any) -> Any:
        return _encode((encoder, 16, on_long_rows, packing), None, rows)

    return Feed(found, encode, Collator(0), Batching(**(options | more)), "", place or Place())


def contents(batches: Iterator[dict[str, Any]], count: int) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in islice(batches, count)]


@pytest.mark.parametrize("packing", [True, False])
def test_feed_goes_on_behind_any_step(tmp_path: Path, packing: bool) -> None:
    found = opened(shards(tmp_path))
    feed = make_feed(found, tmp_path, packing=packing, rows_per_batch=2, batches_per_step=2)
    batches, places, steps = iter(feed), [], []
    for _ in range(9):
        steps.append(contents(batches, 2))
        places.append(json.loads(json.dumps(asdict(feed.place))))
    for at, place in enumerate(places[:-1]):
        again = make_feed(
            found, tmp_path, Place(**place), packing=packing, rows_per_batch=2, batches_per_step=2
        )  # fmt: skip
        others = iter(again)
        assert [contents(others, 2) for _ in steps[at + 1 :]] == steps[at + 1 :]
        assert asdict(again.place) == places[-1]


def test_two_processes_take_the_rows_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    found = opened(shards(tmp_path))
    common: dict[str, Any] = {"packing": False, "num_epochs": 1, "batches_per_step": 2}
    alone = make_feed(found, tmp_path, rows_per_batch=4, **common)
    pair = [make_feed(found, tmp_path, rows_per_batch=2, rank=rank, world_size=2, **common) for rank in range(2)]
    whole = [sorted(map(tuple, rows_of(batch))) for batch in alone]
    halves = [[rows_of(batch) for batch in feed] for feed in pair]
    assert len(halves[0]) == len(halves[1]) == len(whole) == 6
    assert [sorted(map(tuple, a + b)) for a, b in zip(*halves, strict=True)] == whole
    assert [feed.is_over for feed in (alone, *pair)] == [True] * 3
    assert sum(len(rows) for rows in whole) == 21


def rows_of(batch: dict[str, Any]) -> list[list[int]]:
    """Rows with a loss, without their padding."""
    return [
        [token for token, label in zip(row, labels, strict=True) if label != -100]
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        if any(label != -100 for label in labels)
    ]


def test_last_step_of_fewer_rows_than_batches_is_filled_with_what_teaches_nothing(tmp_path: Path) -> None:
    found = opened(shards(tmp_path, (5,)))
    feed = make_feed(found, tmp_path, packing=False, num_epochs=1, batches_per_step=4)
    counts = [int((batch["labels"] != -100).any()) for batch in feed]
    assert (len(counts), sum(counts)) == (8, 5)


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def test_hub_data_set_is_read_by_its_shards_and_goes_on_in_the_middle_of_one(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    files = [str(write_rows(f"{shard}.jsonl", [{"text": f"{shard}-{i}"} for i in range(11)])) for shard in range(3)]

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options))
        return original("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache"))

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = opened(["hf://datasets/org/name?split=valid&config=small&revision=abc"], 4)
    assert asked == [("org/name", "small", {"split": "valid", "revision": "abc", "streaming": True})]
    assert sorted(of_pass(found, 0)) == sorted(f"{shard}-{i}" for shard in range(3) for i in range(11))
    blocks = list(islice(found.blocks(Cursor()), 9))
    for at, block in enumerate(blocks):
        again = Cursor(**json.loads(json.dumps(asdict(block.cursor))))
        assert list(islice(found.blocks(again), 9 - at)) == blocks[at:]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://datasets/org/name", True),
        ("hf://datasets/name?split=train", True),
        ("hf://datasets/org/name/data/a.jsonl.gz", False),
        ("s3://bucket/a.jsonl", False),
    ],
)
def test_data_set_is_told_from_a_file(path: str, expected: bool) -> None:
    assert hub_rows.is_hub(path) is expected


def test_hub_address_with_an_unknown_option_is_refused() -> None:
    with pytest.raises(DataError, match=r"unknown option splt \(known: split, config, revision\)"):
        opened(["hf://datasets/org/name?splt=train"])
