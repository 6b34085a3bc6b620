"""`loradock ls`: lists the published models."""

from typing import Any

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Server


def ls(server: Server = DEFAULT_SERVER, api_key: ApiKey = None, json: Json = False) -> None:
    """List the published models."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        models = client.models()
    if json:
        console.out_json(models)
        return
    rows = [
        [
            model.get("name", ""),
            model.get("current_version", ""),
            model.get("kind", ""),
            model.get("placement", ""),
            model.get("state", ""),
            _where(model),
            console.size(model["size_bytes"]) if isinstance(model.get("size_bytes"), int) else "",
            console.when(model.get("created_at")),
        ]
        for model in models
    ]
    console.out_table(["NAME", "VERSION", "KIND", "PLACEMENT", "STATE", "WHERE", "SIZE", "CREATED"], rows)


def _where(model: dict[str, Any]) -> str:
    """Where a hot-swapped model's adapter is; an asterisk where it is pinned."""
    place = model.get("residency")
    return f"{place}{'*' if model.get('pinned') else ''}" if isinstance(place, str) else ""
