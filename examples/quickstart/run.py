"""The whole job from one command: data, a base from scratch, three fine-tunes, served, pushed, asked, in one table.

    python examples/quickstart/run.py            # leaves the server running until Ctrl-C
    python examples/quickstart/run.py --check    # on a free port; asserts what is promised, and ends

A client like any other: it runs the commands a person would type (and prints them) and asks through the official
OpenAI client. Knows nothing of how models are trained or served. Every run starts afresh in its working directory.
"""

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import openai
from asking import NoAnswerError, Question, ask, ask_everyone, openai_client, read_questions
from results import (
    BASE,
    FINE_TUNES,
    MODELS,
    NUM_COMPARED,
    FineTune,
    Paths,
    Result,
    example_question,
    problems_with,
    results_table,
    snippets,
)
from rich.console import Console
from rich.markup import escape
from truth import disagreements, served_tokens

HERE = Path(__file__).resolve().parent
DEFAULT_WORKDIR = Path(".quickstart")
DEFAULT_PORT = 8080
HEALTHY_WITHIN_S = 600.0
STOPPED_WITHIN_S = 60.0
FULL_LEARNING_RATE = "6e-4"
"""On a real base a tenth of LoRA's would do: the duel's own rule. This one is a toy, trained for minutes."""

console = Console()


class StepError(Exception):
    """A step of the quickstart failed; the message says which and where to look."""


# ---- commands -------------------------------------------------------------------------------------------------------


def program() -> str:
    """The `loradock` of the environment that runs this script."""
    beside = Path(sys.executable).parent / "loradock"
    found = str(beside) if beside.is_file() else shutil.which("loradock")
    if found is None:
        raise StepError("there is no `loradock` beside this Python; `make install` puts both into .venv")
    return found


def say(title: str) -> None:
    console.rule(f"[bold]{escape(title)}", align="left")


def shown(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join([Path(command[0]).name, *command[1:]])


def run_command(command: Sequence[str]) -> None:
    """Run and let it speak. Raises StepError when it fails."""
    console.print(f"[dim]$ {escape(shown(command))}", highlight=False, soft_wrap=True)
    status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise StepError(f"`{shown(command)}` failed with exit code {status}")


def make_data(paths: Paths) -> None:
    say("Data: the standard library's own source, a tenth of it held out")
    run_command([sys.executable, str(HERE / "data.py"), str(paths.data)])


def train(paths: Paths, yaml: str, title: str, task: str) -> None:
    say(title)
    command = [program(), "train", os.path.relpath(HERE / f"{yaml}.yaml"), "--output", str(paths.run(yaml))]
    file = "base.jsonl" if yaml == BASE else f"{task}-train.jsonl"
    model = {} if yaml == BASE else {"model_id": paths.checkpoint(BASE)}
    run_command(command + elsewhere(paths, {"train_path": paths.data / file, **model}))


def elsewhere(paths: Paths, places: dict[str, Path]) -> list[str]:
    """Options for another working directory: the YAMLs name the usual one."""
    if paths.root.resolve() == (HERE / "../.." / DEFAULT_WORKDIR).resolve():
        return []
    return [word for key, path in places.items() for word in ("--set", f"{key}={path.resolve()}")]


def duel(paths: Paths) -> None:
    say("Duel: the task `packages` by LoRA and by full-parameter training, from one file")
    command = [program(), "duel", os.path.relpath(HERE / "packages-lora.yaml"), "--output", str(paths.run("packages"))]
    command += ["--full-learning-rate", FULL_LEARNING_RATE]
    places = {"train_path": paths.data / "packages-train.jsonl", "valid_path": paths.data / "packages-heldout.jsonl"}
    run_command(command + elsewhere(paths, {**places, "model_id": paths.checkpoint(BASE)}))


# ---- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(paths: Paths, port: int) -> Iterator[str]:
    """`loradock serve` while the block runs; the address. The server is always stopped, engines and all."""
    command = [program(), "serve", os.path.relpath(HERE / "serve.yaml"), "--base", str(paths.run(BASE))]
    command += ["--port", str(port), "--data-dir", str(paths.server)]
    console.print(f"[dim]$ {escape(shown(command))}", highlight=False, soft_wrap=True)
    # No admin key from the environment: this server is for this machine alone. In a session of its own, so that a
    # Ctrl-C reaches only this script, which then stops the server in order.
    environment = {name: value for name, value in os.environ.items() if name != "LORADOCK_ADMIN_KEY"}
    with paths.server_log.open("wb") as log:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, server, paths.server_log)
        yield address
    finally:
        stop(server)


