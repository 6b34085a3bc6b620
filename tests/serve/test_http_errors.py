"""Every error type has its status, and every answer OpenAI's shape."""

import errno
import json
import sqlite3

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from loradock_adapters import errors as adapters
from loradock_adapters.errors import LoradockError
from loradock_adapters.problems import Problem
from loradock_serve import errors as serve
from loradock_serve.http_errors import STATUS, add_handlers, error_object, error_response, explained, status_of

PROBLEM = Problem("rank", "rank 128 is over 64", "adapter_config.json", "train with a smaller r")
EXAMPLES: list[tuple[LoradockError, int, str, str]] = [
    (serve.BadRequestError("x"), 400, "invalid_request_error", "invalid_request"),
    (serve.UnauthorizedError("x"), 401, "authentication_error", "invalid_api_key"),
    (serve.ForbiddenError("x"), 403, "permission_error", "forbidden"),
    (serve.ModelNotFoundError("x"), 404, "not_found_error", "model_not_found"),
    (serve.ConflictError("x"), 409, "conflict_error", "conflict"),
    (serve.UploadStalledError("x"), 408, "timeout_error", "upload_stalled"),
    (serve.TooManyUploadsError("x"), 429, "rate_limit_error", "too_many_uploads"),
    (serve.LengthRequiredError("x"), 411, "invalid_request_error", "length_required"),
    (serve.TooLargeError("x"), 413, "invalid_request_error", "too_large"),
    (serve.QueueFullError("x", code="queue_full", retry_after_s=3), 429, "rate_limit_error", "queue_full"),
    (serve.DeadlineError("x"), 504, "timeout_error", "deadline_exceeded"),
    (serve.StorageFullError("x"), 507, "storage_error", "storage_full"),
    (serve.SourceNotAllowedError("x"), 403, "permission_error", "source_not_allowed"),
    (serve.SourceNotFoundError("x"), 404, "not_found_error", "source_not_found"),
    (serve.SourceDeniedError("x"), 403, "permission_error", "source_denied"),
    (serve.SourceTooLargeError("x"), 413, "invalid_request_error", "source_too_large"),
    (serve.SourceBusyError("x"), 429, "rate_limit_error", "source_busy"),
    (serve.SourcePendingError("x"), 503, "service_unavailable_error", "source_pending"),
    (serve.SourceUnavailableError("x"), 503, "service_unavailable_error", "source_unavailable"),
    (serve.EngineError("x"), 502, "server_error", "engine_error"),
    (serve.EngineUnavailableError("x"), 503, "service_unavailable_error", "engine_unavailable"),
    (serve.EngineStartError("x"), 503, "service_unavailable_error", "engine_start_failed"),
    (serve.EngineRouteError("x"), 404, "not_found_error", "unsupported_route"),
    (serve.EngineRefusedError("x"), 422, "invalid_request_error", "engine_refused_adapter"),
    (serve.GatewayError("x"), 500, "server_error", "gateway_error"),
    (adapters.InvalidNameError("x"), 400, "invalid_request_error", "invalid_name"),
    (adapters.InvalidSourceError("x"), 400, "invalid_request_error", "invalid_source"),
    (adapters.ManifestError([PROBLEM]), 400, "invalid_request_error", "invalid_manifest"),
    (adapters.DigestMismatchError("x"), 400, "invalid_request_error", "digest_mismatch"),
    (adapters.NotFoundError("x"), 404, "not_found_error", "not_found"),
    (adapters.MissingBlobsError(["aa"]), 409, "conflict_error", "missing_blobs"),
    (adapters.UploadQuotaError("x"), 413, "invalid_request_error", "upload_quota"),
    (adapters.WrongOffsetError("ab", 1, 2), 416, "invalid_request_error", "wrong_offset"),
    (adapters.UploadBusyError("ab"), 423, "conflict_error", "upload_busy"),
    (adapters.NoRoomError("x"), 507, "storage_error", "storage_full"),
    (adapters.RefusedError([PROBLEM]), 422, "invalid_request_error", "refused"),
    (adapters.HeaderError([PROBLEM]), 422, "invalid_request_error", "invalid_safetensors"),
    (adapters.InUseError("x"), 409, "conflict_error", "version_in_use"),
    (adapters.UsageError("x"), 400, "invalid_request_error", "usage"),
    (adapters.StoreUnavailableError("x", retry_after_s=5), 503, "service_unavailable_error", "store_unavailable"),
    (adapters.RegistryUnavailableError("x", retry_after_s=5), 503, "service_unavailable_error", "registry_unavailable"),
    (adapters.CorruptBlobError("x"), 502, "server_error", "corrupt_blob"),
    (adapters.RegistryError("x"), 500, "server_error", "registry"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), EXAMPLES, ids=lambda value: getattr(value, "code", None))
