"""The root of every error that Loradock raises on purpose, and below it the tree of this package.

    LoradockError                    exit code 1, HTTP 500
    ├── UsageError                   exit code 2: the command line or a config file is wrong
    │   ├── InvalidNameError         a model name, or a reference to a version, is not one
    │   └── InvalidSourceError       an address to fetch a checkpoint from is not one
    ├── NotFoundError                a name, version or path that is not there
    ├── InUseError                   a version that something still points at
    ├── RefusedError                 an upload that is not acceptable; carries every Problem found
    │   ├── ManifestError            the list of files is wrong, or names a file that is not allowed
    │   └── CheckpointError          the files are not a checkpoint that can be read
    │       └── HeaderError          a safetensors header that lies
    ├── BaseModelError               the base's own config or weights cannot be read
    ├── DigestMismatchError          bytes that are not the ones their sha256 announced
    ├── MissingBlobsError            a manifest that names bytes the store does not hold
    ├── UploadError                  an upload that cannot go on as it was asked
    │   ├── WrongOffsetError         it does not begin where the last one ended; carries where that is
    │   ├── UploadBusyError          another one writes the same content now; carries when to try again
    │   └── UploadQuotaError         its publisher has uploaded too much that nobody published
    ├── NoRoomError                  the disk cannot hold what is announced
    ├── StoreUnavailableError        the store that holds the bytes does not answer; carries Retry-After
    ├── CorruptBlobError             bytes in that store are not what their name says
    ├── RegistryUnavailableError     the registry's database does not answer; carries Retry-After
    ├── RegistryError                the registry cannot be opened or brought up to date
    ├── ServerError                  the server answered with an error (client side)
    │   └── UnreachableError         the server did not answer at all
    └── (each other package draws its own tree below these at the top of its module)

An error's message says what is wrong, with both numbers where there are two, and what to do next. The command line
prints it without a traceback; the HTTP edge maps the *type* to a status code. Nothing recognises an error by its text.
"""

from collections.abc import Iterable, Sequence

from loradock_adapters.problems import Problem


class LoradockError(Exception):
    """Anything that Loradock can explain. `code` is stable and machine-readable, the message is for people."""

    code: str = "loradock_error"
    exit_code: int = 1
    param: str | None = None
    """The part of a request that it is about, where it is always the same."""


class UsageError(LoradockError):
    """The command line, or a file that the user wrote, is wrong."""

    code = "usage"
    exit_code = 2


class InvalidNameError(UsageError):
    """A model name, or a reference to a version of one, that is not well-formed."""

    code = "invalid_name"
    param = "name"


class InvalidSourceError(UsageError):
    """An address to fetch a checkpoint from that is not well-formed."""

    code = "invalid_source"


class NotFoundError(LoradockError):
    """Something that was named does not exist."""

    code = "not_found"


class InUseError(LoradockError):
    """A version that cannot be removed alone: its name, a tag or a split points at it."""

    code = "version_in_use"


class RefusedError(LoradockError):
    """An upload that is not acceptable. `problems` holds all of them, not only the first."""

    code = "refused"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class ManifestError(RefusedError):
    """A list of files that is malformed, or that names a file which has no place in a checkpoint."""

    code = "invalid_manifest"


class CheckpointError(RefusedError):
    """Files that are not a checkpoint."""

    code = "invalid_checkpoint"


class HeaderError(CheckpointError):
    """A safetensors file whose header is not what the format allows."""

    code = "invalid_safetensors"


class BaseModelError(LoradockError):
    """The base model's own config or weights cannot be read, so nothing can be compared with them."""

    code = "invalid_base"


class DigestMismatchError(LoradockError):
    """Bytes whose sha256 or size is not the announced one."""

    code = "digest_mismatch"
    param = "sha256"


class MissingBlobsError(LoradockError):
    """A manifest that names bytes which the store does not hold."""

    code = "missing_blobs"
    param = "files"

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing: tuple[str, ...] = tuple(missing)
        super().__init__(
            f"{len(self.missing)} of the manifest's files were not uploaded, the first is {self.missing[0]}"
        )


class UploadError(LoradockError):
    """An upload that cannot go on as it was asked."""

    code = "upload"


class WrongOffsetError(UploadError):
    """A piece that does not begin where the last one ended."""

    code = "wrong_offset"

    def __init__(self, sha256: str, offset: int, held_bytes: int) -> None:
        super().__init__(f"the piece begins at byte {offset}, and {held_bytes} bytes of {sha256} are here: go on there")
        self.held_bytes = held_bytes


class UploadBusyError(UploadError):
    """Another upload writes the same content now."""

    code = "upload_busy"
    retry_after_s = 1

    def __init__(self, sha256: str) -> None:
        super().__init__(f"another upload of {sha256} is under way: ask in a moment whether it is there")


class UploadQuotaError(UploadError):
    """Too much is uploaded and not published."""

    code = "upload_quota"


class NoRoomError(LoradockError):
    """The disk cannot hold what is announced."""

    code = "storage_full"


class StoreUnavailableError(LoradockError):
    """The store that holds the uploads' bytes does not answer, or refuses."""

    code = "store_unavailable"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CorruptBlobError(LoradockError):
    """Bytes that were published are not in the store as they were."""

    code = "corrupt_blob"


class RegistryUnavailableError(LoradockError):
    """The registry's database does not answer at the moment."""

    code = "registry_unavailable"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RegistryError(LoradockError):
    """The registry's database cannot be opened, or is newer than this program."""

    code = "registry"


class ServerError(LoradockError):
    """The server's answer to a client's request was an error. `status` is 0 where there was no answer."""

    code = "server_error"

    def __init__(self, message: str, *, status: int, code: str | None = None, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.problems: tuple[Problem, ...] = tuple(problems)
        if code is not None:
            self.code = code


class UnreachableError(ServerError):
    """No server answered."""

    code = "unreachable"

    def __init__(self, message: str) -> None:
        super().__init__(message, status=0)
