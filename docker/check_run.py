"""Runs the CPU image in containers and holds it to what it promises. docker/check.sh calls it, in its own network.

    python docker/check_run.py --work FOLDER -- buildah --root … --runroot …

FOLDER holds models/tiny-base, models/tiny-adapter, models/train.yaml and the light client's virtual environment
client/. What to run, as whom and how to tell that it is healthy is read from the image, so that a mistake in the
Dockerfile shows here. It knows neither the gateway's code nor vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = "http://127.0.0.1:8080"
KEY = "a-key-for-this-check"
PROMPT = "def main"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
TRAIN_TIMEOUT_S = 180.0
VOLUMES = ("/data", "/cache")


class CheckError(Exception):
    """The image does not do what it promises."""


@dataclass(frozen=True)
class Image:
    """What the image says of itself."""

    buildah: list[str]
    work: Path
    entrypoint: list[str]
    user: str
    healthcheck: list[str]

    def volume(self, name: str) -> Path:
        """The folder on this machine that stands for a volume, as new ones the image's user's."""
        folder = self.work / name.strip("/")
        folder.mkdir(exist_ok=True)
        uid, _, gid = self.user.partition(":")
        os.chown(folder, int(uid), int(gid))
        return folder

    @contextlib.contextmanager
    def container(self) -> Iterator[Container]:
        """A new container, removed at the end: what outlives it lies in the volumes."""
        name = _output([*self.buildah, "from", "loradock:cpu"])
        try:
            # buildah mounts volumes of its own where the image names some, now over ours and now under them.
            off = [word for volume in VOLUMES for word in ("--volume", f"{volume}-")]
            _output([*self.buildah, "config", *off, name])
            yield Container(self, name)
        finally:
            _output([*self.buildah, "rm", name])


@dataclass(frozen=True)
class Container:
    """A container of the image, with the volumes and the models."""

    image: Image
    name: str

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs `arguments` in it, as the image's user."""
        folders = [f"{self.image.volume(volume)}:{volume}" for volume in VOLUMES]
        mounts = [word for mount in (*folders, f"{self.image.work / 'models'}:/models:ro") for word in ("-v", mount)]
        settings = ["--env", f"LORADOCK_ADMIN_KEY={KEY}", "--env", "VLLM_CPU_KVCACHE_SPACE=1"]
        return [*self.image.buildah, "run", *mounts, *settings, self.name, "--", *arguments]


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout.strip()


def describe(buildah: list[str], work: Path) -> Image:
    command = [*buildah, "inspect", "--type", "image", "loradock:cpu"]
    config = json.loads(_output(command))["Docker"]["config"]
    health = config["Healthcheck"]["Test"]
    if health[0] != "CMD":
        raise CheckError(f"the health check is not in exec form: {health}")
    if set(config["Volumes"]) != set(VOLUMES):
        raise CheckError(f"the image's volumes are {config['Volumes']}")
    return Image(buildah, work, config["Entrypoint"], config["User"], health[1:])


def say(text: str) -> None:
    sys.stdout.write(f"   {text}\n")
    sys.stdout.flush()


def request(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(SERVER + path, data, headers), timeout=60) as response:
        return json.loads(response.read())


def answer(model: str) -> str:
    """What the model says to the prompt, greedily."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    return str(request("/v1/completions", body)["choices"][0]["text"])


def client(image: Image, *arguments: str) -> str:
    """Runs the light client's `loradock` and gives back what it wrote to stdout."""
    environment = {**os.environ, "LORADOCK_SERVER": SERVER, "LORADOCK_API_KEY": KEY}
    command = [str(image.work / "client/bin/loradock"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=120).stdout


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, nearest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text(encoding="ascii").split()):
            found += [child, *descendants(child)]
    return found


