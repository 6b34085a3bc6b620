"""`loradock push hf://…` as its users run it, and a gateway that is killed while it fetches."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradock_adapters.client import Client
from loradock_testing.hub_server import Hub, hub_server
from loradock_testing.loradock_server import loradock_server
from loradock_testing.quick_gateway import Auditor, fake_engine, free_port
from loradock_testing.tiny_checkpoints import write_adapter, write_base
from loradock_testing.waiting import until

TOKEN = "hf_Secret0fNobodyElse"
LARGE_BYTES = 2_000_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as running:
        yield running


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[str]:
    with fake_engine(tmp_path) as url:
        yield url


def test_command_fetches_a_private_repository_with_a_token_that_is_stored_nowhere(
    hub: Hub, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("org/bot", write_adapter(tmp_path / "a"), tokens={TOKEN})
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    base, data_dir = write_base(tmp_path / "base"), tmp_path / "data"
    hub_url = {"HF_ENDPOINT": hub.url}
    with loradock_server(base, data_dir, engine={"url": engine}, environment=hub_url) as server:
        refused = server.loradock("push", "hf://org/bot", "bot", check=False)
        assert refused.returncode == 1
        assert "does not exist, or it is private: send a token (HF_TOKEN)" in " ".join(refused.stderr.split())
        done = server.loradock("push", "hf://org/bot@main", "bot", "--token-env", "MY_TOKEN")
        assert done.stdout.startswith("bot@1  shared  sha256:")
        assert f"fetched by the server as hf://org/bot@{commit}" in " ".join(done.stderr.split())
        again = server.loradock("push", f"hf://org/bot@{commit}", "bot", "--token-env", "MY_TOKEN")
        assert "nothing was changed" in again.stderr
    said = refused.stderr + done.stdout + done.stderr + again.stderr
    kept = [path for path in data_dir.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert (TOKEN in said, kept) == (False, [])


@pytest.mark.parametrize("stage", ["lookup", "download", "second download"])
def test_gateway_killed_while_it_fetches_shows_nothing_and_the_client_s_retry_completes(
    hub: Hub, engine: str, tmp_path: Path, stage: str
) -> None:
    files = {path.name: path.read_bytes() for path in write_adapter(tmp_path / "a").iterdir()}
    hub.commit("org/bot", files | {"README.md": b"x" * LARGE_BYTES})
    hub.hold = threading.Event()
    hub.hold_on = {"lookup": "/api/", "download": "README.md", "second download": "/lfs/"}[stage]
    base, data_dir, port = write_base(tmp_path / "base"), tmp_path / "data", free_port()
    config: dict[str, Any] = {"engine": {"url": engine}, "environment": {"HF_ENDPOINT": hub.url}, "port": port}
    answers: list[object] = []

    def push(url: str) -> None:
        with Client(url, retry_waits_s=(0.1,) * 6000) as client:
            client.models()  # a server that never answered is not waited for
            answers.append(client.push_source("hf://org/bot", "bot")["version"])

    with loradock_server(base, data_dir, **config) as server:
        pushing = threading.Thread(target=push, args=(server.url,))
        pushing.start()
        asyncio.run(until(lambda: hub.count(hub.hold_on) == 1, "the request that is held"))
        os.kill(server.pid, signal.SIGKILL)
    assert Auditor(data_dir).audit() == {}
    with loradock_server(base, data_dir, **config) as server:
        assert httpx.get(f"{server.url}/v1/adapters/bot", timeout=60).status_code == 404
        hub.hold.set()
        pushing.join(60)
        assert answers == [1]
        body = {"model": "bot", "prompt": "hi"}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    (digest,) = Auditor(data_dir).audit()
    assert digest.startswith("sha256:")
    assert list((data_dir / "tmp").iterdir()) == []
