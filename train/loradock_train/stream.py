"""Data that is read while the run goes on, and never held as a whole: shards in an order of chance, cut into blocks.

A block is what is shuffled, encoded and packed together: `shuffle_buffer` rows, or fewer where they are long
(BLOCK_BYTES). Where a block begins is known by a Cursor of a few numbers, from which the stream goes on: what lies
before is not read again, but for the part of one compressed file, which is decompressed. Which rows a block holds
follows from the files, the seed and the cursor alone. Knows nothing of tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, Protocol

from loradock_train.errors import MAX_SHOWN, DataError, Problem
from loradock_train.files import DataFile, data_files, passed_over
from loradock_train.order import shard_order
from loradock_train.rows import Format, Row, Rows, check_row, count_of, decide_format, parse_line, unread_keys

BLOCK_BYTES = 8 << 20
"""Of text in a block: about 100 MB in memory while it becomes tokens."""
PIECE_BYTES = 1 << 18
"""A raw text is read in pieces of this size, cut at the end of a line where there is one."""
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Read:
    """One row, what it took, and where reading goes on after it."""

    row: Row
    num_bytes: int
    mark: Any
    """The shard's own, in JSON's types."""
    share: float
    """Of the shard that is behind, 0 to 1: a function of the mark."""


class Shard(Protocol):
    """One part of a stream, read from its beginning or from a mark."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float:
        """Its size among the others."""

    def fingerprint(self) -> str:
        """Changes when the data does, as far as that is cheap to know."""

    def read(self, mark: Any, problems: list[Problem]) -> Iterator[Read]:
        """Broken rows are added to `problems`."""


