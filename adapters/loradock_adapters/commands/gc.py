"""`loradock gc`: frees the server's disk of what no name has any more, and reports what that was."""

from typing import Annotated, Any

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Server


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be freed.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Free the server's disk of versions that were removed, and of what nobody published."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.gc(dry_run=dry_run)
    if json:
        console.out_json(answer)
    else:
        _print(answer)


def _print(answer: dict[str, Any]) -> None:
    from loradock_adapters import console

    freed_bytes = answer.get("freed_bytes")
    size = console.size(freed_bytes) if isinstance(freed_bytes, int) else "?"
    what = f"{answer.get('versions')} versions, {answer.get('contents')} files, {answer.get('copies')} copies"
    console.out(f"{'would free' if answer.get('dry_run') else 'freed'} {size}: {what}")
    kept = answer.get("kept")
    for one in kept if isinstance(kept, list) else []:
        if isinstance(one, dict):
            console.note(f"kept {one.get('digest')}: {one.get('why')}", "yellow")
