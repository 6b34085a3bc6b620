"""`loradock tag NAME[@VERSION] TAG`: a word for a version, which then answers as NAME@TAG."""

from typing import Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Server


def tag(
    model: Annotated[
        str,
        typer.Argument(
            help="A version, or a name for its current version.", metavar="NAME[@VERSION]", show_default=False
        ),
    ],
    tag: Annotated[str, typer.Argument(help="The word, as `prod`.", metavar="TAG", show_default=False)],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Put a tag on a version, or move it there; NAME@TAG answers with that version."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.tag(model, tag)
    if json:
        console.out_json(answer)
        return
    name, version, before = answer.get("name"), answer.get("version"), answer.get("previous_version")
    console.out(f"{name}@{tag}  version {version}  {answer.get('digest', '')}".rstrip())
    if before is not None and before != version:
        console.note(f"{name}@{tag} was version {before} before")
