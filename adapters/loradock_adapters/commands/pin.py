"""`loradock pin NAME`: an adapter keeps its slot, whichever version its name points at."""

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Name, Server


def pin(name: Name, server: Server = DEFAULT_SERVER, api_key: ApiKey = None, json: Json = False) -> None:
    """Keep a model's adapter in a slot of the engine, whatever else is asked for."""
    from loradock_adapters import console
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        answer = client.pin(name)
    if json:
        console.out_json(answer)
        return
    console.out(f"{name}@{answer.get('current_version')}  pinned  {answer.get('digest', '')}".rstrip())
    residency = answer.get("residency")
    waiting = residency.get("pin") if isinstance(residency, dict) else None
    if isinstance(waiting, dict) and waiting.get("state") == "waiting":
        console.note(f"not in its slot yet: {waiting.get('waits_for') or 'the engine is at it'}", "yellow")
