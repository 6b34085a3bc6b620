"""`loradock split NAME 3=90 4=10`: shares of a name's traffic for several versions; `--off` ends that."""

from typing import Annotated, Any

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Name, Server
from loradock_adapters.errors import UsageError


def split(
    name: Name,
    shares: Annotated[
        list[str] | None,
        typer.Argument(help="Version and weight, as `3=90 4=10`.", metavar="VERSION=WEIGHT...", show_default=False),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="End the split: all traffic to the current version.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Send shares of the traffic that follows a name to several of its versions; each user keeps one."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    weights = _weights(shares or [])
    if off == bool(weights):
        raise UsageError(f"say how to split (`loradock split {name} 3=90 4=10`), or --off")
    with Client(server, api_key) as client:
        answer = client.end_split(name) if off else client.split(name, weights)
    if json:
        console.out_json(answer)
    else:
        _print(answer)


def _weights(shares: list[str]) -> dict[int, int]:
    found: dict[int, int] = {}
    for share in shares:
        number, separator, weight = share.partition("=")
        if not separator or not _is_number(number) or not _is_number(weight):
            raise UsageError(f"{share!a} is not VERSION=WEIGHT in whole numbers, as 3=90")
        if int(number) in found:
            raise UsageError(f"version {number} stands twice in the split")
        found[int(number)] = int(weight)
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _print(answer: dict[str, Any]) -> None:
    from loradock_adapters import console

    name, now, before = answer.get("name"), answer.get("split"), answer.get("previous_split")
    if isinstance(now, dict):
        console.out(f"{name}  {console.split(now)}")
    elif isinstance(before, dict):
        console.out(f"{name}  all traffic to version {answer.get('current_version')}")
    else:
        console.note(f"{name} was not split")
    if isinstance(before, dict):
        console.note(f"it was {console.split(before)} before")
