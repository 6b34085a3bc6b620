"""The options that several commands share."""

from typing import Annotated

import typer

Server = Annotated[
    str, typer.Option(envvar="LORADOCK_SERVER", help="Address of the server.", metavar="URL", show_default=True)
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="LORADOCK_API_KEY", help="Key for the server.", metavar="KEY", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="Name of a published model.", metavar="NAME", show_default=False)]

DEFAULT_SERVER = "http://127.0.0.1:8080"
