"""Data files: compressed, far away, broken; and the bytes are those that were written."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
import zstandard

from loradock_train.errors import DataError
from loradock_train.files import HASHED_WHOLE_BYTES, DataFile, Decompressor, data_files
from loradock_train.rows import read_rows

ROWS = [{"text": f"row {i} " + "é" * (i % 7)} for i in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_rows_of_a_compressed_file_are_those_of_the_plain_one(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](LINES[:900]) + COMPRESS[ending](LINES[900:]))  # two parts, as `cat` joins them
    rows = read_rows([str(path)], "auto", "train_path")
    assert [row.values for row in rows.rows] == ROWS
    assert rows.rows[7].where == f"{path}, line 8"


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_file_is_one_document_however_it_is_compressed(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending]("one\ntwo é\n".encode()))
    rows = read_rows([str(tmp_path)], "auto", "train_path")
    assert [(row.line, row.values) for row in rows.rows] == [(0, {"text": "one\ntwo é\n"})]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_file_that_ends_too_early_is_an_error_that_names_it(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](LINES)[:-9])
    with pytest.raises(DataError, match=rf"rows.jsonl{ending}: byte \d+: ends in the middle"):
        read_rows([str(path)], "auto", "train_path")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_file_that_is_not_compressed_as_its_name_says_is_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=rf"a compressed file is broken:\n.*rows.jsonl{ending}: byte \d+: \S"):
        read_rows([str(path)], "auto", "train_path")


def test_share_of_a_compressed_file_depends_on_the_offset_and_not_on_how_it_was_read(tmp_path: Path) -> None:
    chance = random.Random(1)
    content = bytes(chance.choices(range(256), k=400_000))
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(content))
    file = DataFile(str(path), path.stat().st_size)

    def share(sizes: list[int]) -> int:
        with file.open() as (stream, reader):
            for size in sizes:
                stream.read(size)
            assert isinstance(reader, Decompressor)
            return reader.stored_bytes_at(300_000)

    assert share([300_000]) == share([1, 99_999, 200_000]) == share([100] * 3_000)
    assert 0.7 < share([300_000]) / file.size_bytes < 0.95


def test_url_of_fsspec_is_read_like_a_file_and_like_a_directory() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/far/a/one.jsonl.gz", gzip.compress(LINES))
    memory.pipe("/far/two.jsonl", LINES)
    memory.pipe("/far/README.md", b"no data")
    assert len(read_rows(["memory://far/two.jsonl"], "auto", "train_path").rows) == 50
    files = data_files(["memory://far"], "train_path")
    assert [file.name for file in files] == ["memory:///far/a/one.jsonl.gz", "memory:///far/two.jsonl"]
    assert len(read_rows(["memory://far"], "auto", "train_path").rows) == 100


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://far/none.jsonl", "no such file"),
        ("nowhere://a/b.jsonl", "nothing installed reads nowhere://"),
        ("memory://far/rows.csv", r"expected a \.jsonl or \.txt file \(as it is, or \.gz or \.zst\)"),
    ],
)
def test_url_that_cannot_be_read_is_told_with_its_key(path: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^train_path cannot be read:\n  {path}: {message}"):
        read_rows([path], "auto", "train_path")


def test_fingerprint_of_a_large_file_sees_its_size_and_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"

    def fingerprint(content: bytes) -> str:
        path.write_bytes(content)
        return DataFile(str(path), len(content)).fingerprint()

    zeros = bytes(3 * HASHED_WHOLE_BYTES)
    prints = {
        fingerprint(zeros),
        fingerprint(zeros + b"\0"),
        fingerprint(b"a" + zeros[1:]),
        fingerprint(zeros[1:] + b"a"),
    }
    assert len(prints) == 4
    assert fingerprint(b"small") != fingerprint(b"smalk")
