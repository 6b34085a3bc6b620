"""`loradock show NAME`: one model with its versions, the reasons for its placement, and where it is now."""

from typing import Any

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Name, Server


def show(name: Name, server: Server = DEFAULT_SERVER, api_key: ApiKey = None, json: Json = False) -> None:
    """Show a model: its versions, why it is placed where it is, and where its adapter is now."""
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
    for line in (*_proof(model.get("proof")), *_residency(model.get("residency"))):
        console.out(line)
    repairs = model.get("repairs")
    for repair in map(Problem.from_json, repairs if isinstance(repairs, list) else []):
        console.out(f"{'repaired:':<17}[{repair.code}] {repair}")
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
        facts = [f"{number}{mark}", _share(version), _tags(version), version.get("placement", ""), _proven(version)]
        rows.append([*facts, size, created, version.get("source") or "", version.get("digest", "")])
    header = ["VERSION", "TRAFFIC", "TAGS", "PLACEMENT", "PROOF", "SIZE", "CREATED", "SOURCE", "DIGEST"]
    shown = [i for i, title in enumerate(header) if title == "VERSION" or any(row[i] for row in rows)]
    console.out_table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _share(version: dict[str, Any]) -> str:
    """Its share of the traffic that follows the name."""
    share = version.get("share")
    return f"{100 * share:.4g}%" if isinstance(share, int | float) and share > 0 else ""


def _tags(version: dict[str, Any]) -> str:
    tags = version.get("tags")
    return " ".join(str(tag) for tag in tags) if isinstance(tags, list) else ""


def _proven(version: dict[str, Any]) -> str:
    """What an engine has shown about it; nothing of versions from before engines were asked."""
    return str(version.get("proven", "")) if version.get("proof") is not None else ""


def _proof(proof: object) -> list[str]:
    """What an engine has shown about a model; nothing from a server that does not say."""
    if not isinstance(proof, dict) or not isinstance(proof.get("state"), str):
        return []
    said = proof["state"] + (", published by force" if proof.get("forced") else "")
    facts = []
    if isinstance(agreement := proof.get("agreement"), dict) and isinstance(proof.get("tolerance"), int | float):
        facts.append(f"{agreement.get('difference'):.4f} from the trainer's answers, {proof['tolerance']:.4f} allowed")
    if isinstance(proof.get("change"), int | float):
        facts.append(f"{proof['change']:.4f} from the base's")
    lines = [f"{'proof:':<17}{said}" + (f" ({'; '.join(facts)})" if facts else "")]
    if isinstance(reason := proof.get("reason"), dict):
        lines.append(f"{'':<17}{reason.get('message', '')}")
        lines += [f"{'':<17}{reason['fix']}"] if reason.get("fix") else []
    return lines


_PLACES = {
    "slot": "in a slot of the engine",
    "cpu": "in the engine's host memory",
    "disk": "on the server's disk",
    "remote": "not on this server's disk",
}


def _residency(residency: object) -> list[str]:
    """Where an adapter is and how it got there; nothing from a server that does not say."""
    from loradock_adapters import console

    if not isinstance(residency, dict):
        return []
    place, pin = residency.get("place"), residency.get("pin")
    where = _PLACES.get(str(place), str(place))
    if isinstance(pin, dict):
        waits_for = pin.get("waits_for") or "it is on its way"
        where += "; pinned" if pin.get("state") == "held" else f"; pinned, but waits: {waits_for}"
    facts = {
        "residency": where,
        "last used": console.when(residency.get("last_used_at")) or "not since the server started",
        "requests": f"{residency.get('hits')} found it loaded, {residency.get('misses')} waited for its load",
        "loads": _loads(residency),
        "slots": f"written {residency.get('activations')} times, evicted {residency.get('slot_evictions')} times",
    }
    return [f"{key + ':':<17}{value}" for key, value in facts.items()]


def _loads(residency: dict[str, Any]) -> str:
    last_s, evictions = residency.get("last_load_seconds"), residency.get("cpu_evictions")
    last = f", the last in {last_s:.3f} s" if isinstance(last_s, int | float) else ""
    return f"{residency.get('loads')}{last}; evicted from host memory {evictions} times"
