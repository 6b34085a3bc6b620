"""Two `loradock serve` on one PostgreSQL and one S3 store: what one of them is told, both do, within a second.

Real processes but for the engines, which are fake: they answer with the digest that they were asked for, so a test
sees which version answered. Each gateway has a data_dir and an engine of its own.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import httpx
import pytest
import yaml

from loradock_adapters.manifest import manifest_of
from loradock_testing.engines import SUPPORT
from loradock_testing.postgres import PASSWORD, PostgresServer, postgres_server
from loradock_testing.s3_server import SECRET, S3Server, s3_server
from loradock_testing.tiny_checkpoints import write_adapter, write_base

RUN = """
from loradock_serve import engine_command
engine_command.ENGINE_MODULE = "loradock_testing.fake_engine"
from loradock_adapters.cli import main
main()
"""


@dataclass
class Gateway:
    """One running server."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path
    data_dir: Path

    def push(self, directory: Path, name: str) -> httpx.Response:
        """What `loradock push` does."""
        manifest = manifest_of(directory)
        for entry in manifest.files:
            while True:  # another push may write the same content at this moment
                answer = self.client.put(
                    f"/v1/adapters/blobs/{entry.sha256}", content=(directory / entry.path).read_bytes()
                )
                if answer.status_code != 423:
                    break
            answer.raise_for_status()
        return self.client.post(f"/v1/adapters/{name}/versions", json=manifest.to_json())

    def ask(self, model: str) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": model, "prompt": "x"})

    def answers_with(self, model: str, digest: str | None) -> bool:
        """Whether this version answers; None: whether nothing does."""
        answer = self.ask(model)
        if digest is None:
            return answer.status_code == 404
        return answer.status_code == 200 and answer.json()["choices"][0]["text"] == f"{digest}:x"

    def seconds_until_answer(self, model: str, digest: str | None) -> float:
        """How long it takes until this version answers, or nothing any more."""
        return seconds_until(lambda: self.answers_with(model, digest), f"{model} is {digest}")


@dataclass
class Both:
    gateways: tuple[Gateway, Gateway]
    postgres: PostgresServer
    s3: S3Server
    root: Path


def seconds_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> float:
    began = time.perf_counter()
    while not condition():
        assert time.perf_counter() - began < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)
    return time.perf_counter() - began


def start(root: Path, base: Path, registry: str, blobs: str, environment: dict[str, str]) -> Gateway:
    root.mkdir()
    config = {"base": str(base), "port": 0, "data_dir": str(root / "data"), "blobs_url": blobs}
    config |= {"registry_url": registry}
    (root / "serve.yaml").write_text(yaml.safe_dump(config))
    log = root / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, "serve", str(root / "serve.yaml")],
            stderr=file,
            stdout=subprocess.DEVNULL,
            env=os.environ | environment | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        )
    return Gateway(process, httpx.Client(timeout=60), log, root / "data")


def until_ready(gateway: Gateway) -> None:
    def ready() -> bool:
        assert gateway.process.poll() is None, gateway.log.read_text()[-3000:]
        found = re.search(r"listening on (http://\S+)", gateway.log.read_text())
        if found is None:
            return False
        gateway.client.base_url = found[1]
        return gateway.client.get("/health").status_code == 200

    seconds_until(ready, "the gateway and its engine", 60)


