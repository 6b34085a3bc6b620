"""`loradock rm NAME[@VERSION]`: removes a name with all its versions, or one version."""

from typing import Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Server


def rm(
    model: Annotated[
        str, typer.Argument(help="A name, or one version of it.", metavar="NAME[@VERSION]", show_default=False)
    ],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Remove a model with all its versions, or one version that nothing points at."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.rm(model)
    version = answer.get("version")
    console.note(f"removed {answer.get('name', model)}{f'@{version}' if version is not None else ''}")
