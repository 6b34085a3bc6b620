"""`loradock promote NAME VERSION`: points a name at one of its versions, and ends its split."""

from typing import Annotated, Any

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Name, Server


def promote(
    name: Name,
    version: Annotated[str, typer.Argument(help="Number, tag or digest of the version.", metavar="VERSION")],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Point a name at one of its versions; a split of its traffic ends."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.promote(name, int(version) if version.isascii() and version.isdigit() else version)
    if json:
        console.out_json(answer)
    else:
        show_move(answer)


def show_move(answer: dict[str, Any]) -> None:
    """Where a name points now, and what ended with the move."""
    from loradock_adapters import console

    name, version, before = answer.get("name"), answer.get("current_version"), answer.get("previous_version")
    console.out(f"{name}@{version}  {answer.get('digest', '')}".rstrip())
    if before == version:
        console.note(f"{name} pointed at version {version} already")
    elif before is not None:
        console.note(f"{name} pointed at version {before} before")
    if isinstance(split := answer.get("ended_split"), dict):
        console.note(f"its split has ended: {console.split(split)}", "yellow")
