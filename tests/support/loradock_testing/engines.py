"""Engines whose process is the fake one, for tests below the gateway."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loradock_serve import launcher
from loradock_serve.engine import Engine, EnginePlan
from loradock_serve.engine_client import JSON_BODY, EngineClient
from loradock_serve.engine_command import EngineCommand

SUPPORT = Path(__file__).parent.parent


def fake_command(
    socket: Path, *, model: str = "m", name: str = "base", extra: Mapping[str, str] | None = None
) -> EngineCommand:
    """Runs the fake engine. A `model` with "fail-to-start" in it does not start."""
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)} | dict(extra or {})
    flags = ("--model", model, "--served-model-name", name, "--uds", str(socket))
    return EngineCommand((sys.executable, "-m", "loradock_testing.fake_engine", *flags), environment, socket)


def fake_engine(directory: Path, make_command: Callable[[Path], EngineCommand] = fake_command, **plan: Any) -> Engine:
    """An engine that is not started yet; `plan` goes over the fields of its plan."""
    fields: dict[str, Any] = {
        "label": "the base's engine",
        "make_command": make_command,
        "socket_dir": directory,
        "log_path": directory / "logs" / "engine.log",
        "start_timeout_s": 30.0,
        "needs_corrected_lora": True,
        "restarts": False,
    }
    return Engine(EnginePlan(**fields | plan))


def group_members(group: int) -> list[int]:
    """Processes of a group that still run."""
    return [pid for pid in launcher._processes() if launcher._group_of(pid) == group]


async def post(client: EngineClient, prompt: str, **fields: Any) -> Any:
    """A completion asked of an engine directly; the JSON of its answer."""
    body = json.dumps({"model": "base", "prompt": prompt} | fields).encode()
    async with client.post("/v1/completions", body, JSON_BODY) as answer:
        return json.loads(await answer.read())
