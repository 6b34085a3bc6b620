"""`loradock push PATH NAME`: publishes a checkpoint directory, or what the server fetches itself, under a name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Server

if TYPE_CHECKING:
    from loradock_adapters.sending import Progress


def push(
    path: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, run directory of `loradock train`, or what the server fetches itself: "
            "hf://org/repo@revision, s3://bucket/prefix.",
            metavar="PATH",
        ),
    ],
    name: Annotated[str, typer.Argument(help="Name to publish it under.", metavar="NAME")],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
    token_env: Annotated[
        str | None,
        typer.Option(
            help="Variable that holds a token for a private hf:// source; sent with this push, stored nowhere. "
            "HF_TOKEN is sent by itself over HTTPS and to this machine.",
            metavar="VARIABLE",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Publish it even if it changes nothing.")] = False,
) -> None:
    """Publish a checkpoint under a name; it answers within seconds."""
    from loradock_adapters import console
    from loradock_adapters.client import Client
    from loradock_adapters.source_ref import is_source
    from loradock_adapters.source_token import token_for

    token = token_for(path, server, token_env, os.environ)
    try:
        with _bars() as show, Client(server, api_key) as client:
            if is_source(path):
                answer = client.push_source(path, name, show, token=token, force=force)
            else:
                answer = client.push(Path(path), name, show, force=force)
    except KeyboardInterrupt:
        console.note("stopped: run the same command again, it goes on where this one ended", "red")
        raise typer.Exit(130) from None
    if json:
        console.out_json(answer)
    else:
        console.out(f"{answer.get('name')}@{answer.get('version')}  {answer.get('placement')}  {answer.get('digest')}")
    _explain(answer)


@contextmanager
def _bars() -> "Iterator[Progress]":
    """A bar for each phase, on stderr where that is a terminal, gone at the end."""
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    from loradock_adapters import console

    columns = (TextColumn("{task.description:<7}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console.err, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done_bytes: int, total_bytes: int) -> None:
            total = total_bytes or None  # None: a bar that only shows that something is done
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done_bytes, total=total)

        yield show


def _explain(answer: dict[str, Any]) -> None:
    """The reasons and the time, for people."""
    from loradock_adapters import console
    from loradock_adapters.problems import Problem

    if not answer.get("created", True):
        console.note(_known(answer))
    elif answer.get("current_version", answer.get("version")) != answer.get("version"):
        console.note(_beside(answer), "yellow")
    repairs = answer.get("repairs")
    for repair in map(Problem.from_json, repairs if isinstance(repairs, list) else []):
        console.note(f"repaired [{repair.code}] {repair}", "yellow")
    if answer.get("state") == "unproven":
        console.note("unproven: no engine has shown yet that it answers as it must; it is asked when it first has it")
    reasons = answer.get("reasons")
    console.note_problems(Problem.from_json(reason) for reason in (reasons if isinstance(reasons, list) else []))
    if "sent_bytes" in answer:
        sent, whole = console.size(answer["sent_bytes"]), console.size(answer["size_bytes"])
        console.note(f"sent {sent} of {whole} in {answer['seconds']:.1f} s", "green")
    else:
        console.note(f"fetched by the server as {answer.get('source')} in {answer['seconds']:.1f} s", "green")


def _known(answer: dict[str, Any]) -> str:
    """Why nothing was published."""
    name, number, current = answer.get("name"), answer.get("version"), answer.get("current_version")
    if current is None or number == current:
        return "the same bytes are the current version already: nothing was changed"
    way = f"`loradock promote {name} {number}` points it at these"
    return (
        f"the same bytes are version {number} already, and {name} points at version {current}: nothing changed; {way}"
    )


def _beside(answer: dict[str, Any]) -> str:
    """Why a new version gets no traffic yet."""
    name, number = answer.get("name"), answer.get("version")
    way = f"`loradock promote {name} {number}` ends the split and sends all there"
    return f"the traffic of {name} is split, and version {number} has no share in it; {way}"