def server_pid(container_pid: int) -> int:
    """The gateway's own process in the container: what a container runtime would send SIGTERM to."""
    for pid in descendants(container_pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # buildah's own process in between has the same words behind its name, and takes its child along when it ends.
        if (
            not words[0].startswith(b"buildah")
            and any(word.endswith(b"/loradock") for word in words)
            and b"--data-dir" in words
        ):
            return pid
    raise CheckError("no `loradock serve` process in the container")


def uid_of(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Uid:"))


class Running:
    """The container, started and healthy; leaving the `with` stops it as `docker stop` does, and checks how it went."""

    def __init__(self, container: Container, log: Path) -> None:
        self.container = container
        self.log = log

    def __enter__(self) -> Running:
        start = time.monotonic()
        command = self.container.command(*self.container.image.entrypoint, "--base", "/models/tiny-base")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        healthy = False
        try:
            self.wait_until_healthy(start + START_TIMEOUT_S)
            healthy = True
        finally:
            if not healthy:
                self.process.terminate()
        say(f"healthy after {time.monotonic() - start:.0f} s")
        return self

    def wait_until_healthy(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise CheckError(f"the container ended with {self.process.returncode} before it was healthy")
            try:
                urllib.request.urlopen(f"{SERVER}/health", timeout=5)
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
            else:
                return
        raise CheckError(f"not healthy within {START_TIMEOUT_S:.0f} s")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        below = descendants(self.process.pid)
        os.kill(server_pid(self.process.pid), signal.SIGTERM)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            raise CheckError(f"still running {STOP_TIMEOUT_S:.0f} s after SIGTERM") from None
        left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
        # uvicorn raises the signal again when it has shut down; buildah has one exit code for all that, and says which.
        orderly = code == 0 or "exited on terminated" in self.log.read_text(errors="replace")
        if kind is None and (left or not orderly):
            raise CheckError(f"SIGTERM did not end it in order (exit code {code}), or processes {left} are left")
        say("stopped by SIGTERM, and no process is left")


def train(image: Image) -> None:
    """Trains an adapter in the image, as docker/README.md says."""
    start = time.monotonic()
    with image.container() as container:
        command = container.command("loradock", "train", "/models/train.yaml", "--output", "/data/runs/trained")
        with (image.work / "train.log").open("wb") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=TRAIN_TIMEOUT_S)
    if done.returncode != 0 or not (image.volume("/data") / "runs/trained/run.json").is_file():
        raise CheckError(f"`loradock train` in the image ended with {done.returncode} and left no run in /data")
    say(f"trained an adapter in {time.monotonic() - start:.1f} s")


def first_life(image: Image) -> str:
    """Pushes an adapter into a running container. What it then answers."""
    with image.container() as container, Running(container, image.work / "serve-1.log") as running:
        user = image.user.partition(":")[0]
        if uid_of(server_pid(running.process.pid)) != user or user == "0":
            raise CheckError("the server does not run as the image's non-root user")
        subprocess.run(container.command(*image.healthcheck), check=True, timeout=60)
        say("the image's health check passes")
        start = time.monotonic()
        client(image, "push", str(image.work / "models/tiny-adapter"), "demo")
        said, base = answer("demo"), answer("base")
        say(f"pushed and answered in {time.monotonic() - start:.1f} s: {said!r}; the base: {base!r}")
        if said == base:
            raise CheckError("the adapter answers like the base")
        client(image, "push", str(image.volume("/data") / "runs/trained"), "trained")
        answer("trained")
        say("what was trained in the image answers")
    return said


def second_life(image: Image, expected: str) -> None:
    """In another container with the same volume, the adapter is there and says the same."""
    with image.container() as container, Running(container, image.work / "serve-2.log"):
        said = answer("demo")
        if said != expected or "demo" not in client(image, "ls", "--json"):
            raise CheckError(f"in a new container the adapter says {said!r}, not {expected!r}")
        say("in a new container the adapter is still served, with the same answer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("buildah", nargs="+")
    given = parser.parse_args()
    image = describe(given.buildah, given.work.resolve())
    try:
        train(image)
        second_life(image, first_life(image))
    except (CheckError, subprocess.SubprocessError, urllib.error.URLError) as error:
        sys.stderr.write(f"error: {error}\n")
        for log in [*image.work.glob("train.log"), *sorted(image.work.glob("serve-*.log"))]:
            sys.stderr.write(f"--- {log.name}, its last lines\n{log.read_text(errors='replace')[-6000:]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
