"""Who may come in: one admin key, or no key and this machine only.

A plain ASGI wrapper around the whole application, so that no route can be forgotten. Tenants and roles come later.
"""

import hmac
import ipaddress
import os
from functools import lru_cache
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from loradock_serve.errors import ForbiddenError, GatewayError, UnauthorizedError
from loradock_serve.header_fields import header_fields
from loradock_serve.http_errors import error_response, log_refusal

OPEN_PATHS = frozenset({"/livez", "/health"})
"""What load balancers and container health checks ask without a key."""

ADMIN, ANONYMOUS = "admin", "anonymous"
"""Who can publish: the holder of the admin key, and anybody on this machine where there is no key."""
_PUBLISHER = "loradock.publisher"


def publisher_of(scope: Scope) -> str:
    """Who sends this request, as `Doorkeeper` found out."""
    return str(scope.get(_PUBLISHER, ANONYMOUS))


def key_of(scope: Scope) -> str:
    """Whose key this request came with; empty on a server without keys, whatever clients send there."""
    publisher = publisher_of(scope)
    return "" if publisher == ANONYMOUS else publisher


class Doorkeeper:
    """Lets a request through to `app`, or answers it 401 or 403."""

    def __init__(self, app: ASGIApp, admin_key: str | None) -> None:
        self._app = app
        self._key = admin_key.encode() if admin_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in OPEN_PATHS else None
        if refusal is not None:
            await behind_proxies(_Refused(refusal))(scope, receive, send)
        else:
            if self._key is not None:
                scope[_PUBLISHER] = ADMIN
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> GatewayError | None:
        if self._key is None:
            return self._refusal_of_strangers(scope)
        scheme, _, token = header_fields(scope).get(b"authorization", b"").partition(b" ")
        if not token:
            return UnauthorizedError("This server needs an API key: send `Authorization: Bearer KEY`")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
            return UnauthorizedError("The API key is not one of this server's")
        return None

    def _refusal_of_strangers(self, scope: Scope) -> GatewayError | None:
        # A web page can make a browser send requests to this machine: under a name of its own that leads here, which
        # shows in Host, or plainly across origins, which shows in Origin.
        fields = header_fields(scope)
        origin = fields.get(b"origin")
        from_here = not origin or _names_this_machine(origin.partition(b"://")[2] or b"null")
        if from_here and _names_this_machine(fields.get(b"host", b"")):
            return None
        return ForbiddenError(
            "Without an admin key only this machine is served, under its loopback names: "
            "set LORADOCK_ADMIN_KEY on the server"
        )


class _Refused:
    """Says so, in the log and to the client."""

    def __init__(self, refusal: GatewayError) -> None:
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        log_refusal(scope, self._refusal)
        await error_response(self._refusal)(scope, receive, send)


def behind_proxies(app: ASGIApp) -> ASGIApp:
    """`app` with the client that a trusted proxy names: those of FORWARDED_ALLOW_IPS, as uvicorn trusts them.

    For what looks at its client; the hot path does not, and is spared it.
    """
    trusted = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1")
    return cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), trusted))


@lru_cache(maxsize=256)
def _names_this_machine(host: bytes) -> bool:
    name = host.decode("latin-1").strip()
    name = name[1 : name.find("]")] if name.startswith("[") else name.rsplit(":", 1)[0]
    if name in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.endswith(".localhost")
