"""`loradock push PATH NAME`: publishes a checkpoint directory under a name."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Json, Server


def push(
    path: Annotated[
        Path, typer.Argument(help="Checkpoint directory, or run directory of `loradock train`.", metavar="PATH")
    ],
    name: Annotated[str, typer.Argument(help="Name to publish it under.", metavar="NAME")],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Publish a checkpoint under a name; it answers within seconds."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    from loradock_adapters import console
    from loradock_adapters.client import Client

    columns = (TextColumn("{task.description:<5}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console.err, transient=True) as bars, Client(server, api_key) as client:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done_bytes: int, total_bytes: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total_bytes)
            bars.update(tasks[phase], completed=done_bytes, total=total_bytes)

        answer = client.push(path, name, show)
    if json:
        console.out_json(answer)
    else:
        console.out(f"{answer.get('name')}@{answer.get('version')}  {answer.get('placement')}  {answer.get('digest')}")
    _explain(answer)


def _explain(answer: dict[str, Any]) -> None:
    """The reasons and the time, for people."""
    from loradock_adapters import console
    from loradock_adapters.problems import Problem

    if not answer.get("created", True):
        console.note("the same bytes are the current version already: nothing was changed")
    repairs = answer.get("repairs")
    for repair in map(Problem.from_json, repairs if isinstance(repairs, list) else []):
        console.note(f"repaired [{repair.code}] {repair}", "yellow")
    if answer.get("state") == "unproven":
        console.note("unproven: no engine has shown yet that it answers as it must; it is asked when it first has it")
    reasons = answer.get("reasons")
    console.note_problems(Problem.from_json(reason) for reason in (reasons if isinstance(reasons, list) else []))
    sent, whole = console.size(answer["sent_bytes"]), console.size(answer["size_bytes"])
    console.note(f"sent {sent} of {whole} in {answer['seconds']:.1f} s", "green")
