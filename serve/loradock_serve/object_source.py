"""A folder of an object store, or of any other place that fsspec lists and reads, as a source.

Read with the credentials of this process. Its fingerprint is made from the names, sizes and tags of its files: the same
one means the same bytes, and it is looked at once more when all was read. Knows nothing of what fsspec's drivers do.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from loradock_adapters.source_ref import SourceRef
from loradock_serve.errors import SourceDeniedError, SourceError, SourceNotFoundError, SourceUnavailableError
from loradock_serve.source_listing import Listing, RemoteFile

CHUNK_BYTES = 4 << 20
MAX_LISTED = 10_000
TIMEOUT_S = 10.0
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # What breaks off is tried again by who reads, from where it was.
    "s3": {"config_kwargs": {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S, "retries": {"max_attempts": 1}}}
}
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "versionId", "LastModified", "last_modified", "mtime", "ino")
"""What drivers tell of a file that changes with its content."""


class ObjectSource:
    """One folder."""

    def __init__(self, ref: SourceRef) -> None:
        self._ref = ref
        self._opened: Any = None

    def look(self) -> Listing:
        """See `Source`."""
        rows = self._rows()
        files = tuple(RemoteFile(path, row["size"]) for path, row in rows.items())
        return Listing(self._ref.at(_fingerprint(rows)), files, self._ref)

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """See `Source`."""
        try:
            system = self._system()
            path = f"{self._root(system)}/{file.path}"
            with system.open(path, "rb", block_size=CHUNK_BYTES, cache_type="readahead") as remote:
                remote.seek(start)
                while chunk := remote.read(CHUNK_BYTES):
                    yield chunk
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 (drivers raise what their libraries do)
            raise self._explained(error) from None

    def still_is(self, listing: Listing) -> bool:
        """See `Source`: a store's folder may have been written to meanwhile."""
        return self._ref.at(_fingerprint(self._rows())) == listing.source

    def _rows(self) -> dict[str, dict[str, Any]]:
        """The files right in the folder, and in those right below it, by path."""
        try:
            system = self._system()
            system.invalidate_cache()
            root = self._root(system)
            found = system.find(root, maxdepth=2, detail=True)
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 (drivers raise what their libraries do)
            raise self._explained(error) from None
        rows = {
            path.removeprefix(root).lstrip("/"): row
            for path, row in found.items()
            if row.get("type") == "file" and not row.get("islink") and isinstance(row.get("size"), int)
        }
        rows.pop("", None)  # a marker of the folder itself
        if not rows:
            raise SourceNotFoundError(f"{self._ref} holds no file, or this server may not see it")
        if len(rows) > MAX_LISTED:
            raise SourceNotFoundError(f"{self._ref} holds {len(rows)} files: name the folder of one checkpoint")
        return rows

    def _system(self) -> Any:
        if self._opened is None:
            try:
                import fsspec  # type: ignore[import-untyped]

                # Its own, and not one that fsspec keeps for all: what that has listed stays listed.
                settings = _SETTINGS.get(self._ref.scheme, {})
                self._opened = fsspec.filesystem(self._ref.scheme, skip_instance_cache=True, **settings)
            except (ImportError, ValueError) as error:
                package = "s3" if self._ref.scheme == "s3" else ""
                fix = f"pip install 'loradock[{package}]'" if package else "its package for fsspec is to be installed"
                raise SourceUnavailableError(
                    f"{self._ref}: this server cannot read {self._ref.scheme}:// ({fix})", retry_after_s=600
                ) from error
        return self._opened

    def _root(self, system: Any) -> str:
        return str(system._strip_protocol(self._ref.address))

    def _explained(self, error: Exception) -> SourceError:
        """By its kind: a driver's words may hold what it was given."""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return SourceNotFoundError(f"{self._ref} is not there, or this server may not see it")
        kind = type(error).__name__
        if isinstance(error, PermissionError) or "Credential" in kind:
            return SourceDeniedError(f"{self._ref}: this server's credentials may not read it ({kind})")
        return SourceUnavailableError(f"{self._ref} cannot be reached, or broke off ({kind})")


def _fingerprint(rows: Mapping[str, Mapping[str, Any]]) -> str:
    facts = {
        path: [row["size"], *(str(row[tag]) for tag in TAGS if row.get(tag) is not None)] for path, row in rows.items()
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return f"etags-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
