"""`loradock plan [CONFIG.yaml]`: what a server would choose for itself, why, and what it costs in memory."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from loradock_adapters.commands.options import ApiKey, Json


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file of `loradock serve`; flags go over it.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: a Hub id, a checkpoint directory, or a run of `loradock train`.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="The server's data directory (default ~/.local/share/loradock).")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask a running server; without any file, $LORADOCK_SERVER.", metavar="URL")
    ] = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Say how many adapter slots, of which rank, and how many cached adapters a server needs, and what they cost."""
    from loradock_adapters import console
    from loradock_adapters.errors import UsageError

    of_files = config is not None or base is not None or data_dir is not None
    if server is not None and of_files:
        raise UsageError("--server asks a running server: leave the file, --base and --data-dir out")
    if not of_files and server is None:
        server = os.environ.get("LORADOCK_SERVER")
    document = _asked(server, api_key) if server is not None else _here(config, {"base": base, "data_dir": data_dir})
    if json:
        console.out_json(document)
    elif document["plan"] is None:
        console.out("vLLM puts no adapters on this base: every model gets an engine of its own")
    else:
        _print(document["plan"], document["running"])


def _asked(server: str, api_key: str | None) -> dict[str, Any]:
    from loradock_adapters.client import Client

    with Client(server, api_key) as client:
        return client.plan()


def _here(config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """From the files of this machine; nothing is started, and no directory is made."""
    import logging

    from loradock_adapters.registry import Registry
    from loradock_serve.base import find_base
    from loradock_serve.config import load_config
    from loradock_serve.engine_command import this_machine
    from loradock_serve.machine_check import check_machine
    from loradock_serve.plan import make_plan, plan_json
    from loradock_serve.stores import registry_url

    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = load_config(config, flags)
    base = find_base(settings.base, settings.engine.vllm_arguments.get("revision"))
    url = registry_url(settings)
    is_there = not url.startswith("sqlite") or (settings.data_dir / "registry.sqlite").is_file()
    registry = Registry(url) if is_there else None
    machine = this_machine()
    try:
        advice = make_plan(settings, base, machine, registry)
    finally:
        if registry is not None:
            registry.close()
    check_machine(settings.engine, machine, advice)
    return {"plan": plan_json(advice) if advice is not None else None, "running": None}


def _print(plan: dict[str, Any], running: dict[str, Any] | None) -> None:
    from loradock_adapters import console

    costs = {
        "max_loras": f"{console.size(plan['slot_bytes'])} a slot, {console.size(plan['slots_bytes'])} in all",
        "max_cpu_loras": f"about {console.size(plan['cache_bytes'])} of host memory",
        "max_lora_rank": "",
    }
    rows = [
        [f"engine.{key}", plan[key], *([running[key]] if running is not None else []), cost, plan["reasons"][key]]
        for key, cost in costs.items()
    ]
    console.out_table(["SETTING", "VALUE", *(["NOW"] if running is not None else []), "COST", "WHY"], rows)
    for note in plan["notes"]:
        console.note(f"- {note}")
