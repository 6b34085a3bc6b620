"""vLLM's arguments: which a config may name, and how they become a command line."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve import engine_args, engine_command, sizing
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.engine_args import RESERVED, command_line, known_arguments, pinned_vllm, problems_with
from loradock_serve.engine_command import Machine


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("max_num_seq", 3, "vLLM 0.32.0 has no argument of this name; did you mean `max_num_seqs`?"),
        ("zzzzzzzzz", 3, "vLLM 0.32.0 has no argument of this name"),
        ("enforce_eager", "yes", "is on or off: write true or false, not 'yes'"),
        ("max_num_seqs", True, "takes a value, not true"),
        ("kv_cache_dtype", "fp3", "'fp3' is not one of "),
        ("uds", "/x", "Loradock sets this itself: the socket's path is chosen afresh at every start"),
    ],
)
def test_argument_that_cannot_be_set_is_explained(name: str, value: Any, problem: str) -> None:
    (found,) = problems_with({name: value}, "engine")
    assert found.startswith(f"engine.{name}: {problem}")


def test_arguments_of_every_kind_are_taken() -> None:
    assert problems_with({"max_num_seqs": 8, "enforce_eager": False, "kv_cache_dtype": "auto"}, "engine") == []


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_argument_exists_in_the_pinned_vllm(name: str) -> None:
    assert name in known_arguments()


def test_command_line_of_every_kind_of_value() -> None:
    arguments = {
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": None,
        "override_generation_config": {"temperature": 0},
        "allowed_origins": ["a", "b"],
    }
    assert known_arguments()["enable_prefix_caching"]["kind"] == "flag"
    assert known_arguments()["disable_log_stats"]["kind"] != "value"
    words = command_line(arguments)
    assert words[:4] == ["--max-num-seqs", "8", "--enforce-eager", "--no-enable-prefix-caching"]
    assert words[-5:] == ["--override-generation-config", '{"temperature": 0}', "--allowed-origins", "a", "b"]
    assert "--seed" not in words


def test_switch_that_is_off_is_left_out() -> None:
    switch = next(name for name, entry in known_arguments().items() if entry["kind"] == "switch")
    assert command_line({switch: False}) == []
    assert command_line({switch: True}) == ["--" + switch.replace("_", "-")]


words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
values = st.one_of(st.integers(0, 10**6), words, st.dictionaries(words, st.integers(), min_size=1, max_size=3))


@given(st.dictionaries(st.sampled_from(["alpha", "beta_gamma", "delta"]), values))
def test_parser_reads_back_what_was_written(arguments: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("alpha", "beta_gamma", "delta"):
        parser.add_argument("--" + name.replace("_", "-"))
    read = {name: value for name, value in vars(parser.parse_args(command_line(arguments))).items() if value}
    assert read == {k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in arguments.items()}


def test_every_argument_that_loradock_sets_exists_in_the_pinned_vllm() -> None:
    lora = sizing.LoraSizing(4, 64, 64, 0)
    for machine in (Machine("cpu", 2**34, (0,)), Machine("gpu", 2**34, (0,))):
        commands = [
            engine_command.base_command(
                "m", Path("/s"), EngineConfig(max_model_len=9), DedicatedConfig(), machine, lora
            ),
            engine_command.dedicated_command(Path("/m"), "n", Path("/s"), EngineConfig(), DedicatedConfig(), machine),
        ]
        for command in commands:
            names = [word[2:].replace("-", "_") for word in command.argv if word.startswith("--")]
            assert set(names) <= set(known_arguments())
            assert "uds" in names


@pytest.mark.engine
def test_table_equals_what_the_pinned_vllm_says() -> None:
    environment = os.environ | {"VLLM_PLUGINS": ""}
    output = subprocess.run(
        [sys.executable, "-m", "loradock_serve.tables.make_engine_args"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    table = json.loads(output[output.index("{") :])
    assert table["vllm"] == pinned_vllm()
    assert table["arguments"] == dict(engine_args.known_arguments())


@pytest.mark.parametrize("name", sorted(engine_args.COUNTS))
def test_count_below_one_is_a_problem_before_an_engine_dies_of_it(name: str) -> None:
    assert engine_args.problems_with({name: 1}, "engine") == []
    assert engine_args.problems_with({name: 0}, "engine") == [f"engine.{name}: must be 1 or more, not 0"]
