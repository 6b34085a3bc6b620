"""Every error that the gateway raises on purpose. Status codes are not here: `http_errors.py` maps the types once.

LoradockError
├── UsageError                    exit code 2
│   └── ServeConfigError          a config file or flag of `loradock serve` is wrong
├── HubUnreachableError           the base lies on the Hub, which does not answer now; exit code 1: later it may
└── GatewayError
    ├── BadRequestError           the request itself is wrong
    │   └── WrongTaskError        a classifier is asked for text, or a model of text for classes
    ├── UnauthorizedError         no key, or a wrong one
    ├── ForbiddenError            the key, or the way in, does not allow this
    ├── ModelNotFoundError        no such model; carries near names
    ├── ConflictError             the request contradicts what is stored, or how this server is set up
    │   ├── UnfitError            a version that was published for another base
    │   ├── ProofFailedError      a version that does not answer as its checkpoint says it must
    │   └── PinLimitError         all slots but one are pinned already
    ├── LengthRequiredError       an upload that does not say how long it is
    ├── TooLargeError             a body is over its limit
    ├── TooManyUploadsError       one publisher sends too many files at once; carries Retry-After
    ├── UploadStalledError        an upload of which hardly anything comes
    ├── StorageFullError          there is no room on the disk for what was sent
    ├── DeadlineError             the request took longer than the server, or its client, lets it
    ├── QueueFullError            too many requests wait already; carries Retry-After
    ├── SourceError               something about the place that a checkpoint is to be fetched from
    │   ├── SourceNotAllowedError     the operator allows no such source
    │   ├── SourceNotFoundError       nothing is there, or nothing that this token may see
    │   ├── SourceDeniedError         it is there, and may not be read
    │   ├── SourceTooLargeError       more bytes than this server fetches
    │   ├── SourceBusyError           too many are fetched or asked for already; carries Retry-After
    │   ├── SourcePendingError        it is being fetched; carries Retry-After
    │   └── SourceUnavailableError    it does not answer, or breaks off; carries Retry-After
    └── EngineError
        ├── EngineUnavailableError    not up within the deadline; carries Retry-After
        ├── EngineStartError          an engine that will not start; carries the tail of its log
        ├── EngineRouteError          the model's engine has no such route
        └── EngineRefusedError        the engine refuses what it was asked to load
"""

from collections.abc import Sequence

from loradock_adapters.errors import LoradockError, UsageError
from loradock_adapters.problems import Problem


class ServeConfigError(UsageError):
    """The configuration is wrong; the message lists every problem, a line each."""

    code = "invalid_config"


class HubUnreachableError(LoradockError):
    """Nothing is wrong with the configuration: whoever starts the server again may find the Hub there."""

    code = "hub_unreachable"


class GatewayError(LoradockError):
    """Something that an HTTP client is told about."""

    code = "gateway_error"
    param: str | None = None


class BadRequestError(GatewayError):
    """The request cannot be understood or asks for something that is not allowed."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or type(self).code


class WrongTaskError(BadRequestError):
    """The model does another task than the one that this path asks for."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="wrong_task")


class UnauthorizedError(GatewayError):
    """No API key, or one that is not known."""

    code = "invalid_api_key"


class ForbiddenError(GatewayError):
    """The caller is known, or needs no key, but may not do this."""

    code = "forbidden"


class ModelNotFoundError(GatewayError):
    """No model of that name; `near` are the closest names that exist."""

    code = "model_not_found"
    param = "model"

    def __init__(self, name: str, near: Sequence[str] = ()) -> None:
        hint = f" Near names: {', '.join(near)}." if near else " `GET /v1/models` lists what is served."
        shown = repr(name if len(name) <= 200 else name[:200] + "…")  # it may be any text of any length
        super().__init__(f"The model {shown} does not exist.{hint}")
        self.near = tuple(near)


class ConflictError(GatewayError):
    """What is asked contradicts what is stored."""

    code = "conflict"


