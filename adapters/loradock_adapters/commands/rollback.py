"""`loradock rollback NAME [VERSION]`: points a name at an older version, the one before if none is said."""

from typing import Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Name, Server
from loradock_adapters.commands.promote import show_move


def rollback(
    name: Name,
    version: Annotated[
        int | None,
        typer.Argument(help="Number of the version; without it the one before the current.", metavar="VERSION", min=1),
    ] = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Point a name at an older version, the one before if none is said; a split of its traffic ends."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.rollback(name, version)
    if json:
        console.out_json(answer)
    else:
        show_move(answer)
