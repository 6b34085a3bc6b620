"""`kill -9` of the real gateway, or of the client, at random moments of an upload and of a publish.

After each restart everything on the disk is whole, the old version answers, and the client's own retries bring the new
one, without a word from anybody. A failure prints the seed and the moment.
"""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradock_adapters import sending
from loradock_adapters.client import Client
from loradock_adapters.errors import LoradockError
from loradock_adapters.manifest import manifest_of
from loradock_testing.cutting_proxy import cutting_proxy
from loradock_testing.loradock_server import LoradockServer, loradock_server
from loradock_testing.quick_gateway import Auditor, fake_engine, free_port
from loradock_testing.tiny_checkpoints import write_adapter, write_base

SEED = 20261122
MOMENTS = 30
CARD_BYTES = 3_000_000
RETRY_WAITS_S = (0.1,) * 6000


@dataclass
class Push:
    """One push in a thread, and when its phases began."""

    directory: Path
    began_s: float = 0.0
    publishing_s: float = 0.0
    ended_s: float = 0.0
    publishing: threading.Event = field(default_factory=threading.Event)
    answers: list[dict[str, Any]] = field(default_factory=list)
    errors: list[LoradockError] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return manifest_of(self.directory).digest

    def run(self, url: str) -> None:
        """What `loradock push` does."""

        def tell(phase: str, done_bytes: int, total_bytes: int) -> None:
            if phase == "publish":
                self.publishing_s = time.monotonic()
                self.publishing.set()

        self.began_s = time.monotonic()
        try:
            with Client(url, retry_waits_s=RETRY_WAITS_S) as client:
                client._connection._answered = True  # it knows the server, which may be down when this begins
                self.answers.append(client.push(self.directory, "model", tell))
        except LoradockError as error:
            self.errors.append(error)
        finally:
            self.ended_s = time.monotonic()
            self.publishing.set()


