"""Where blobs lie that several machines share: an object store, or anything else that fsspec has a URL for.

    URL/blobs/ab/abcd…    one object for each content, named by its sha256; as `blobs/` of a local store

Credentials and endpoints come from the environment, as the file system of the URL takes them (AWS_…, ~/.aws for
`s3://`). Checks nothing that it reads: whoever takes the bytes does (cached_store.py).
"""

import errno
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from loradock_adapters.errors import DigestMismatchError, StoreUnavailableError, UsageError

log = logging.getLogger("loradock.store")

PART_BYTES = 8 * 1024**2
READ_AHEAD = 4
"""Parts of a blob that are asked for at once."""
READERS = 16
UPLOAD_PART_BYTES = 16 * 1024**2
UPLOAD_PARTS_AT_ONCE = 4
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
TRIES = 2
"""Of a request; s3fs tries reading as often again around it."""
RETRY_AFTER_S = 5


class BlobStore(Protocol):
    """Contents by their sha256. Threads may share it; everything may wait for a network.

    Raises StoreUnavailableError where the store does not answer, or refuses.
    """

    def size_bytes(self, sha256: str) -> int | None:
        """How large a content is there; None where it is not."""

    def read(self, sha256: str, size_bytes: int) -> Iterator[bytes]:
        """The bytes that lie there, not more than announced. FileNotFoundError where there is no such content, and
        perhaps DigestMismatchError where there are too few."""

    def write(self, sha256: str, path: Path) -> None:
        """Put a local file there; visible whole, or not at all."""

    def remove(self, sha256: str) -> None:
        """Remove a content, if it is there."""


class FsspecBlobs:
    """A BlobStore at a URL."""

    def __init__(self, url: str) -> None:
        """Raises UsageError where nothing installed speaks the URL's protocol. Connects to nothing."""
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            fs, root = url_to_fs(url, **_settings(url))
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: {error}; for s3:// URLs: pip install 'loradock[s3]'") from error
        self._fs: Any = fs  # fsspec has no types
        self._root = root.rstrip("/")
        self._is_s3 = url.startswith("s3:")
        if self._is_s3:
            fs.retries = TRIES
        self._url = url
        self._readers = ThreadPoolExecutor(READERS, "loradock-blobs")

    def size_bytes(self, sha256: str) -> int | None:
        """See BlobStore."""
        try:
            return int(self._fs.info(self._path(sha256))["size"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._unavailable(error) from error

    def read(self, sha256: str, size_bytes: int) -> Iterator[bytes]:
        """See BlobStore."""
        path = self._path(sha256)
        ahead: deque[Future[bytes]] = deque()
        try:
            for start in range(0, size_bytes, PART_BYTES):
                end = min(start + PART_BYTES, size_bytes)
                ahead.append(self._readers.submit(self._fs.cat_file, path, start=start, end=end))
                if len(ahead) >= READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL:  # S3 has no range beyond the end
                there_bytes = self.size_bytes(sha256)
                if there_bytes is not None and there_bytes < size_bytes:
                    raise DigestMismatchError(f"{there_bytes} bytes lie there, {size_bytes} were published") from error
            raise self._unavailable(error) from error
        finally:
            for part in ahead:
                part.cancel()

    def write(self, sha256: str, path: Path) -> None:
        """See BlobStore."""
        parts = {"chunksize": UPLOAD_PART_BYTES, "max_concurrency": UPLOAD_PARTS_AT_ONCE} if self._is_s3 else {}
        if self._is_s3:  # no more than 10,000 parts
            parts["chunksize"] = max(UPLOAD_PART_BYTES, -(-path.stat().st_size // 9_000))
        target = self._path(sha256)
        try:
            if not self._is_s3:
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), target, **parts)
        except Exception as error:
            raise self._unavailable(error) from error

    def remove(self, sha256: str) -> None:
        """See BlobStore."""
        try:
            self._fs.rm_file(self._path(sha256))
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._unavailable(error) from error

    def _path(self, sha256: str) -> str:
        return f"{self._root}/blobs/{sha256[:2]}/{sha256}"

    def _unavailable(self, error: Exception) -> StoreUnavailableError:
        log.warning("%s: %s: %s", self._url, type(error).__name__, error)
        return StoreUnavailableError(
            "The store of uploads does not answer, or refuses (the server's log says how). What this server has on "
            f"its own disk keeps answering; try again in {RETRY_AFTER_S} s",
            retry_after_s=RETRY_AFTER_S,
        )


def _settings(url: str) -> dict[str, Any]:
    """What the file system is told besides the URL: nothing waits for ever, and nothing is remembered of listings."""
    if not url.startswith("s3:"):
        return {}
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S, "retries": {"max_attempts": 1}}
    return {"config_kwargs": timeouts, "use_listings_cache": False, "skip_instance_cache": True}
