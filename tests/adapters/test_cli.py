"""The command line: exit codes, what goes to which stream, and how little it imports."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from loradock_adapters import cli
from loradock_adapters.cli import GROUP, run
from loradock_testing.adapters_server import KEY, State, adapters_server
from loradock_testing.checkpoints import LLAMA, f32, lora_tensors, write_adapter, write_full, write_json
from loradock_testing.processor import require_cheap

HEAVY = ["torch", "transformers", "vllm", "fastapi", "sqlalchemy", "httpx", "numpy", "alembic", "peft"]

_LOADED = """
import json, sys
from loradock_adapters.cli import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""

# A stand-in for `pip install loradock` without extras: the packages are there, and cannot be imported.
_LIGHT = """
import sys
absent = "torch transformers vllm fastapi starlette uvicorn sqlalchemy alembic numpy peft safetensors huggingface_hub"
sys.modules.update(dict.fromkeys(absent.split()))
from loradock_adapters.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    with adapters_server() as state:
        monkeypatch.setenv("LORADOCK_SERVER", state.url)
        monkeypatch.setenv("LORADOCK_API_KEY", KEY)
        yield state


def light(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _LIGHT, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["push", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _LOADED, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    code, loaded = json.loads(ran.stderr.splitlines()[-1])
    assert code == 0
    assert [name for name in HEAVY if name in loaded] == []


def test_help_takes_less_than_a_second_of_a_processor() -> None:
    printed = require_cheap([sys.executable, "-m", "loradock_adapters.cli", "--help"], most_s=1.0)
    for command_name in ("push", "ls", "show", "rm", "rollback", "pin", "unpin", "inspect", "train", "serve", "plan"):
        assert f" {command_name} " in printed


def test_wrong_usage_is_exit_code_2_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["push"], ["push", "only-a-path"], ["rollback", "sql", "zero"], ["ls", "--wrong"]):
        assert run(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Usage" in captured.err


def test_version_is_printed_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("loradock ")


def test_push_prints_data_on_stdout_and_the_rest_on_stderr(
    server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(write_adapter(tmp_path)), "sql"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"sql@1  shared  {server.versions['sql'][0]}\n"
    assert "base_name" in captured.err
    assert "look" in captured.err
    assert " s\n" in captured.err
    assert run(["push", str(tmp_path), "sql"]) == 0
    assert "nothing was changed" in capsys.readouterr().err


def test_push_json_is_one_document(server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["push", str(write_adapter(tmp_path)), "sql", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], document["placement"]) == (1, "shared")


def test_flags_win_over_the_environment(
    server: State, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORADOCK_SERVER", "http://127.0.0.1:1")
    monkeypatch.setenv("LORADOCK_API_KEY", "wrong")
    assert run(["ls", "--server", server.url, "--api-key", KEY]) == 0
    assert capsys.readouterr().out.startswith("NAME  VERSION")


def test_wrong_key_fails_without_a_traceback(
    server: State, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORADOCK_API_KEY", "wrong")
    assert run(["ls"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no: invalid_api_key (set LORADOCK_API_KEY or --api-key)\n"


def test_push_of_a_broken_directory_prints_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    (tmp_path / "loradock.json").write_text("[]")
    assert run(["push", str(tmp_path), "sql"]) == 1
    error = capsys.readouterr().err
    assert "error: refused, 2 problems" in error
    assert "- pickle_refused: adapter_model.bin: " in error
    assert "- passport_invalid: " in error
    assert "safe_serialization=True" in error


def test_push_that_the_server_refuses_prints_every_problem_once(
    server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"code": "alora", "message": "not served"}, {"code": "rank", "message": "no number", "fix": "say one"}]
    server.answer = (422, {"error": {"message": "not served; no number", "code": "refused", "problems": found}})
    assert run(["push", str(write_adapter(tmp_path)), "sql"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [
        "error: refused, 2 problems",
        "- alora: not served",
        "    train a plain LoRA",
        "- rank: no number",
        "    say one",
    ]


RESIDENCY = {
    "place": "slot",
    "pin": {"state": "held", "waits_for": None},
    "hits": 41,
    "misses": 1,
    "last_used_at": "2026-01-02T03:04:05.678+00:00",
    "loads": 2,
    "last_load_seconds": 0.2512,
    "activations": 3,
    "slot_evictions": 2,
    "cpu_evictions": 1,
}


def test_show_says_where_the_adapter_is_and_how_it_got_there(
    server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["push", str(write_adapter(tmp_path)), "sql"])
    capsys.readouterr()
    server.residency = RESIDENCY
    assert run(["show", "sql"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "residency:       in a slot of the engine; pinned",
        "last used:       2026-01-02 03:04:05",
        "requests:        41 found it loaded, 1 waited for its load",
        "loads:           2, the last in 0.251 s; evicted from host memory 1 times",
        "slots:           written 3 times, evicted 2 times",
    ):
        assert line in shown
    pin = {"state": "waiting", "waits_for": "the engine is starting"}
    server.residency = RESIDENCY | {"place": "disk", "pin": pin, "last_used_at": None}
    run(["show", "sql"])
    shown = capsys.readouterr().out
    assert "on the server's disk; pinned, but waits: the engine is starting\n" in shown
    assert "not since the server started" in shown


def test_pin_and_unpin_say_what_became_of_it(server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["push", str(write_adapter(tmp_path)), "sql"])
    capsys.readouterr()
    server.residency = RESIDENCY | {"pin": {"state": "waiting", "waits_for": "requests use all slots"}}
    assert run(["pin", "sql"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"sql@1  pinned  {server.versions['sql'][0]}\n"
    assert captured.err == "not in its slot yet: requests use all slots\n"
    run(["ls"])
    assert "slot*" in capsys.readouterr().out
    assert [run(["unpin", "sql"]), run(["unpin", "sql"])] == [0, 0]
    assert capsys.readouterr().err == "unpinned sql\nsql was not pinned\n"
    assert run(["pin", "sql", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pinned"] is True


def test_push_bad_name_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["push", str(write_adapter(tmp_path)), "base"]) == 2
    assert "reserved" in capsys.readouterr().err


def test_ls_show_rollback_and_rm(server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        run(["push", str(write_adapter(tmp_path / str(seed), seed=seed)), "sql"])
    capsys.readouterr()
    assert run(["ls"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "VERSION", "TAGS", "KIND", "PLACEMENT", "STATE", "WHERE", "SIZE", "CREATED"]
    assert row.split() == ["sql", "2", "lora", "shared", "ready", "1.2", "kB", "2026-01-02", "03:04:05"]
    assert run(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["current_version"] == 2
    assert run(["rollback", "sql", "1"]) == 0
    assert capsys.readouterr().out.startswith("sql@1  sha256:")
    assert run(["show", "sql"]) == 0
    shown = capsys.readouterr().out
    assert "current_version: 1" in shown
    assert "1*" in shown
    assert run(["show", "sql", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["versions"]) == 2
    assert run(["rm", "sql"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["show", "sql"]) == 1
    assert "model_not_found" in capsys.readouterr().err


def test_text_from_the_server_cannot_drive_the_terminal(
    server: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07[red]\r\nx"
    server.answer = (422, {"error": {"message": evil, "problems": [{"code": "c", "message": evil, "fix": evil}]}})
    assert run(["push", str(write_adapter(tmp_path)), "sql"]) == 1
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\x07" not in error
    assert "\r" not in error
    assert "[red]" in error


def test_inspect_prints_the_verdict_and_fails_when_it_is_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = write_adapter(tmp_path / "adapter", rank=12), tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", LLAMA)
    assert run(["inspect", str(adapter), "--base", str(base)]) == 0
    assert "placement:      shared" in capsys.readouterr().out
    assert run(["inspect", str(adapter), "--base", str(base), "--max-lora-rank", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["placement"], document["rank"], document["tensors"]) == ("dedicated", 12, 8)
    assert document["reasons"][0]["code"] == "rank_over_limit"
    write_json(base / "config.json", {**LLAMA, "hidden_size": 32})
    assert run(["inspect", str(adapter), "--base", str(base)]) == 1
    assert "shape_mismatch" in capsys.readouterr().out


def test_inspect_what_is_not_there_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "none")]) == 1
    assert "is not a directory" in capsys.readouterr().err
    assert run(["inspect", str(write_adapter(tmp_path)), "--base", "org/none"]) == 1
    assert "no base model" in capsys.readouterr().err


def test_light_client_can_do_everything(server: State, tmp_path: Path) -> None:
    adapter, full = write_adapter(tmp_path / "adapter"), write_full(tmp_path / "base")
    for arguments in (
        ["push", str(adapter), "sql"],
        ["ls"],
        ["ls", "--json"],
        ["show", "sql"],
        ["rollback", "sql", "1"],
        ["inspect", str(adapter), "--base", str(full)],
        ["inspect", str(full)],
        ["rm", "sql"],
    ):
        ran = light(*arguments)
        assert ran.returncode == 0, (arguments, ran.stderr)


def test_light_client_scans_values_without_numpy(tmp_path: Path) -> None:
    tensors = {name: f32(*tensor[1], value=float("nan")) for name, tensor in lora_tensors().items()}
    ran = light("inspect", str(write_adapter(tmp_path, tensors)), "--json")
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["reasons"][0]["code"] == "not_finite"


def test_command_whose_packages_are_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("loradock_train.commands.probe")

    def probe() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    module.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = [
        EntryPoint("probe", "loradock_train.commands.probe:probe", GROUP),
        EntryPoint("gone", "loradock_serve.commands.gone:gone", GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: found)
    assert run(["probe"]) == 1
    assert "pip install 'loradock[train]'" in capsys.readouterr().err
    assert run(["gone"]) == 1
    assert "pip install 'loradock[serve]'" in capsys.readouterr().err
    assert run(["--help"]) == 0


def test_fault_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("elsewhere.probe")

    def probe() -> None:
        raise ModuleNotFoundError("No module named 'typo'", name="typo")

    module.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("probe", "elsewhere.probe:probe", GROUP)])
    with pytest.raises(ModuleNotFoundError, match="typo"):
        run(["probe"])


def test_installed_command_ends_with_the_exit_code(tmp_path: Path) -> None:
    environment = {**os.environ, "LORADOCK_SERVER": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "loradock_adapters.cli", "ls"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Traceback" not in ran.stderr
