"""`loradock serve`: the gateway and its engines, until Ctrl-C."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; flags go over what it says.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: a Hub id, a checkpoint directory, or a run of `loradock train`.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default 127.0.0.1; others need an admin key).")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (default 8080; 0 takes a free one).")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Uploads, registry and engine logs (default ~/.local/share/loradock).")
    ] = None,
) -> None:
    """Serve one base model and its fine-tunes on an OpenAI-compatible API."""
    from loradock_serve.config import load_config
    from loradock_serve.server import run

    flags = {"base": base, "host": host, "port": port, "data_dir": data_dir}
    run(load_config(config, flags))
