"""A repository of the Hugging Face Hub as a source: one request for its commit and files, then plain downloads.

Addresses, headers and the meaning of errors are `huggingface_hub`'s. The bytes are read here and not by its
`hf_hub_download`: limits and time-outs are ours, nothing is left in a cache, and no link is ever made. The token of a
request is in the request's headers to the Hub's own host and nowhere else: not in this module's errors, nor in any
log. What the Hub answers in words is not passed on either: it may repeat what it was sent.
"""

import logging
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# `httpx` is the HTTP library that it uses itself, whichever that is. All four are in its documentation, and its lazy
# imports hide them from type checkers.
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    httpx,
)

from loradock_adapters.source_ref import HUB, SourceRef
from loradock_serve.errors import SourceDeniedError, SourceError, SourceNotFoundError, SourceUnavailableError
from loradock_serve.source_listing import Listing, RemoteFile

TIMEOUT_S = 10.0
"""Without a byte."""
MAIN = "main"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Its lines have whole addresses, and those that the Hub sends readers on to are signed: whoever has one has the file.
for _name in ("httpx", "httpx2"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class HubSource:
    """One repository at one revision. `token` None: as a stranger."""

    def __init__(self, ref: SourceRef, endpoint: str, token: str | None) -> None:
        self._ref = ref
        self._endpoint = endpoint
        # False, not None: nobody gets at what the server's own token may see unless the operator says so.
        self._token: str | bool = token if token is not None else False

    def look(self) -> Listing:
        """See `Source`. One request, and one more for each file whose size the Hub did not say."""
        revision = self._ref.revision or MAIN
        try:
            api = HfApi(endpoint=self._endpoint, token=self._token)
            info = api.model_info(self._ref.repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except (HfHubHTTPError, httpx.HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise self._explained(error) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self._nonsense() from None
        commit, siblings = info.sha, info.siblings
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or siblings is None:
            raise self._nonsense()
        files = tuple(self._file(sibling, commit) for sibling in siblings)
        return Listing(self._ref.at(commit), files, self._as_called(info.id))

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """See `Source`."""
        commit = listing.source.rpartition("@")[2]
        url = hf_hub_url(self._ref.repo, file.path, revision=commit, endpoint=self._endpoint)
        # Nothing packed: the size that was announced is that of the file.
        headers = build_hf_headers(token=self._token) | {"accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        try:
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
                hf_raise_for_status(answer)
                skip = start if answer.status_code != 206 else 0  # it may not know ranges: then all comes once more
                for chunk in answer.iter_raw():
                    if skip < len(chunk):
                        yield chunk[skip:]
                    skip = max(0, skip - len(chunk))
        except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
            raise self._explained(error) from None

    def still_is(self, listing: Listing) -> bool:
        """See `Source`: a commit never changes."""
        return True

    def _as_called(self, told: object) -> SourceRef:
        """The reference under the repository's own name: one that was renamed answers under the old name too."""
        if not isinstance(told, str) or told == self._ref.repo:
            return self._ref
        parts = tuple(told.split("/"))
        return SourceRef(HUB, parts, self._ref.revision) if len(parts) == 2 else self._ref

    def _file(self, sibling: Any, commit: str) -> RemoteFile:
        path, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
        if not isinstance(path, str):
            raise self._nonsense()
        sha256 = getattr(lfs, "sha256", None)
        if lfs is not None and isinstance(getattr(lfs, "size", None), int):
            size = lfs.size  # what lies in git itself is a note of a hundred bytes that says where the file is
        if size is None:
            size, sha256 = self._asked(path, commit)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise self._nonsense()
        sha256 = sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None
        git_sha1 = sibling.blob_id if sha256 is None and lfs is None else None
        git_sha1 = git_sha1 if isinstance(git_sha1, str) and _COMMIT.fullmatch(git_sha1) else None
        return RemoteFile(path, size, sha256, git_sha1)

    def _asked(self, path: str, commit: str) -> tuple[int | None, str | None]:
        """Size and hash of a file by its headers."""
        url = hf_hub_url(self._ref.repo, path, revision=commit, endpoint=self._endpoint)
        try:
            found = get_hf_file_metadata(url, token=self._token, timeout=TIMEOUT_S, endpoint=self._endpoint)
        except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
            raise self._explained(error) from None
        return found.size, found.etag

    def _explained(self, error: Exception) -> SourceError:
        """What an error of the Hub means for who asked. Its text is not repeated."""
        what = f"{self._ref} on {self._endpoint}"
        with_token = self._token is not False
        if isinstance(error, GatedRepoError):
            return SourceDeniedError(f"{what} is gated: send a token (HF_TOKEN) of an account that was granted access")
        if isinstance(error, RevisionNotFoundError):
            return SourceNotFoundError(f"{what}: the repository has no such revision")
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RepositoryNotFoundError | HFValidationError) or status == 404:
            hint = "the token that was sent may not see it" if with_token else "it is private: send a token (HF_TOKEN)"
            return SourceNotFoundError(f"{what} does not exist, or {hint}")
        if status in (401, 403):
            hint = "does not accept the token that was sent" if with_token else "wants a token (HF_TOKEN)"
            return SourceDeniedError(f"{what}: the Hub {hint}")
        if isinstance(error, OfflineModeIsEnabled):
            return SourceUnavailableError(f"{what}: this server runs with HF_HUB_OFFLINE set", retry_after_s=60)
        if status is not None:
            return SourceUnavailableError(f"{what}: the Hub answered with status {status}", retry_after_s=10)
        return SourceUnavailableError(f"{what}: the Hub cannot be reached, or broke off ({type(error).__name__})")

    def _nonsense(self) -> SourceError:
        return SourceUnavailableError(f"{self._ref} on {self._endpoint}: the Hub's answer is none", retry_after_s=60)
