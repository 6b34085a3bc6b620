"""The `loradock` command. Its sub-commands come from the entry points of group "loradock.commands".

Only the module of the command that was asked for is imported; `loradock --help` imports them all, which is cheap
because a command's module imports nothing heavy before its function runs. Knows no command itself.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import typer

from loradock_adapters.errors import LoradockError

GROUP = "loradock.commands"
_EXTRAS = {"loradock_train": "train", "loradock_serve": "serve", "sqlalchemy": "serve", "alembic": "serve"}


def main() -> None:
    """Runs the command line of this process, and ends it with the command's exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line. 0: done, 1: failed, 2: wrong usage."""
    commands = {command.name: command for command in entry_points(group=GROUP)}
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    wanted = [commands[asked]] if asked in commands else [commands[name] for name in sorted(commands)]
    try:
        _application(wanted)(args=list(arguments), prog_name="loradock")
    except SystemExit as end:  # how Typer ends, with 2 for wrong usage
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except LoradockError as error:
        from loradock_adapters.console import report

        report(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        return _missing(error, commands.get(asked) if asked is not None else None)
    return 0


def _application(commands: Sequence[EntryPoint]) -> typer.Typer:
    app = typer.Typer(
        name="loradock",
        help="Train LoRA adapters and models, and serve many of them on one base.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        _version: bool = typer.Option(
            False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ) -> None:
        pass

    for command in commands:
        app.command(command.name)(_function(command))
    return app


def _function(command: EntryPoint) -> Callable[..., Any]:
    """The command's function; a stand-in that says what is missing where its module cannot be imported."""
    try:
        function: Callable[..., Any] = command.load()
    except ImportError as error:
        missing = error

        def unavailable() -> None:
            """Not installed."""
            raise missing

        return unavailable
    return function


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"loradock {version('loradock')}\n")
        raise typer.Exit


def _missing(error: ModuleNotFoundError, command: EntryPoint | None) -> int:
    """A package that the light client lacks: says which extra brings it."""
    from loradock_adapters.console import note

    package = (command.module if command is not None else "").partition(".")[0]
    extra = _EXTRAS.get(package) or _EXTRAS.get((error.name or "").partition(".")[0])
    if extra is None:
        raise error
    name = command.name if command is not None else "this"
    note(f"error: `loradock {name}` needs {error.name}, which is not installed", "red")
    note(f"    pip install 'loradock[{extra}]'")
    return 1


if __name__ == "__main__":
    main()
