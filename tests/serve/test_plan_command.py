"""`loradock plan`: from files, and from a server."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradock_adapters.cli import run
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Registry
from loradock_serve import engine_command
from loradock_serve.engine_command import Machine
from loradock_testing.adapters_server import KEY, adapters_server
from loradock_testing.tiny_checkpoints import write_base

GIB = 1024**3


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine_command, "this_machine", lambda: Machine("cpu", 8 * GIB, (0,)))
    yield
    logging.getLogger("alembic").setLevel(logging.NOTSET)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    path = tmp_path / "serve.yaml"
    path.write_text("base: base\ndata_dir: data\n")
    return path


def publish(data_dir: Path, rank: int) -> None:
    data_dir.mkdir()
    registry = Registry(f"sqlite:///{data_dir / 'registry.sqlite'}")
    manifest = Manifest((FileEntry("adapter_config.json", 10**6, "0" * 64),))
    registry.publish("sql", manifest, Verdict("lora", "shared", (), rank))
    registry.close()


def test_plan_without_a_registry_makes_none(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(settings)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["SETTING", "VALUE", "COST", "WHY"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["engine.max_loras", "64"],
        ["engine.max_cpu_loras", "256"],
        ["engine.max_lora_rank", "64"],
    ]
    assert "nothing is published: room for what is usual" in lines[3]
    assert not (settings.parent / "data").exists()


def test_plan_looks_at_the_registry_and_its_json_has_the_reasons(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(settings.parent / "data", 100)
    assert run(["plan", "--json", str(settings)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["max_lora_rank"] == 128
    assert document["plan"]["reasons"]["max_lora_rank"] == "the largest rank of a published adapter is 100"
    assert document["running"] is None


def test_flags_go_over_the_file(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "other", 100)
    assert run(["plan", str(settings), "--data-dir", str(tmp_path / "other")]) == 0
    assert "128" in capsys.readouterr().out


def test_base_without_adapters_has_no_plan(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings.parent / "base" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    assert run(["plan", str(settings)]) == 0
    assert "every model gets an engine of its own" in capsys.readouterr().out


def test_plan_of_a_server_shows_what_runs_beside_it(
    capsys: pytest.CaptureFixture[str], settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORADOCK_API_KEY", KEY)
    run(["plan", "--json", str(settings)])
    plan = json.loads(capsys.readouterr().out)["plan"]
    with adapters_server() as server:
        server.plan = {"plan": plan | {"max_loras": 99, "notes": ["look out"]}, "running": plan}
        assert run(["plan", "--server", server.url]) == 0
        captured = capsys.readouterr()
        monkeypatch.setenv("LORADOCK_SERVER", server.url)
        assert run(["plan"]) == 0
        assert capsys.readouterr() == captured
        assert run(["plan", str(settings)]) == 0
        assert "NOW" not in capsys.readouterr().out, "a file is about files"
    assert captured.out.splitlines()[0].split() == ["SETTING", "VALUE", "NOW", "COST", "WHY"]
    assert captured.out.splitlines()[1].split()[:3] == ["engine.max_loras", "99", "64"]
    assert captured.err == "- look out\n"


def test_server_and_files_at_once_is_wrong_usage(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--server", "http://127.0.0.1:1", str(settings)]) == 2
    assert "leave the file" in capsys.readouterr().err


def test_plan_refuses_what_the_machine_does_not_have(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with settings.open("a") as file:
        file.write("engine: {cpu_cores: 0-3, kv_cache_gib: 1000.0, max_loras: 100000000}\n")
    assert run(["plan", str(settings)]) == 2
    said = capsys.readouterr().err
    assert "names core 1-3" in said
    assert "1000 GiB are not there: this machine has 8.0 GiB" in said
    assert "engine.max_loras: 100000000 slots" in said