@dataclass
class World:
    """A gateway that is started again and again on one data_dir, one port and one engine."""

    root: Path
    engine_url: str
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    @contextmanager
    def gateway(self) -> Iterator[LoradockServer]:
        base = write_base(self.root / "base")
        with loradock_server(base, self.data_dir, engine={"url": self.engine_url}, port=self.port) as server:
            yield server

    def checkpoint(self, seed: int) -> Path:
        """An adapter that takes a while to send; no two have a file in common."""
        directory = write_adapter(self.root / f"adapter-{seed}", seed=seed)
        (directory / "README.md").write_text(random.Random(seed).randbytes(CARD_BYTES // 2).hex())
        return directory

    def answer(self, model: str) -> str:
        """Who answers: the fake engine says it."""
        body = {"model": model, "prompt": "x"}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"]).removesuffix(":x")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(sending, "CHUNK_BYTES", 64 * 1024)  # many moments
    with fake_engine(tmp_path) as url:
        yield World(tmp_path, url)


def test_gateway_killed_at_random_moments_of_a_push_loses_nothing(world: World) -> None:
    chance = random.Random(SEED)
    auditor = Auditor(world.data_dir)
    published: list[str] = []
    cut = 0
    push, thread, what = Push(world.checkpoint(0)), threading.Thread(), "the first push"
    for number in range(MOMENTS + 1):
        with world.gateway() as server:
            if number == 0:
                push.run(server.url)
                upload_s, publish_s = push.publishing_s - push.began_s, push.ended_s - push.publishing_s
            else:
                assert world.answer(f"model@{published[-1]}") == published[-1], what
                assert world.answer("model") in (published[-1], push.digest), what
                thread.join(60)
            assert (push.errors, [answer["digest"] for answer in push.answers]) == ([], [push.digest]), what
            assert world.answer("model") == push.digest, what
            published.append(push.digest)
            if number == MOMENTS:
                break
            in_publish = number % 2 == 1
            moment_s = chance.uniform(0, publish_s if in_publish else upload_s)
            what = f"seed {SEED}, kill {number}, {moment_s:.4f} s into the {'publish' if in_publish else 'upload'}"
            push = Push(world.checkpoint(number + 1))
            thread = threading.Thread(target=push.run, args=(world.url,), daemon=True)
            thread.start()
            if in_publish:
                assert push.publishing.wait(60), what
            time.sleep(moment_s)
            if not push.answers:
                cut += 1
            elif in_publish:  # a kill that comes too late, as the first push was slower: the next ones come earlier
                publish_s /= 2
            else:
                upload_s /= 2
            os.kill(server.pid, signal.SIGKILL)
        found = auditor.audit()
        assert set(published) <= found.keys() <= {*published, push.digest}, what
    assert cut >= MOMENTS // 2, f"only {cut} kills came before the push was answered"
    assert auditor.audit().keys() == set(published)
    assert [path for path in (world.data_dir / "uploads").rglob("*") if path.is_file()] == []
    assert list((world.data_dir / "tmp").iterdir()) == []


SLOWLY = """
import os, signal, sys, time
from loradock_adapters import sending
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background has it ignored
from loradock_adapters.cli import run
sending.CHUNK_BYTES = 64 * 1024
go_on = sending.Sending._go_on
sending.Sending._go_on = lambda self: (os.write(1, b"chunk\\n"), time.sleep(0.2), go_on(self))
sys.exit(run(sys.argv[1:]))
"""


STOPPED = "stopped: run the same command again, it goes on where this one ended\n"


def test_client_killed_at_random_moments_goes_on_where_it_was(world: World) -> None:
    chance = random.Random(SEED)
    directory = world.checkpoint(1)
    size_bytes = manifest_of(directory).size_bytes
    held = [0]
    with world.gateway() as server:
        words = ["push", str(directory), "model", "--server", server.url, "--json"]
        for number, how in enumerate((signal.SIGINT, signal.SIGKILL, signal.SIGKILL)):
            chunks = chance.randrange(3, 12)
            command = [sys.executable, "-c", SLOWLY, *words]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert [process.stdout.readline() for _ in range(chunks)] == ["chunk\n"] * chunks
                _until(lambda: not _is_idle(world))
                process.send_signal(how)
                _, said = process.communicate(timeout=60)
            if how == signal.SIGINT:
                assert (process.returncode, said.lstrip("\n")) == (130, STOPPED)
            _until(lambda: _is_idle(world))
            held.append(_held_bytes(world))
            assert held[-1] >= held[-2], f"seed {SEED}, kill {number}, {chunks} chunks into the upload"
        assert 0 < held[-1] < size_bytes
        command = [sys.executable, "-m", "loradock_adapters.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["digest"], answer["sent_bytes"]) == (manifest_of(directory).digest, size_bytes - held[-1])
        assert world.answer("model") == answer["digest"]


def test_push_through_a_proxy_that_cuts_connections_arrives(world: World) -> None:
    chance = random.Random(SEED)
    limits = [chance.randrange(1, 600_000) for _ in range(12)]
    directory = world.checkpoint(1)
    with world.gateway(), cutting_proxy(world.port, limits) as (url, cuts), Client(url) as client:
        assert client.models() == []
        answer = client.push(directory, "model")
        assert answer["digest"] == manifest_of(directory).digest
        assert world.answer("model") == answer["digest"]
        taken = re.search(
            r"^loradock_uploaded_bytes_total (\S+)", httpx.get(f"{world.url}/metrics", timeout=60).text, re.M
        )
    assert cuts, f"seed {SEED}: nothing was cut"
    assert taken is not None
    # What a cut connection brought last may not be on the disk yet when its client comes back: a first piece of one of
    # the files is then sent once more.
    assert 0 <= float(taken[1]) - answer["size_bytes"] <= max(limits), "next to nothing was taken twice"


def _uploads(world: World) -> list[Path]:
    return [path for path in (world.data_dir / "uploads").rglob("*") if path.is_file()]


def _held_bytes(world: World) -> int:
    """What the gateway has of contents that are not published."""
    return sum(
        int(path.name.split(".")[1]) if path.suffix == ".whole" else path.stat().st_size for path in _uploads(world)
    )


def _is_idle(world: World) -> bool:
    """Whether nobody writes to any upload."""
    for path in _uploads(world):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            continue  # finished meanwhile
    return True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
