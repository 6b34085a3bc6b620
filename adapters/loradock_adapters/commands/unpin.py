"""`loradock unpin NAME`: an adapter may leave its slot again when another needs it."""

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Name, Server


def unpin(name: Name, server: Server = DEFAULT_SERVER, api_key: ApiKey = None) -> None:
    """Let a pinned model's adapter leave its slot again when another needs it."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.unpin(name)
    console.note(f"unpinned {name}" if answer.get("was_pinned") else f"{name} was not pinned")
