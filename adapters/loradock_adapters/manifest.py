"""A version's identity: the sorted list of its files, and the digest of that list.

Two checkpoints with the same digest have the same bytes under the same paths. `from_json` is the border to what
strangers send. Does not know what the files mean (checkpoint.py) nor where they are kept (store.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loradock_adapters import strict_json
from loradock_adapters.errors import ManifestError, NotFoundError
from loradock_adapters.filetypes import (
    foreign_refused,
    is_kept_folder,
    is_safe_path,
    pickle_refused,
    role_of,
    safetensors_twin,
)
from loradock_adapters.problems import Problem

MAX_FILES = 1000
MAX_FILE_BYTES = 1 << 40
MAX_DOCUMENT_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY_KEYS = frozenset({"path", "size_bytes", "sha256"})


@dataclass(frozen=True, slots=True, order=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative, with forward slashes."""
    size_bytes: int
    sha256: str
    """64 lower-case hex digits, without a prefix."""


@dataclass(frozen=True)
class Manifest:
    """The files of one immutable version, sorted by path."""

    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files)))

    @cached_property
    def digest(self) -> str:
        """`sha256:<64 hex>` of the canonical JSON; what the engine knows this version by."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    @property
    def blobs(self) -> dict[str, int]:
        """sha256 -> size in bytes, each content once."""
        return {entry.sha256: entry.size_bytes for entry in self.files}

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        return {"files": [asdict(entry) for entry in self.files]}

    @classmethod
    def from_json(cls, document: object) -> "Manifest":
        """Validates what a client sent: JSON text, or the parsed object. Keys beside `files` are the caller's business.

        Raises ManifestError with every problem found.
        """
        rows = _rows(document)
        problems: list[Problem] = []
        entries = [entry for i, row in enumerate(rows) if (entry := _entry(row, f"files[{i}]", problems)) is not None]
        problems.extend(_clashes(entries))
        if problems:
            raise ManifestError(problems)
        return cls(tuple(entries))


@dataclass(frozen=True)
class Scan:
    """What a directory holds, before anything is hashed."""

    directory: Path
    kept: tuple[str, ...]
    """Relative paths of the files that make the checkpoint, sorted."""
    skipped: tuple[str, ...]
    """Names that are left behind: training state, code, sub-folders; sorted."""
    problems: tuple[Problem, ...] = field(default=())


def scan(directory: Path) -> Scan:
    """Sorts a directory's files into kept, skipped and refused. Reads names only, no content."""
    if not directory.is_dir():
        raise NotFoundError(f"{directory} is not a directory")
    kept: list[str] = []
    skipped: list[str] = []
    problems: list[Problem] = []
    names = {entry.name for entry in directory.iterdir()}
    for path in _candidates(directory, skipped, problems):
        match role_of(path):
            case "kept" if is_safe_path(path):
                kept.append(path)
            case "kept":
                problems.append(_bad_path(path, path))
            case "pickle" if safetensors_twin(path) in names:
                skipped.append(path)
            case "pickle":
                problems.append(pickle_refused(path))
            case _:
                skipped.append(path)
    problems.extend(_case_clashes(kept))
    if not kept and not problems:
        problems.append(Problem("no_files", "the directory holds no file of a checkpoint", str(directory)))
    return Scan(directory, tuple(sorted(kept)), tuple(sorted(skipped)), tuple(problems))


