"""`loradock rm NAME`: removes a name and all its versions."""

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Name, Server


def rm(name: Name, server: Server = DEFAULT_SERVER, api_key: ApiKey = None) -> None:
    """Remove a model with all its versions."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        client.rm(name)
    console.note(f"removed {name}")
