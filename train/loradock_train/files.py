"""Data files: which files a path stands for, and their bytes, wherever they lie and however they are compressed.

A path is local, or a URL that fsspec reads (s3://, gs://, https://, memory://, …). Endings decide: .jsonl and .txt,
each as it is or with .gz or .zst behind it. What a line means is rows.py's business. A compressed file that ends too
early is an error here: zstandard's own reader takes it for the end of the data.
"""

import hashlib
import io
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from loradock_adapters.errors import LoradockError
from loradock_train.errors import DataError, Problem
from loradock_train.signed import has_signature, hidden, open_data
from loradock_train.urls import missing_told, redacted

KINDS = (".jsonl", ".txt")
COMPRESSIONS = ("", ".gz", ".zst")
ENDINGS = tuple(kind + compression for kind in KINDS for compression in COMPRESSIONS)
LIKE_DATA = (".json", ".jsonl", ".ndjson", ".text", ".parquet", ".arrow", ".csv", ".tsv", ".zip", ".bz2", ".xz")
"""Endings of files that somebody may have meant to be read; in any case, unlike ours."""
EXPECTED = "a .jsonl or .txt file (as it is, or .gz or .zst), or a directory of them"
CHUNK_BYTES = 1 << 16
PORTION_BYTES = 512
"""Decompressed at once: what is a thousand times smaller must not fill the memory."""
HASHED_WHOLE_BYTES = 8 << 20
"""Files up to this size are hashed whole; of longer ones the size and this much of both ends."""


def is_url(path: str) -> bool:
    """Whether fsspec reads it, and not the local file system."""
    return "://" in path


@dataclass(frozen=True)
class DataFile:
    """One file of data."""

    name: str
    """Path or URL."""
    size_bytes: int
    """As it lies, compressed."""

    @property
    def is_text(self) -> bool:
        """Raw text, not JSON Lines."""
        return self.name.endswith(tuple(ending for ending in ENDINGS if ending.startswith(".txt")))

    @contextmanager
    def open_raw(self) -> Iterator[BinaryIO]:
        """Its bytes as they lie."""
        if is_url(self.name):
            with _told(self.name):
                filesystem, path = open_data(self.name)
                file = filesystem.open(path, "rb")
            with file:
                # fsspec's own readline takes no limit
                yield cast(BinaryIO, io.BufferedReader(_RemoteFile(file, self.name), CHUNK_BYTES))
        else:
            with Path(self.name).open("rb") as file:
                yield file

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, "Decompressor | None"]]:
        """Its bytes, decompressed, at any offset that `seek` is given; and what decompresses them."""
        with self.open_raw() as raw:
            if not self.name.endswith((".gz", ".zst")):
                yield raw, None
                return
            reader = Decompressor(raw, self.name)
            yield cast(BinaryIO, io.BufferedReader(reader, CHUNK_BYTES)), reader

    def read(self) -> tuple[bytes, str]:
        """All of it, decompressed, and the sha256 of what lies on the disk."""
        with self.open_raw() as raw:
            stored = raw.read()
        digest = hashlib.sha256(stored).hexdigest()
        if self.name.endswith((".gz", ".zst")):
            return io.BufferedReader(Decompressor(io.BytesIO(stored), self.name)).read(), digest
        return stored, digest

    def fingerprint(self) -> str:
        """sha256 of a small file; of a large one, of its size and both its ends."""
        with self.open_raw() as raw:
            if self.size_bytes <= HASHED_WHOLE_BYTES:
                return hashlib.sha256(raw.read()).hexdigest()
            head = raw.read(HASHED_WHOLE_BYTES)
            raw.seek(self.size_bytes - HASHED_WHOLE_BYTES)
            return hashlib.sha256(str(self.size_bytes).encode() + head + raw.read()).hexdigest()


class _RemoteFile(io.RawIOBase):
    """A file of fsspec, whose errors name it."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _told(self._name):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readall(self) -> bytes:
        with _told(self._name):
            return bytes(self._file.read())

    def readinto(self, target: Any) -> int:
        with _told(self._name):
            found = self._file.read(len(target))
        target[: len(found)] = found
        return len(found)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Errors of a driver as ours, without a login in them; drivers raise what their libraries do."""
    try:
        yield
    except LoradockError:
        raise
    except Exception as error:  # noqa: BLE001 (as said above)
        raise DataError("the data cannot be read:", [Problem(url, _reason(url, error))]) from None


def _reason(url: str, error: Exception) -> str:
    fresh = ", or its signature is no longer good: give a fresh one" if has_signature(url) else ""
    if isinstance(error, FileNotFoundError):
        return f"no such file{fresh}"
    if isinstance(error, ImportError | ValueError) and is_url(url):
        return missing_told(url, error)
    text = redacted(hidden(str(error).strip()))
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__) + fresh