@pytest.fixture(scope="module")
def both(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    root = tmp_path_factory.mktemp("two-gateways")
    base = write_base(root / "tiny-base")
    with postgres_server() as database, s3_server() as s3:
        places = (database.new_database(), s3.new_bucket())
        gateways = tuple(start(root / name, base, *places, dict(s3.environment)) for name in ("a", "b"))
        try:
            for gateway in gateways:
                until_ready(gateway)
            yield Both((gateways[0], gateways[1]), database, s3, root)
        finally:
            for gateway in gateways:
                gateway.client.close()
                gateway.process.send_signal(signal.SIGTERM)
            for gateway in gateways:
                gateway.process.wait(30)


def adapter(both: Both, seed: int) -> tuple[Path, str]:
    directory = both.root / f"adapter-{seed}"
    if not directory.exists():
        write_adapter(directory, seed)
    return directory, manifest_of(directory).digest


def test_push_to_one_is_answered_by_both_within_a_second(both: Both) -> None:
    here, there = both.gateways
    seconds = []
    for seed in range(8):
        directory, digest = adapter(both, seed)
        assert here.push(directory, "pushed").status_code == 201
        assert here.answers_with("pushed", digest), "the one that it was pushed to, at once"
        seconds.append(there.seconds_until_answer("pushed", digest))
        here, there = there, here
    assert median_low(seconds) < 1, seconds  # one alone may meet a machine that does something else


def test_rollback_tag_and_removal_by_one_are_seen_by_the_other(both: Both) -> None:
    here, there = both.gateways
    digests = [adapter(both, seed)[1] for seed in (20, 21)]
    for seed in (20, 21):
        assert here.push(adapter(both, seed)[0], "moved").status_code == 201
    seconds = [there.seconds_until_answer("moved", digests[1])]
    here.client.post("/v1/adapters/moved/rollback", json={"version": 1}).raise_for_status()
    seconds.append(there.seconds_until_answer("moved", digests[0]))
    here.client.put("/v1/adapters/moved/tags/prod", json={"version": 2}).raise_for_status()
    seconds.append(there.seconds_until_answer("moved@prod", digests[1]))
    here.client.delete("/v1/adapters/moved").raise_for_status()
    seconds.append(there.seconds_until_answer("moved", None))
    assert median_low(seconds) < 1, seconds  # one alone may meet a machine that does something else


def test_pushes_of_one_name_to_both_at_once_are_numbered_without_gaps_or_twins(both: Both) -> None:
    directories = [adapter(both, seed)[0] for seed in range(30, 42)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda one: both.gateways[one[0] % 2].push(one[1], "contended"), enumerate(directories))
        )
    assert [answer.status_code for answer in answers] == [201] * 12
    assert sorted(answer.json()["version"] for answer in answers) == list(range(1, 13))
    for gateway in both.gateways:
        versions = gateway.client.get("/v1/adapters/contended").json()["versions"]
        assert [version["version"] for version in versions] == list(range(12, 0, -1))


def test_many_first_requests_for_what_the_other_has_make_one_download(both: Both) -> None:
    here, there = both.gateways
    directory, digest = adapter(both, 50)
    (weights,) = (e.sha256 for e in manifest_of(directory).files if e.path.endswith(".safetensors"))
    here.push(directory, "asked-by-many").raise_for_status()
    before = both.s3.asked("GET", weights)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: there.ask("asked-by-many"), range(16)))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [f"{digest}:x"] * 16
    assert both.s3.asked("GET", weights) - before == 1


def test_database_that_is_away_stops_nothing_that_is_known(both: Both) -> None:
    here, there = both.gateways
    directory, digest = adapter(both, 70)
    here.push(directory, "known").raise_for_status()
    for gateway in both.gateways:
        gateway.seconds_until_answer("known", digest)
    stop = threading.Event()
    wrong: list[str] = []

    def traffic(gateway: Gateway) -> None:
        while not stop.is_set():
            if not gateway.answers_with("known", digest):
                wrong.append(gateway.ask("known").text)
            time.sleep(0.01)

    threads = [threading.Thread(target=traffic, args=(gateway,)) for gateway in both.gateways]
    for thread in threads:
        thread.start()
    both.postgres.stop()
    try:
        unknown = there.ask("never-asked-for-before")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "registry_unavailable")
        assert int(unknown.headers["retry-after"]) > 0
        push = here.push(adapter(both, 71)[0], "not-now")
        assert (push.status_code, push.json()["error"]["code"]) == (503, "registry_unavailable")
        time.sleep(0.5)
    finally:
        both.postgres.start()
    seconds_until(lambda: there.ask("never-asked-for-before").status_code == 404, "the database's return")
    assert here.push(adapter(both, 71)[0], "not-now").status_code == 201
    there.seconds_until_answer("not-now", adapter(both, 71)[1])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_secrets_are_in_no_log(both: Both) -> None:
    for gateway in both.gateways:
        log = gateway.log.read_text()
        assert PASSWORD not in log
        assert SECRET not in log
        assert "Traceback" not in log, log[-3000:]


def test_store_that_is_away_stops_nothing_that_is_here(both: Both) -> None:
    here, there = both.gateways
    for seed, name in ((80, "here"), (81, "not-here")):
        here.push(adapter(both, seed)[0], name).raise_for_status()
    there.seconds_until_answer("here", adapter(both, 80)[1])
    both.s3.stop()
    assert there.answers_with("here", adapter(both, 80)[1])
    answer = there.ask("not-here")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    push = there.push(adapter(both, 82)[0], "cannot-be-shared")
    assert (push.status_code, push.json()["error"]["code"]) == (503, "store_unavailable")
    assert there.ask("cannot-be-shared").status_code == 404
    assert there.answers_with("here", adapter(both, 80)[1])
