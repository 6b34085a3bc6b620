"""`loradock rollback NAME VERSION`: points a name at one of its versions."""

from typing import Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Name, Server


def rollback(
    name: Name,
    version: Annotated[int, typer.Argument(help="Number of the version.", metavar="VERSION", min=1)],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Point a name at one of its versions."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.rollback(name, version)
    console.out(f"{name}@{version}  {answer.get('digest', '')}".rstrip())
