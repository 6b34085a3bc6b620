"""A gateway in this process, on a free port, with fake engines behind it. Everything real but the model."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from loradock_adapters.manifest import manifest_of
from loradock_serve import engine_command
from loradock_serve.app import Gateway, build_gateway
from loradock_serve.config import ServeConfig
from loradock_serve.engine_command import Machine
from loradock_serve.server import uvicorn_config
from loradock_testing.tiny_checkpoints import write_base

MACHINE = Machine("cpu", 8 * 1024**3, (0, 1))


@dataclass(frozen=True)
class Served:
    """A running gateway and a client for it."""

    gateway: Gateway
    client: httpx.AsyncClient
    url: str
    data_dir: Path

    def version_dir(self, digest: str) -> Path:
        """Where the store has the files of a version."""
        return self.data_dir / "versions" / digest.removeprefix("sha256:")

    async def push(self, directory: Path, name: str) -> httpx.Response:
        """What `loradock push` does, in this event loop."""
        manifest = manifest_of(directory)
        for entry in manifest.files:
            content = (directory / entry.path).read_bytes()
            url = f"/v1/adapters/blobs/{entry.sha256}"
            answer = await self.client.put(url, content=content)
            while answer.status_code == 423:  # another push sends these bytes at this moment
                answer = await self.client.put(url, content=content)
            answer.raise_for_status()
        return await self.client.post(f"/v1/adapters/{name}/versions", json=manifest.to_json())

    async def complete(self, model: str, prompt: str, **fields: Any) -> httpx.Response:
        """A completion; the fake engine answers each word as `name:word`."""
        return await self.client.post("/v1/completions", json={"model": model, "prompt": prompt, **fields})

    async def text(self, model: str, prompt: str) -> str:
        """The text of a completion."""
        answer = await self.complete(model, prompt)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    async def seen(self, timeout_s: float = 60.0) -> Any:
        """What the base's fake engine was asked."""
        start = await self.gateway.fleet.base.ensure_ready(timeout_s)
        _, text = await start.client._get("/fake/seen", timeout_s)
        return json.loads(text)

    async def until_ready(self) -> None:
        """Returns when the base's engine is up."""
        await self.gateway.fleet.base.ensure_ready(30)


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    admin_key: str | None = None,
    **config: Any,
) -> AsyncIterator[Served]:
    """Run a gateway on fake engines; `config` is what the YAML would say."""
    monkeypatch.setattr(engine_command, "ENGINE_MODULE", "loradock_testing.fake_engine")
    support = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]))
    config.setdefault("base", str(write_base(tmp_path / "tiny-base")))
    config.setdefault("data_dir", str(tmp_path / "data"))
    gateway = build_gateway(ServeConfig.model_validate(config), admin_key, MACHINE)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(gateway.app))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            yield Served(gateway, client, url, Path(config["data_dir"]))
    finally:
        server.should_exit = True
        await running
