"""A request's headers by name: one pass over them for all who ask."""

from collections.abc import Mapping

from starlette.types import Scope

KEY = "loradock.headers"


def header_fields(scope: Scope) -> Mapping[bytes, bytes]:
    """Names in lower case; of several with one name, the first."""
    fields: Mapping[bytes, bytes] | None = scope.get(KEY)
    if fields is None:
        fields = scope[KEY] = dict(reversed(scope["headers"]))
    return fields


def header_text(scope: Scope, name: bytes) -> str:
    """One header's value, "" where it is not there."""
    value = header_fields(scope).get(name)
    return value.decode("latin-1") if value is not None else ""