class UnfitError(ConflictError):
    """The version was published for another base than the one that is served."""

    code = "unfit"

    def __init__(self, what: str, reason: Problem) -> None:
        super().__init__(f"{what} does not fit this server: {reason}; {reason.fix}")
        self.problems = (reason,)


class ProofFailedError(ConflictError):
    """The engine's answers show that this is not what was trained, so it answers no requests."""

    code = "proof_failed"

    def __init__(self, what: str, reason: Problem) -> None:
        super().__init__(f"{what} is not served, because its proof failed: {reason}; {reason.fix}")
        self.problems = (reason,)


class PinLimitError(ConflictError):
    """All slots but one are pinned already, and that one must stay free for everything else."""

    code = "pin_limit"

    def __init__(self, slots: int, pinned: Sequence[str]) -> None:
        names = f" ({', '.join(pinned[:5])}{', …' if len(pinned) > 5 else ''})" if pinned else ""
        super().__init__(
            f"{len(pinned)} of this server's {slots} slots are pinned{names}, and {slots - 1} may be: one must stay "
            "free for all others. Unpin one (`loradock unpin NAME`), or raise `engine.max_loras`"
        )


class LengthRequiredError(GatewayError):
    """An upload without a Content-Length header."""

    code = "length_required"
    param = "content-length"


class TooManyUploadsError(GatewayError):
    """One publisher sends more files at the same moment than it may."""

    code = "too_many_uploads"
    retry_after_s = 1


class UploadStalledError(GatewayError):
    """Hardly anything of an upload comes; what came is kept."""

    code = "upload_stalled"


class StorageFullError(GatewayError):
    """The disk, or this user's share of it, is full."""

    code = "storage_full"


class TooLargeError(GatewayError):
    """A body, or a file that a header announces, is over the limit."""

    code = "too_large"
    param = "body"


class DeadlineError(GatewayError):
    """The request took longer than `request_timeout_s`, or than its own `x-request-timeout`."""

    code = "deadline_exceeded"


class QueueFullError(GatewayError):
    """Too many requests wait for the engine already, of everybody or of this tenant."""

    def __init__(self, message: str, *, code: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class SourceError(GatewayError):
    """Something about the place that a checkpoint is to be fetched from."""

    code = "source_error"


class SourceNotAllowedError(SourceError):
    """The operator allows no such source."""

    code = "source_not_allowed"


class SourceNotFoundError(SourceError):
    """Nothing is there; or it is private, and looks as if nothing were there."""

    code = "source_not_found"


class SourceDeniedError(SourceError):
    """It is there, and the token, or the server's own credentials, may not read it."""

    code = "source_denied"


class SourceTooLargeError(SourceError):
    """It has more bytes than this server fetches."""

    code = "source_too_large"


class _LaterSourceError(SourceError):
    """Worth another try after a while."""

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SourceBusyError(_LaterSourceError):
    """Too many sources are fetched already, or too many unknown ones were asked for."""

    code = "source_busy"


class SourcePendingError(_LaterSourceError):
    """It is being fetched, and will be there."""

    code = "source_pending"


class SourceUnavailableError(_LaterSourceError):
    """It does not answer, answers with nonsense, or breaks off."""

    code = "source_unavailable"


class EngineError(GatewayError):
    """Something about the engine behind the gateway."""

    code = "engine_error"

    def __init__(self, message: str, *, summary: str = "") -> None:
        super().__init__(message)
        self.summary = summary
        """One line without paths and log lines, for who has no key; empty where there is none."""


class EngineUnavailableError(EngineError):
    """The engine is not up, and did not come up before the deadline."""

    code = "engine_unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 5, summary: str = "") -> None:
        super().__init__(message, summary=summary)
        self.retry_after_s = retry_after_s


class EngineStartError(EngineUnavailableError):
    """The engine process ended, or said nothing in time, before it was ready."""

    code = "engine_start_failed"


class EngineRouteError(EngineError):
    """The engine of this model has no such route."""

    code = "unsupported_route"


class EngineRefusedError(EngineError):
    """The engine will not load the adapter; the message is the engine's own."""

    code = "engine_refused_adapter"