def wait_until_healthy(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Raises StepError, with the end of the log, when the server ends or takes too long."""
    deadline_s = time.monotonic() + HEALTHY_WITHIN_S
    with console.status("the engine starts (its imports take most of a minute)"):
        while time.monotonic() < deadline_s and server.poll() is None:
            try:
                if httpx.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.5)
    state = "took too long to be healthy" if server.poll() is None else f"ended with exit code {server.returncode}"
    end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise StepError(f"`loradock serve` {state}; the end of {log}:\n{end}")


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free(port: int) -> None:
    """Told before the training, not after it. Raises StepError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StepError(f"port {port} cannot be used: {error.strerror}; choose another: --port 8090") from error


# ---- push and ask ----------------------------------------------------------------------------------------------------


def push(paths: Paths, address: str, fine_tune: FineTune, prompt: str) -> float:
    """Push, ask at once, and return the seconds from the push's start to the first token."""
    started_s = time.monotonic()
    run_command([program(), "push", str(paths.run(fine_tune.run)), fine_tune.name, "--server", address])

    async def first_token() -> float:
        async with openai_client(address) as client:
            return (await ask(client, fine_tune.name, prompt))[1]

    seconds = asyncio.run(first_token()) - started_s
    console.print(f"{fine_tune.name}: first token {seconds:.1f} s after the push began", highlight=False)
    record = {"name": fine_tune.name, "server": address, "first_token_s": round(seconds, 3)}
    (paths.run(fine_tune.run) / "push.json").write_text(json.dumps(record) + "\n")  # for `loradock compare`
    return seconds


def placements(address: str) -> dict[str, str]:
    """Model to placement, as the server tells it."""
    cards: list[dict[str, Any]] = httpx.get(f"{address}/v1/models", timeout=30, trust_env=False).json()["data"]
    found: dict[str, str] = {}
    for card in cards:
        about = card["loradock"]
        found[BASE if about["kind"] == "base" else card["id"]] = about["placement"]
    return found


def serve_and_ask(paths: Paths, address: str) -> Result:
    """What is done while the server stands."""
    questions = read_questions(paths.data)
    say("Before: the base answers the held-out questions of both tasks")
    before = asyncio.run(ask_everyone(address, [BASE], questions, console))
    say("Push: three models onto the running server")
    prompt = questions[0].prompt
    first_token_s = {fine_tune.name: push(paths, address, fine_tune, prompt) for fine_tune in FINE_TUNES}
    say("After: all four models get each question at the same moment")
    after = asyncio.run(ask_everyone(address, MODELS, questions, console))
    say("Truth: transformers and PEFT answer from the same files, token by token")
    wrong = compare_with_truth(paths, address, questions)
    sizes = [checkpoint_bytes(paths, run) for run in ("packages/lora", "packages/full")]
    return Result(questions, before, after, first_token_s, placements(address), wrong, sizes[1] / sizes[0])


def compare_with_truth(paths: Paths, address: str, questions: Sequence[Question]) -> dict[str, int]:
    """For LoRA and full: on how many held-out prompts the server says something else."""
    prompts = [question.prompt for question in questions if question.task == "packages"][:NUM_COMPARED]
    found = {}
    for name, base, adapter in (
        ("packages", paths.checkpoint(BASE), paths.checkpoint("packages/lora")),
        ("packages-full", paths.checkpoint("packages/full"), None),
    ):
        served = [(prompt, served_tokens(address, name, prompt)) for prompt in prompts]
        wrong = disagreements(base, adapter, served)
        found[name] = len(wrong)
        console.print(f"{name}: {len(prompts) - len(wrong)} of {len(prompts)} answers equal", highlight=False)
    return found


def checkpoint_bytes(paths: Paths, run: str) -> int:
    size_bytes: int = json.loads((paths.run(run) / "run.json").read_text())["checkpoint_bytes"]
    return size_bytes


# ---- all of it -----------------------------------------------------------------------------------------------------


def show(result: Result, paths: Paths) -> None:
    question = example_question(result)
    say("One question, four answers at the same moment")
    console.print(question.prompt, markup=False, highlight=False)
    for model in MODELS:
        console.print(f"  [bold]{model:<14}[/] {escape(repr(result.after[model, question]))}", highlight=False)
    console.print()
    # As wide as it needs to be, also in a pipe: a table with cut cells says nothing.
    wide = console if console.width >= 136 else Console(width=136)
    wide.print(results_table(result, paths))
    console.print()
    run_command([program(), "compare", *(str(paths.run(f.run)) for f in FINE_TUNES if f.task == "packages")])


def quickstart(paths: Paths, port: int, check: bool) -> int:
    """Everything, in order; the exit code."""
    started_s = time.monotonic()
    require_free(port)
    paths.clear()
    make_data(paths)
    train(paths, BASE, "Base: a small Llama from scratch, tokenizer too", "")
    duel(paths)
    train(paths, "keywords-lora", "Fine-tune: keywords", "keywords")
    say("Serve: one engine for the base and its adapters")
    with serving(paths, port) as address:
        result = serve_and_ask(paths, address)
        show(result, paths)
        console.print(f"all of it took {(time.monotonic() - started_s) / 60:.1f} minutes", highlight=False)
        problems = problems_with(result)
        for problem in problems:
            console.print(f"[red]not as promised:[/] {escape(problem)}", highlight=False, soft_wrap=True)
        if not check:
            leave_running(address, example_question(result).prompt)
    if check and not problems:
        console.print("[green]everything is as promised")
    return 1 if problems else 0


def leave_running(address: str, prompt: str) -> None:
    say(f"The server runs on {address} until Ctrl-C. From a shell, or from Python:")
    print(snippets(address, prompt), flush=True)  # bare: no styles or line breaks that a paste would carry along
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print("stopping")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # as on Ctrl-C, so that the server is stopped


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, serve, push and ask: the whole of Loradock in minutes.")
    parser.add_argument("--check", action="store_true", help="use a free port, assert what is promised, and end")
    parser.add_argument("--port", type=int, default=None, help=f"default {DEFAULT_PORT}, or a free one with --check")
    parser.add_argument("--workdir", type=Path, default=DEFAULT_WORKDIR, help=f"made anew; default {DEFAULT_WORKDIR}")
    arguments = parser.parse_args()
    port = arguments.port if arguments.port is not None else free_port() if arguments.check else DEFAULT_PORT
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return quickstart(Paths(arguments.workdir), port, arguments.check)
    except (StepError, NoAnswerError, httpx.HTTPError, openai.APIError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
