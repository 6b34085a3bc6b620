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
            _version(model),
            _tags(model),
            model.get("kind", ""),
            model.get("placement", ""),
            model.get("state", ""),
            _where(model),
            console.size(model["size_bytes"]) if isinstance(model.get("size_bytes"), int) else "",
            console.when(model.get("created_at")),
        ]
        for model in models
    ]
    console.out_table(["NAME", "VERSION", "TAGS", "KIND", "PLACEMENT", "STATE", "WHERE", "SIZE", "CREATED"], rows)


def _version(model: dict[str, Any]) -> object:
    """The current version, or the shares of several."""
    from loradock_adapters import console

    split = model.get("split")
    return console.split(split) if isinstance(split, dict) else model.get("current_version", "")


def _tags(model: dict[str, Any]) -> str:
    tags = model.get("tags")
    return " ".join(f"{tag}={number}" for tag, number in tags.items()) if isinstance(tags, dict) else ""


def _where(model: dict[str, Any]) -> str:
    """Where a hot-swapped model's adapter is; an asterisk where it is pinned."""
    place = model.get("residency")
    return f"{place}{'*' if model.get('pinned') else ''}" if isinstance(place, str) else ""
