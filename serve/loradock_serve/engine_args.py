"""Which arguments of vLLM's server a config file may set, and how they become a command line.

The table of names is data made from the pinned vLLM (`tables/engine_args.json`), so that a typo is found in
microseconds and without importing vLLM. Knows nothing of processes.
"""

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

# What Loradock sets itself, with the reason a person is told.
RESERVED: dict[str, str] = {
    "model": "name it as `base`",
    "served_model_name": "names are the gateway's; the base answers under `base` and the last part of its id",
    "host": "engines listen on a Unix socket only; set the gateway's `host`",
    "port": "engines listen on a Unix socket only; set the gateway's `port`",
    "uds": "the socket's path is chosen afresh at every start",
    "api_key": "the engine is reachable through the gateway only; set LORADOCK_ADMIN_KEY",
    "enable_lora": "adapters are what the base engine is for; it is always on where the architecture has it",
    "lora_modules": "push adapters with `loradock push`",
    "default_mm_loras": "push adapters with `loradock push`",
    "worker_extension_cls": "Loradock's own extension stands there",
    "trust_request_chat_template": "the gateway needs it for adapters' own templates, and refuses clients' templates",
    "middleware": "the engine is private to the gateway",
    "config": "this file is the configuration",
    "headless": "the gateway needs the engine's API",
    "grpc": "the gateway speaks HTTP to its engines",
    "grpc_port": "the gateway speaks HTTP to its engines",
    "api_server_count": "runtime adapters need exactly one API process (vLLM refuses more)",
    "data_parallel_external_lb": "runtime adapters need exactly one API process (vLLM refuses more)",
    "data_parallel_hybrid_lb": "runtime adapters need exactly one API process (vLLM refuses more)",
    "root_path": "the gateway answers clients, not the engine",
    "ssl_keyfile": "the gateway answers clients, not the engine",
    "ssl_certfile": "the gateway answers clients, not the engine",
    "ssl_ca_certs": "the gateway answers clients, not the engine",
    "ssl_cert_reqs": "the gateway answers clients, not the engine",
}

COUNTS = {"max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size"}
"""Numbers from 1 on: an engine told otherwise ends at each of its starts, and slots are planned from the first."""


@cache
def known_arguments() -> Mapping[str, Mapping[str, Any]]:
    """Name (with underscores) to `{"kind": "switch" | "flag" | "value", "choices"?: [...]}` of the pinned vLLM."""
    table = json.loads(resources.files("loradock_serve.tables").joinpath("engine_args.json").read_text())
    arguments: Mapping[str, Mapping[str, Any]] = table["arguments"]
    return arguments


@cache
def pinned_vllm() -> str:
    """The vLLM version that the table was made from, as "0.32.0"."""
    table = json.loads(resources.files("loradock_serve.tables").joinpath("engine_args.json").read_text())
    return str(table["vllm"])


def problems_with(arguments: Mapping[str, Any], where: str) -> list[str]:
    """Every complaint about `arguments` (names with underscores), each naming its key below `where`."""
    return [f"{where}.{name}: {why}" for name, value in arguments.items() if (why := _problem(name, value)) is not None]


def _problem(name: str, value: Any) -> str | None:
    if name in RESERVED:
        return f"Loradock sets this itself: {RESERVED[name]}"
    entry = known_arguments().get(name)
    if entry is None:
        near = difflib.get_close_matches(name, known_arguments(), n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"vLLM {pinned_vllm()} has no argument of this name{hint}"
    if entry["kind"] in ("flag", "switch"):
        return None if isinstance(value, bool) else f"is on or off: write true or false, not {value!r}"
    if isinstance(value, bool):
        return f"takes a value, not {str(value).lower()}"
    if name in COUNTS and isinstance(value, int | float) and value < 1:
        return f"must be 1 or more, not {value}"
    choices = entry.get("choices")
    if choices is not None and isinstance(value, str | int) and str(value) not in choices:
        return f"{value!r} is not one of {', '.join(choices)}"
    return None


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """`{"max_loras": 4, "enforce_eager": True}` as `["--max-loras", "4", "--enforce-eager"]`; None leaves an argument
    out.

    Lists repeat their values behind one flag, mappings become JSON: both as vLLM's own parser takes them.
    """
    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words += [flag] if value else _off(name, flag)
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif isinstance(value, list | tuple):
            words += [flag, *(json.dumps(item) if isinstance(item, Mapping) else str(item) for item in value)]
        else:
            words += [flag, str(value)]
    return words


def _off(name: str, flag: str) -> list[str]:
    # A switch has no `--no-` form: leaving it out is how it is turned off.
    if known_arguments().get(name, {}).get("kind") == "flag":
        return ["--no-" + flag.removeprefix("--")]
    return []
