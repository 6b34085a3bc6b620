"""Who gets past the door."""

import pytest
from starlette.types import Message, Receive, Scope, Send

from loradock_serve.auth import Doorkeeper


async def ask(key: str | None, path: str = "/v1/models", **headers: str) -> tuple[int, bytes, dict[bytes, bytes]]:
    """The status, body and headers of the answer; 299 is the application's own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": raw, "client": ("10.0.0.7", 1)}
    await Doorkeeper(app, key)(scope, receive, send)
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


async def test_right_key_comes_in() -> None:
    assert (await ask("s3cret", authorization="Bearer s3cret"))[0] == 299
    assert (await ask("s3cret", authorization="bearer  s3cret "))[0] == 299


async def test_request_without_a_key_is_told_how_to_send_one() -> None:
    status, body, headers = await ask("s3cret")
    assert status == 401
    assert b"send `Authorization: Bearer KEY`" in body
    assert b'"code": "invalid_api_key"' in body
    assert headers[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize("value", ["Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer ü", "Bearer s3cre"])
async def test_wrong_key_is_refused(value: str) -> None:
    status, body, _ = await ask("s3cret", authorization=value)
    assert status == 401
    assert b"The API key is not one of this server's" in body
    assert b"s3cret" not in body


@pytest.mark.parametrize(("trusted", "shown"), [(None, "10.0.0.7"), ("10.0.0.0/8", "9.9.9.9")])
async def test_refusal_names_the_client_that_a_trusted_proxy_names(
    trusted: str | None, shown: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if trusted is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    await ask("s3cret", **{"x-forwarded-for": "9.9.9.9"})
    assert caplog.records[-1].getMessage().endswith(f", from {shown}")


async def test_refusals_leave_one_line_each_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    await ask("s3cret", "/v1/models/a\nb", authorization="Bearer other-secret")
    await ask(None, host="evil.example")
    await ask("s3cret", authorization="Bearer s3cret")
    assert [record.getMessage() for record in caplog.records] == [
        "GET /v1/models/a\\nb 401 invalid_api_key, from 10.0.0.7",
        "GET /v1/models 403 forbidden, from 10.0.0.7",
    ]


@pytest.mark.parametrize("path", ["/livez", "/health"])
async def test_health_is_open(path: str) -> None:
    assert (await ask("s3cret", path))[0] == 299
    assert (await ask(None, path, host="evil.example"))[0] == 299


@pytest.mark.parametrize("path", ["/livez/", "/health/x", "//livez", "/metrics", "/v1/livez"])
async def test_nothing_else_is_open(path: str) -> None:
    assert (await ask("s3cret", path))[0] == 401


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:8080", "[::1]", "app.localhost:80", ""]
)
async def test_without_a_key_loopback_names_are_served(host: str) -> None:
    assert (await ask(None, host=host))[0] == 299


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "192.168.0.1", "[::2]:1", "[::1", "localhost.evil.example", "127.1"]
)
async def test_without_a_key_other_names_are_refused(host: str) -> None:
    status, body, _ = await ask(None, host=host)
    assert status == 403
    assert b"Without an admin key only this machine is served" in body


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://evil.example:8080", "null", "http://localhost.evil"]
)
async def test_without_a_key_a_page_of_elsewhere_is_refused(origin: str) -> None:
    assert (await ask(None, host="127.0.0.1:8080", origin=origin))[0] == 403


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:8080", "http://[::1]:1"])
async def test_without_a_key_a_page_of_this_machine_is_served(origin: str) -> None:
    assert (await ask(None, host="127.0.0.1:8080", origin=origin))[0] == 299


async def test_with_a_key_host_and_origin_do_not_matter() -> None:
    answer = await ask("k", authorization="Bearer k", host="api.example", origin="http://page.example")
    assert answer[0] == 299


async def test_lifespan_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    await Doorkeeper(app, "k")({"type": "lifespan"}, nothing, send)
    assert seen == ["lifespan"]
