"""Write the table of `vllm` server arguments that a config file may name, from the pinned vLLM itself.

Run: `python -m loradock_serve.tables.make_engine_args > serve/loradock_serve/tables/engine_args.json` in an
environment that has the pinned vLLM. The gateway reads the table instead of importing vLLM, which takes ten seconds;
an engine-marked test compares the two, so a vLLM that moves is noticed.
"""

import argparse
import json
import sys
from typing import Any


def argument_table() -> dict[str, Any]:
    """`{"vllm": version, "arguments": {name: {"kind": "switch" | "flag" | "value", "choices": [...]}}}`, sorted by
    name.

    A `switch` takes no value and can only be turned on; a `flag` also has a `--no-` form; anything else takes a value.
    """
    from vllm import __version__
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments: dict[str, dict[str, Any]] = {}
    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    for action in parser._actions:
        names = [o for o in action.option_strings if o.startswith("--") and not o.startswith("--no-")]
        if not names or isinstance(action, argparse._HelpAction):
            continue
        entry: dict[str, Any] = {"kind": _kind(action)}
        if action.choices is not None:
            entry["choices"] = sorted(str(choice) for choice in action.choices)
        arguments[names[0].removeprefix("--").replace("-", "_")] = entry
    return {"vllm": __version__.split("+")[0], "arguments": dict(sorted(arguments.items()))}


def _kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "flag"
    return "switch" if action.nargs == 0 else "value"


if __name__ == "__main__":
    json.dump(argument_table(), sys.stdout, indent=0)
    sys.stdout.write("\n")