@dataclass(frozen=True)
class Cursor:
    """Where a block begins."""

    epoch: int = 0
    shard: int = 0
    """Position in the order of this epoch."""
    mark: Any = None
    """In that shard; None: its beginning."""
    block: int = 0
    """Of this epoch."""
    passes: float = 0.0
    """Over the stream, that lie before it; the fraction counts bytes as they are stored."""


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled together."""

    cursor: Cursor
    rows: tuple[Row, ...]
    ends: float
    """Passes behind its last row."""


@dataclass(frozen=True)
class Stream:
    """The shards of a run's training data."""

    key: str
    """Of the config, for messages."""
    shards: tuple[Shard, ...]
    buffer_rows: int
    seed: int
    format: Format | Literal["auto"] = "auto"
    weights: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        sizes = [max(shard.weight, 1e-9) for shard in self.shards]
        object.__setattr__(self, "weights", tuple(size / sum(sizes) for size in sizes))

    def first(self) -> tuple["Stream", Rows]:
        """The stream with its format decided, and the rows of its first block, which bear the stream's hashes. Raises
        DataError."""
        block = next(self.blocks(Cursor()), None)
        if block is None or block.cursor.epoch:
            raise DataError(f"{self.key} has no data:", [Problem(shard.name, "no rows") for shard in self.shards])
        found = decide_format(block.rows, self.format, self.key)
        stream = replace(self, format=found)
        stream.check(block.rows)
        files = tuple((shard.name, shard.fingerprint()) for shard in self.shards)
        digest = hashlib.sha256("".join(print_ for _, print_ in files).encode()).hexdigest()
        return stream, Rows(found, block.rows, digest, files, unread_keys(block.rows, found, self.key))

    def check(self, rows: Sequence[Row]) -> None:
        """Raises DataError for rows of another format, with their lines."""
        assert self.format != "auto"
        problems = [problem for row in rows for problem in check_row(row, self.format)]
        if problems:
            raise DataError(f"{self.key} has {count_of(len(problems), 'problem')}:", problems)

    def blocks(self, cursor: Cursor) -> Iterator[Block]:
        """All blocks from there on, pass after pass without end; none for a stream without rows."""
        while True:
            was_empty = cursor.mark is None
            for block in self._pass(cursor):
                was_empty = False
                yield block
            if was_empty:
                return
            cursor = Cursor(cursor.epoch + 1, passes=cursor.epoch + 1.0)

    def _pass(self, cursor: Cursor) -> Iterator[Block]:
        order = shard_order(len(self.shards), self.seed, cursor.epoch)
        behind = [sum(self.weights[shard] for shard in order[:place]) for place in range(len(order))]
        problems: list[Problem] = []
        rows: list[Row] = []
        size = 0
        for place in range(cursor.shard, len(order)):
            shard = order[place]
            for read in self.shards[shard].read(cursor.mark if place == cursor.shard else None, problems):
                rows.append(read.row)
                size += read.num_bytes
                if len(rows) >= self.buffer_rows or size >= BLOCK_BYTES:
                    self._refuse(problems)
                    ends = cursor.epoch + behind[place] + self.weights[shard] * read.share
                    yield Block(cursor, tuple(rows), ends)
                    cursor = Cursor(cursor.epoch, place, read.mark, cursor.block + 1, ends)
                    rows, size = [], 0
        self._refuse(problems)
        if rows:
            yield Block(cursor, tuple(rows), cursor.epoch + 1.0)

    def _refuse(self, problems: Sequence[Problem]) -> None:
        if problems:
            raise DataError(f"{self.key} has {count_of(len(problems), 'broken line')}:", problems)


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileShard:
    """A data file, read line by line, or raw text piece by piece. Its mark: offset (decompressed) and line."""

    file: DataFile

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def weight(self) -> float:
        return float(self.file.size_bytes)

    def fingerprint(self) -> str:
        return self.file.fingerprint()

    def read(self, mark: Any, problems: list[Problem]) -> Iterator[Read]:
        offset, line = mark if mark is not None else (0, 0)
        with self.file.open() as (stream, reader):
            if reader is None:
                stream.seek(offset)
            else:
                _skip(stream, offset)
            rows = self._pieces if self.file.is_text else self._lines
            for row, num_bytes, lines in rows(stream, line, problems):
                offset, line = offset + num_bytes, line + lines
                stored = offset if reader is None else reader.stored_bytes_at(offset)
                if row is not None:
                    yield Read(row, num_bytes, [offset, line], stored / max(1, self.file.size_bytes))

    def _lines(self, stream: BinaryIO, line: int, problems: list[Problem]) -> Iterator[tuple[Row | None, int, int]]:
        while raw := stream.readline(MAX_LINE_BYTES):
            line += 1
            row = None
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raise DataError("a line is too long:", [self._problem(line, f"over {MAX_LINE_BYTES:,} bytes")])
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError:
                problems.append(self._problem(line, "not valid UTF-8"))
            else:
                row = parse_line(self.name, line, text.rstrip("\r\n"), problems) if text.strip() else None
            yield row, len(raw), 1
            if len(problems) >= MAX_SHOWN:
                return

    def _pieces(self, stream: BinaryIO, line: int, problems: list[Problem]) -> Iterator[tuple[Row | None, int, int]]:
        piece = _piece(stream)
        is_first = line == 0
        while piece:
            following = _piece(stream)
            try:
                text = piece.decode("utf-8-sig" if is_first else "utf-8")
            except UnicodeDecodeError as error:
                line += piece.count(b"\n", 0, error.start) + 1
                problems.append(self._problem(line, "not valid UTF-8"))
                return
            row = Row(self.name, line + 1, {"text": text}, is_continued=bool(following)) if text.strip() else None
            yield row, len(piece), piece.count(b"\n")
            line += piece.count(b"\n")
            piece, is_first = following, False

    def _problem(self, line: int, message: str) -> Problem:
        return Problem(f"{self.name}, line {line}", message)


def _skip(stream: BinaryIO, offset: int) -> None:
    while offset > 0 and (passed := len(stream.read(min(offset, 1 << 20)))):
        offset -= passed


def _piece(stream: BinaryIO) -> bytes:
    """About PIECE_BYTES, to the end of a line; of a line without end, to the end of a character."""
    lines: list[bytes] = []
    size = 0
    while size < PIECE_BYTES and (part := stream.readline(PIECE_BYTES)):
        while not part.endswith(b"\n") and _is_cut(part) and (more := stream.read(1)):
            part += more
        lines.append(part)
        size += len(part)
    return b"".join(lines)


def _is_cut(part: bytes) -> bool:
    """Whether it ends within a character of UTF-8."""
    for back in range(1, min(4, len(part)) + 1):
        byte = part[-back]
        if byte < 0x80:
            return False
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return False


def open_stream(
    paths: Sequence[str], wanted: Format | Literal["auto"], key: str, buffer_rows: int, seed: int
) -> tuple[Stream, Rows]:
    """The stream of these paths (files, directories, URLs, hub data sets), and the rows of its first block. Raises
    DataError."""
    from loradock_train.hub_rows import hub_shards, is_hub

    shards: list[Shard] = []
    for path in paths:
        shards.extend(hub_shards(path, key) if is_hub(path) else [FileShard(file) for file in data_files([path], key)])
    stream, rows = Stream(key, tuple(shards), buffer_rows, seed, wanted).first()
    return stream, replace(rows, notices=(*passed_over(paths, key), *rows.notices))