def test_error_type_has_its_status_and_code(error: LoradockError, status: int, kind: str, code: str) -> None:
    body = error_object(error)
    assert (status_of(error), body["type"], body["code"]) == (status, kind, code)
    assert body["message"] == str(error)
    assert body["source"] == "gateway"


def test_every_mapped_type_is_tried_above() -> None:
    assert set(STATUS) <= {type(error) for error, *_ in EXAMPLES}


def test_details_go_with_their_errors() -> None:
    assert error_object(adapters.RefusedError([PROBLEM]))["problems"] == [PROBLEM.to_json()]
    assert error_object(adapters.MissingBlobsError(["aa", "bb"]))["missing"] == ["aa", "bb"]
    assert error_object(serve.BadRequestError("x", param="p", code="c")) == {
        "message": "x",
        "type": "invalid_request_error",
        "param": "p",
        "code": "c",
        "source": "gateway",
    }


def test_headers_say_whether_to_come_again() -> None:
    assert error_response(serve.EngineUnavailableError("x", retry_after_s=7)).headers["retry-after"] == "7"
    full = serve.QueueFullError("x", code="tenant_queue_full", retry_after_s=30)
    assert error_response(full).headers["retry-after"] == "30"
    assert error_response(adapters.UploadBusyError("ab")).headers["retry-after"] == "1"
    assert error_response(adapters.WrongOffsetError("ab", 1, 2)).headers["upload-offset"] == "2"
    assert error_response(serve.UploadStalledError("x")).headers["connection"] == "close"
    assert error_response(serve.ConflictError("x")).headers["x-should-retry"] == "false"
    assert error_response(adapters.MissingBlobsError(["a"])).headers["x-should-retry"] == "false"
    assert "retry-after" not in error_response(serve.BadRequestError("x")).headers


def test_missing_model_is_named_with_near_names_and_not_endlessly() -> None:
    assert str(serve.ModelNotFoundError("mime", ["mine"])) == "The model 'mime' does not exist. Near names: mine."
    assert str(serve.ModelNotFoundError("x")).endswith("does not exist. `GET /v1/models` lists what is served.")
    assert len(str(serve.ModelNotFoundError("x" * 10**6))) < 300


def sqlite_full() -> sa.exc.OperationalError:
    cause = sqlite3.OperationalError("database or disk is full")
    cause.sqlite_errorcode = sqlite3.SQLITE_FULL
    return sa.exc.OperationalError("INSERT", {}, cause)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), sqlite_full()])
def test_full_disk_is_recognised_by_its_number(error: Exception) -> None:
    explanation = explained(error)
    assert isinstance(explanation, serve.StorageFullError)
    assert "disk is full: nothing that was there is lost" in str(explanation)


@pytest.mark.parametrize(
    "error", [sa.exc.OperationalError("SELECT", {}, Exception("gone")), sa.exc.TimeoutError("no connection is free")]
)
def test_database_that_is_away_is_told_with_a_time_to_come_again(error: Exception) -> None:
    explanation = explained(error)
    assert isinstance(explanation, adapters.RegistryUnavailableError)
    assert error_response(explanation).headers["retry-after"] == "5"


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "x"), OSError("no space"), ValueError("x")])
def test_other_failures_are_not_explained_away(error: Exception) -> None:
    assert explained(error) is None


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()
    add_handlers(app)
    failures = {"full": OSError(errno.ENOSPC, "x"), "bug": KeyError("secret"), "gone": ClientDisconnect()}
    failures |= {"denied": OSError(errno.EACCES, "secret"), "ours": serve.TooLargeError("too big")}

    @app.get("/fail/{how}")
    async def fail(how: str) -> None:
        raise failures[how]

    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/fail/full", 507, "storage_full"),
        ("/fail/bug", 500, "gateway_error"),
        ("/fail/denied", 500, "gateway_error"),
        ("/fail/ours", 413, "too_large"),
        ("/nowhere", 404, "unknown_route"),
    ],
)
async def test_whatever_a_route_raises_leaves_in_openais_shape(
    client: httpx.AsyncClient, path: str, status: int, code: str
) -> None:
    async with client:
        answer = await client.get(path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert "secret" not in answer.text


async def test_wrong_method_is_told_the_right_ones(client: httpx.AsyncClient) -> None:
    async with client:
        answer = await client.post("/fail/x")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert answer.json()["error"]["message"] == "POST /fail/x: Method Not Allowed"


async def test_client_that_hung_up_is_no_server_error(client: httpx.AsyncClient) -> None:
    async with client:
        assert (await client.get("/fail/gone")).status_code == 499


def test_body_is_one_json_document() -> None:
    assert json.loads(bytes(error_response(serve.BadRequestError("ü")).body))["error"]["message"] == "ü"
