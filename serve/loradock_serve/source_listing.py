"""What lies at a source, and what of it is fetched: decided from names and sizes alone, before a byte is downloaded.

Pure, but for the `Source` protocol behind which the Hub (`hub_source.py`) and object stores (`object_source.py`) are.
Knows nothing of where the files go (`source_fetch.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from loradock_adapters.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from loradock_adapters.errors import ManifestError
from loradock_adapters.filetypes import is_safe_path, pickle_refused, role_of, safetensors_twin
from loradock_adapters.manifest import MAX_FILES
from loradock_adapters.problems import Problem
from loradock_adapters.source_ref import SourceRef
from loradock_serve.errors import SourceTooLargeError

DOUBLE_WEIGHTS = "consolidated"
"""How Mistral's repositories name the second copy of all weights."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at a source, as its listing tells."""

    path: str
    """Relative to the address, with forward slashes; a stranger's word."""
    size_bytes: int
    sha256: str | None = None
    """Where the listing has it."""
    git_sha1: str | None = None
    """Of a file that lies in git itself: the id of its blob."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies at a source now."""

    source: str
    """The address at the commit, or with the fingerprint, that the files are of."""
    files: tuple[RemoteFile, ...]
    called: SourceRef
    """The address as the source itself has it: another one where a repository was renamed."""


class Source(Protocol):
    """One address, opened with what its reader may show there. Its calls block: use it in a thread."""

    def look(self) -> Listing:
        """What lies there now. Raises SourceError."""
        ...

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes of one of its files from `start` on. Raises SourceError."""
        ...

    def still_is(self, listing: Listing) -> bool:
        """Whether what was read while the listing stood can be trusted to be what it lists."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one fetch may bring."""

    file_bytes: int
    total_bytes: int


def choose(files: Iterable[RemoteFile], limits: Limits) -> list[RemoteFile]:
    """The files that make the checkpoint, by path.

    The same choice as for a local directory (`manifest.scan`). Raises ManifestError for a checkpoint that is only there
    as a pickle, SourceTooLargeError for one over the limits.
    """
    files = tuple(files)
    names = {file.path for file in files}
    problems = list(_problems(names))
    if problems:
        raise ManifestError(problems)
    chosen = sorted((file for file in files if _is_wanted(file.path, names)), key=lambda file: file.path)
    if ADAPTER_CONFIG not in names and MODEL_CONFIG not in names:
        raise ManifestError([_no_checkpoint()])
    if len(chosen) > MAX_FILES:
        raise ManifestError([Problem("manifest_files", f"{len(chosen)} files; between 1 and {MAX_FILES} go", "files")])
    _check_sizes(chosen, limits)
    return chosen


def _is_wanted(path: str, names: set[str]) -> bool:
    if role_of(path) != "kept":
        return False
    if path.endswith(".safetensors"):
        # An adapter's repository may hold merged weights beside it, which would be fetched for nothing.
        if ADAPTER_CONFIG in names:
            return path == ADAPTER_WEIGHTS
        return not path.startswith(DOUBLE_WEIGHTS)
    return True


def _problems(names: set[str]) -> Iterator[Problem]:
    for path in sorted(names):
        role = role_of(path)
        if "/" not in path and role == "pickle" and _is_weights(path) and safetensors_twin(path) not in names:
            yield pickle_refused(path)
        elif role == "kept" and not is_safe_path(path):
            shown = ascii(path)[1:-1][:120]
            yield Problem("path_invalid", "a path of other characters than letters, digits, '.', '_', '+', '-'", shown)


def _is_weights(path: str) -> bool:
    """Whether a pickle is what would have to be served; a repository may hold others, which are only left there."""
    return path in ("adapter_model.bin", "pytorch_model.bin") or path.startswith("pytorch_model-")


def _no_checkpoint() -> Problem:
    return Problem(
        "not_a_checkpoint",
        f"neither {ADAPTER_CONFIG} (an adapter) nor {MODEL_CONFIG} (a full model) is there",
        fix="name the place where both the config and the weights are: folders below it are not looked into",
    )


def _check_sizes(files: Sequence[RemoteFile], limits: Limits) -> None:
    for file in files:
        if file.size_bytes > limits.file_bytes:
            raise SourceTooLargeError(
                f"{file.path} has {file.size_bytes} bytes, over this server's limit of {limits.file_bytes} for a file "
                "(`max_upload_bytes`); nothing was fetched"
            )
    total_bytes = sum(file.size_bytes for file in files)
    if total_bytes > limits.total_bytes:
        raise SourceTooLargeError(
            f"Its {len(files)} files have {total_bytes} bytes, over this server's limit of {limits.total_bytes} for a "
            "source (`sources.max_bytes`); nothing was fetched"
        )
