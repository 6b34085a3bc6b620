"""`loradock untag NAME TAG`: NAME@TAG answers no more; the version stays."""

from typing import Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Name, Server


def untag(
    name: Name,
    tag: Annotated[str, typer.Argument(help="The word, as `prod`.", metavar="TAG", show_default=False)],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Take a tag off a model; its version stays."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.untag(name, tag)
    console.note(f"{name}@{tag} is no more" if answer.get("deleted") else f"{name} has no tag {tag}")
