"""The registry's URL: SQLite in a file, or PostgreSQL. Passwords in it are never shown.

`postgresql://user:password@host:5432/database`, with libpq's own settings behind a question mark; what is left out
libpq takes from where it always does (PGPASSWORD, ~/.pgpass). Opens nothing.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from loradock_adapters.errors import RegistryError

POSTGRESQL = frozenset({"postgresql", "postgres", "postgresql+psycopg"})
DRIVER = "postgresql+psycopg"
CONNECT_TIMEOUT_S = 5
SILENT_TIMEOUT_S = 10
"""A connection on which the other end acknowledges nothing for so long is given up."""


def parse_url(text: str) -> sa.URL:
    """The URL with the driver that is used. Raises RegistryError, whose message has nothing of the text's secrets."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # both may quote the text, and with it a password
        raise RegistryError(
            "the registry's URL cannot be read: write postgresql://user:password@host:5432/database, and other "
            "characters than letters, digits and -._~ of user or password percent-encoded (@ is %40)"
        ) from None
    if url.drivername in POSTGRESQL:
        if isinstance(password := url.query.get("password"), str):  # libpq takes it there too; here it would be shown
            url = url.difference_update_query(["password"]).set(password=password)
        return url.set(drivername=DRIVER)
    if url.drivername != "sqlite":
        raise RegistryError(f"the registry's URL begins with {url.drivername}://: it takes postgresql:// or sqlite:///")
    if url.database in (None, "", ":memory:"):
        raise RegistryError("the registry needs a file: an in-memory database is another one for every thread")
    return url


def shown(url: sa.URL) -> str:
    """The URL for logs and errors: without its password, and without settings, which may hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)


def connect_arguments(url: sa.URL) -> dict[str, Any]:
    """What libpq is told besides the URL, where that says nothing of it: no connection waits for ever."""
    if url.drivername == "sqlite":
        return {}
    ours = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": SILENT_TIMEOUT_S * 1000,
        "keepalives_idle": SILENT_TIMEOUT_S,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }
    return {key: value for key, value in ours.items() if key not in url.query}
