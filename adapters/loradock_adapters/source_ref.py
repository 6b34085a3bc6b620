"""Addresses of checkpoints that the server fetches itself: `hf://org/repo@revision`, `s3://bucket/prefix`.

Pure text. Does not know what is behind an address, nor how to get at it; the server does. What an operator allows is a
list of prefixes, compared part by part: `hf://acme` allows `hf://acme/bot` and not `hf://acme-evil/bot`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loradock_adapters.errors import InvalidSourceError

MAX_SOURCE_CHARS = 512
HUB = "hf"
STORES = ("s3", "gs", "az", "abfs")
"""Object stores that fsspec reads, each with the package that its scheme needs. Nothing whose address leads to a host
or a path of the publisher's choice."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,15})://")
_HUB_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._=+-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}|refs/(pr/[0-9]{1,9}|convert/[a-z]{1,32})")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class SourceRef:
    """Where a checkpoint is to be fetched from."""

    scheme: str
    parts: tuple[str, ...]
    """Of a Hub address the organisation and the repository; of another one the bucket or host, and the folders."""
    revision: str | None = None
    """Of the Hub only: a branch, a tag or a commit; None is its main branch."""

    def __str__(self) -> str:
        return self.address if self.revision is None else f"{self.address}@{self.revision}"

    @property
    def address(self) -> str:
        """Without the revision."""
        return f"{self.scheme}://{'/'.join(self.parts)}"

    @property
    def repo(self) -> str:
        """The Hub's name of the repository."""
        return "/".join(self.parts)

    @property
    def is_fixed(self) -> bool:
        """Whether it names one commit, whose files can never be others."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> str:
        """The same place at a commit, or with the fingerprint of what lies there: what is remembered of a version."""
        return f"{self.address}@{revision}"


def is_source(text: str) -> bool:
    """Whether a text is meant as an address, right or wrong; no name and no path on a disk looks like one."""
    return _SCHEME.match(text) is not None


def parse_source(text: str) -> SourceRef:
    """An address. Raises InvalidSourceError that says what is wrong with it."""
    start = _SCHEME.match(text)
    if start is None or len(text) > MAX_SOURCE_CHARS:
        raise InvalidSourceError(f"{_shown(text)} is no source: write hf://org/repo@revision or s3://bucket/prefix")
    scheme, rest = start[1], text[start.end() :]
    if scheme == HUB:
        return _hub(text, rest)
    if scheme not in STORES:
        raise InvalidSourceError(f"{_shown(text)}: no source begins with {scheme}://; {', '.join((HUB, *STORES))} do")
    return SourceRef(scheme, _parts(text, rest.removesuffix("/")))


def is_allowed(ref: SourceRef, prefixes: Iterable[str]) -> bool:
    """Whether an address is one of `prefixes`, or lies below one. A prefix without anything after `://` allows all."""
    return any(_is_below(ref, prefix) for prefix in prefixes)


def check_prefix(prefix: str) -> str:
    """The prefix itself, if it is one; InvalidSourceError."""
    start = _SCHEME.fullmatch(prefix)
    if start is not None and start[1] in (HUB, *STORES):
        return prefix
    if prefix.startswith(f"{HUB}://"):
        for part in prefix.removeprefix(f"{HUB}://").removesuffix("/").split("/"):
            _check(prefix, part, _HUB_PART)
        return prefix
    parse_source(prefix)
    return prefix


def _is_below(ref: SourceRef, prefix: str) -> bool:
    scheme, _, rest = prefix.partition("://")
    wanted = tuple(part for part in rest.split("/") if part)
    return scheme == ref.scheme and ref.parts[: len(wanted)] == wanted


def _hub(text: str, rest: str) -> SourceRef:
    address, at, revision = rest.partition("@")
    if at and not _REVISION.fullmatch(revision):
        raise InvalidSourceError(f"{_shown(text)}: {_shown(revision)} is no revision: a branch, a tag or a commit is")
    parts = tuple(address.split("/"))
    if len(parts) != 2:
        raise InvalidSourceError(f"{_shown(text)} is not hf://org/repo, with @revision behind it or not")
    for part in parts:
        _check(text, part, _HUB_PART)
    return SourceRef(HUB, parts, revision if at else None)


def _parts(text: str, rest: str) -> tuple[str, ...]:
    parts = tuple(rest.split("/"))
    for part in parts:
        _check(text, part, _PART)
    return parts


def _check(text: str, part: str, form: re.Pattern[str]) -> None:
    if not form.fullmatch(part) or part.endswith(".git") or ".." in part:
        raise InvalidSourceError(
            f"{_shown(text)}: {_shown(part)} is no part of an address; letters, digits, '.', '_' and '-' are"
        )


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 120 else text[:120] + "...")
