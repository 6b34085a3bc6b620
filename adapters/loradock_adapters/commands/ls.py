"""`loradock ls`: lists the published models."""

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
            console.size(model["size_bytes"]) if isinstance(model.get("size_bytes"), int) else "",
            console.when(model.get("created_at")),
        ]
        for model in models
    ]
    console.out_table(["NAME", "VERSION", "KIND", "PLACEMENT", "STATE", "SIZE", "CREATED"], rows)
