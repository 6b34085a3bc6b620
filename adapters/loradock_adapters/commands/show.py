"""`loradock show NAME`: one model with its versions and the reasons for its placement."""

from typing import Any

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Name, Server


def show(name: Name, server: Server = DEFAULT_SERVER, api_key: ApiKey = None, json: Json = False) -> None:
    """Show a model: its versions, and why it is placed where it is."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        model = client.show(name)
    if json:
        console.out_json(model)
    else:
        _print(model)


def _print(model: dict[str, Any]) -> None:
    from loradock_adapters import console
    from loradock_adapters.problems import Problem

    for key in ("name", "current_version", "digest", "kind", "placement", "rank", "state"):
        if model.get(key) is not None:
            console.out(f"{key + ':':<17}{model[key]}")
    reasons = model.get("reasons")
    for line in console.problem_lines(Problem.from_json(r) for r in (reasons if isinstance(reasons, list) else [])):
        console.out(line)
    versions = [version for version in model.get("versions") or [] if isinstance(version, dict)]
    if not versions:
        return
    rows = []
    for version in versions:
        number = version.get("version", version.get("number"))
        mark = "*" if version.get("current", number == model.get("current_version")) else ""
        size_bytes = version.get("size_bytes")
        size = console.size(size_bytes) if isinstance(size_bytes, int) else ""
        created = console.when(version.get("created_at"))
        rows.append([f"{number}{mark}", version.get("placement", ""), size, created, version.get("digest", "")])
    console.out_table(["VERSION", "PLACEMENT", "SIZE", "CREATED", "DIGEST"], rows)