def manifest_of(directory: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Hashes the files of a checkpoint directory. `progress` is told the bytes of each chunk as it is read.

    Raises ManifestError (a pickle, a link, ...), NotFoundError.
    """
    found = scan(directory)
    if found.problems:
        raise ManifestError(found.problems)
    return Manifest(tuple(hash_file(directory, path, progress) for path in found.kept))


def hash_file(directory: Path, path: str, progress: Callable[[int], None] | None = None) -> FileEntry:
    """The entry of one file; the size is what was hashed, so the two always agree."""
    digest = hashlib.sha256()
    size_bytes = 0
    with (directory / path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return FileEntry(path, size_bytes, digest.hexdigest())


def _candidates(directory: Path, skipped: list[str], problems: list[Problem]) -> Iterable[str]:
    """Files at the top, and in the few folders that belong to a checkpoint. Links can point anywhere."""
    for entry in sorted(directory.iterdir()):
        if entry.is_symlink():
            _note_link(entry.name, skipped, problems)
        elif entry.is_file():
            yield entry.name
        elif entry.is_dir() and is_kept_folder(entry.name):
            for inner in sorted(entry.iterdir()):
                relative = f"{entry.name}/{inner.name}"
                if inner.is_symlink():
                    _note_link(relative, skipped, problems)
                elif inner.is_file():
                    yield relative
        else:
            skipped.append(entry.name)


def _rows(document: object) -> list[object]:
    if isinstance(document, str | bytes):
        document = _parsed(document)
    files = document.get("files") if isinstance(document, Mapping) else None
    if not isinstance(files, list):
        raise ManifestError([Problem("manifest_shape", 'a manifest is {"files": [...]}', "files")])
    if not 0 < len(files) <= MAX_FILES:
        raise ManifestError([Problem("manifest_files", f"{len(files)} files; between 1 and {MAX_FILES} go", "files")])
    return files


def _parsed(text: str | bytes) -> object:
    if len(text) > MAX_DOCUMENT_BYTES:
        message = f"a manifest of {len(text)} bytes is over the limit of {MAX_DOCUMENT_BYTES}"
        raise ManifestError([Problem("manifest_too_long", message, "manifest")])
    try:
        document: object = strict_json.loads(text)
    except ValueError as error:
        message = f"the manifest is not valid JSON: {ascii(str(error))[1:-1][:120]}"
        raise ManifestError([Problem("manifest_not_json", message, "manifest")]) from None
    return document


def _entry(row: object, where: str, problems: list[Problem]) -> FileEntry | None:
    """One row, checked in full: several faults of one row are several problems."""
    if not isinstance(row, Mapping) or set(row) != _ENTRY_KEYS:
        problems.append(Problem("manifest_entry", "an entry has exactly path, size_bytes and sha256", where))
        return None
    path, size_bytes, sha256 = row["path"], row["size_bytes"], row["sha256"]
    before = len(problems)
    if not isinstance(path, str) or not is_safe_path(path):
        problems.append(_bad_path(path, where))
    elif (refusal := _role_problem(path)) is not None:
        problems.append(refusal)
    if type(size_bytes) is not int or not 0 <= size_bytes <= MAX_FILE_BYTES:
        message = f"size_bytes {ascii(size_bytes)[:40]} is not a number from 0 to {MAX_FILE_BYTES}"
        problems.append(Problem("size_invalid", message, where))
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        problems.append(Problem("sha256_invalid", "sha256 is 64 lower-case hex digits", where))
    return FileEntry(path, size_bytes, sha256) if len(problems) == before else None


def _role_problem(path: str) -> Problem | None:
    match role_of(path):
        case "kept":
            return None
        case "pickle":
            return pickle_refused(path)
        case "foreign":
            return foreign_refused(path)
        case "skipped":
            return Problem(
                "file_not_allowed",
                "not a file of a checkpoint",
                path,
                "leave it out: only safetensors, JSON, tokenizer files, chat templates and README.md are kept",
            )


def _clashes(entries: list[FileEntry]) -> Iterable[Problem]:
    paths: dict[str, FileEntry] = {}
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.path in paths:
            yield Problem("path_duplicate", "listed twice", entry.path)
        paths[entry.path] = entry
        if sizes.setdefault(entry.sha256, entry.size_bytes) != entry.size_bytes:
            yield Problem("size_contradiction", "the same sha256 with two sizes", entry.path)
    for path in paths:
        if path.partition("/")[0] != path and path.partition("/")[0] in paths:
            yield Problem("path_clash", "a file and a folder of the same name", path)
    yield from _case_clashes(paths)


def _case_clashes(paths: Iterable[str]) -> Iterable[Problem]:
    """Paths that are one file where upper and lower case are not told apart."""
    spelled: dict[str, str] = {}
    for path in sorted(set(paths)):
        other = spelled.setdefault(path.lower(), path)
        if other != path:
            yield Problem("path_clash", f"differs from {other} only in upper and lower case", path)


def _bad_path(path: object, where: str) -> Problem:
    message = f"{ascii(path)[:120]} is not a relative path of letters, digits, '.', '_', '+' and '-'"
    return Problem("path_invalid", message, ascii(where)[1:-1][:120], "rename the file")


def _note_link(path: str, skipped: list[str], problems: list[Problem]) -> None:
    """A link that would not be published anyway (`latest -> checkpoint-500`) is only left behind."""
    if role_of(path) == "skipped":
        skipped.append(path)
        return
    fix = "copy the directory with its links followed: cp -rL"
    message = "a symbolic link, which may point outside the directory"
    problems.append(Problem("link_refused", message, ascii(path)[1:-1], fix))