class Decompressor(io.RawIOBase):
    """Decompresses .gz and .zst of one or many parts, forwards only. Raises DataError where the file is broken."""

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self._name = raw, name
        self._part: Any = None
        self._input, self._pending, self._read_bytes, self._made_bytes = b"", b"", 0, 0
        self._marks: deque[tuple[int, int]] = deque([(0, 0)])
        """For each chunk read: bytes that those before it made, and bytes read with it."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readinto(self, target: Any) -> int:
        while not self._pending:
            if not self._input:
                self._input = self._raw.read(CHUNK_BYTES)
                self._read_bytes += len(self._input)
                self._marks.append((self._made_bytes, self._read_bytes))
            if not self._input:
                if self._part is not None:
                    raise self._broken("ends in the middle")
                return 0
            portion, self._input = self._input[:PORTION_BYTES], self._input[PORTION_BYTES:]
            self._pending = self._decompress(portion)
            self._made_bytes += len(self._pending)
        count = min(len(target), len(self._pending))
        target[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def stored_bytes_at(self, offset: int) -> int:
        """How much of the file makes the data up to `offset`: a function of the file alone, not of how it was read.
        Offsets are asked for in rising order."""
        while len(self._marks) > 1 and self._marks[1][0] < offset:
            self._marks.popleft()
        return self._marks[0][1]

    def _decompress(self, chunk: bytes) -> bytes:
        made: list[bytes] = []
        while chunk:
            if self._part is None:
                if self._name.endswith(".gz") and not (chunk := chunk.lstrip(b"\0")):
                    break  # tar and tapes pad with zeros
                self._part = _new_part(self._name)
            try:
                made.append(self._part.decompress(chunk))
            except Exception as error:  # zlib.error, or zstandard's own, which is imported only where it is needed
                raise self._broken(str(error)) from error
            if not self._part.eof:
                break
            chunk, self._part = self._part.unused_data, None
        return b"".join(made)

    def _broken(self, why: str) -> DataError:
        return DataError("a compressed file is broken:", [Problem(self._name, f"byte {self._read_bytes}: {why}")])


def _new_part(name: str) -> Any:
    if name.endswith(".gz"):
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


# ---- which files ----------------------------------------------------------------------------------------------------


def data_files(paths: Sequence[str], key: str) -> list[DataFile]:
    """The files that the paths stand for; a directory stands for its data files, sorted, at any depth. Raises DataError
    naming `key`."""
    files: list[DataFile] = []
    for name in paths:
        try:
            found = _remote(name) if is_url(name) else _local(Path(name))
        except Exception as error:
            if not is_url(name) and not isinstance(error, OSError | ValueError):
                raise  # drivers raise what their libraries do; nobody else here does
            raise DataError(f"{key} cannot be read:", [Problem(name, _reason(name, error))]) from None
        if found is None:
            raise DataError(f"{key} cannot be read:", [Problem(name, f"expected {EXPECTED}")])
        if not found:
            raise DataError(f"{key} has no data:", [Problem(name, "no .jsonl or .txt file in this directory")])
        files.extend(found)
    return files


def passed_over(paths: Sequence[str], key: str) -> tuple[str, ...]:
    """For each local directory, what in it looks like data and is not read."""
    told = []
    for name in paths:
        inside = Path(name).rglob("*") if not is_url(name) and Path(name).is_dir() else ()
        others = sorted(
            file.name for file in inside if file.name.lower().endswith(LIKE_DATA) and not file.name.endswith(ENDINGS)
        )
        if others:
            named = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
            told.append(f"{key}: not read in {name}, being no .jsonl or .txt: {len(others)} ({named})")
    return tuple(told)


def _local(path: Path) -> list[DataFile] | None:
    """None for a file of another kind."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
        return [DataFile(str(file), file.stat().st_size) for file in inside]
    return [DataFile(str(path), path.stat().st_size)] if path.name.endswith(ENDINGS) else None


def _remote(url: str) -> list[DataFile] | None:
    filesystem, path = open_data(url)
    if has_signature(url):  # of one file; asked whether it is a directory, fsspec would fetch all of it
        return [DataFile(url, int(filesystem.size(path)))] if url.endswith(ENDINGS) else None
    if filesystem.isdir(path):
        inside = sorted(name for name in filesystem.find(path) if name.endswith(ENDINGS))
        return [DataFile(filesystem.unstrip_protocol(name), int(filesystem.size(name))) for name in inside]
    return [DataFile(url, int(filesystem.size(path)))] if path.endswith(ENDINGS) else None
