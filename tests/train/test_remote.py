"""A base from an object store, and a finished run copied to one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import typer
from typer.testing import CliRunner

from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_testing.s3_server import environment, s3_server
from loradock_train import train
from loradock_train.check import check
from loradock_train.check_write import write_rewritten
from loradock_train.commands.data import data
from loradock_train.errors import ModelError, OutputError
from loradock_train.planning import plan_of_config

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(4)]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    with s3_server() as server, environment({**server.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}):
        fsspec.filesystem("s3").clear_instance_cache()
        yield server.new_bucket()


def options(**values: Any) -> dict[str, Any]:
    return {"context_length": 64, "learning_rate": 1e-2, "max_steps": 1, "lora_config": {"r": 2}, **values}


def test_run_from_s3_to_s3_is_whole_there_and_is_not_replaced(
    bucket: str, base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    store = fsspec.filesystem("s3")
    store.put(str(base), f"{bucket}/base", recursive=True)
    store.put_file(str(write_rows("rows.jsonl", ROWS)), f"{bucket}/rows.jsonl")
    chosen = options(model_id=f"{bucket}/base", train_path=f"{bucket}/rows.jsonl", output_dir=f"{bucket}/out")
    run = train(chosen, output=tmp_path / "run")
    for name in ("run.json", "config.yaml", "checkpoint/adapter_model.safetensors", "checkpoint/loradock.json"):
        assert store.cat_file(f"{bucket}/out/{name}") == (run.directory / name).read_bytes()
    assert "test-secret-key" not in (run.directory / "run.json").read_text()
    with pytest.raises(OutputError, match="already holds a run; give another output_dir, or --overwrite"):
        train(chosen, output=tmp_path / "again")
    with pytest.raises(ModelError, match="gone holds no file"):
        train({**chosen, "model_id": f"{bucket}/gone", "output_dir": None}, output=tmp_path / "again")


@pytest.mark.parametrize(
    ("values", "output", "message"),
    [
        ({"output_dir": "ftp://me:secret@host/runs"}, "run", "a URL with a login in it"),
        ({"output_dir": "nowhere://runs"}, "run", r"nothing installed reads nowhere://"),
        ({}, "s3://bucket/run", "give the URL as output_dir"),
    ],
)
def test_place_that_cannot_be_written_is_refused_first(
    base: Path, write_rows: WriteRows, values: dict[str, str], output: str, message: str
) -> None:
    chosen = options(model_id=str(base), train_path=str(write_rows("rows.jsonl", ROWS)), **values)
    with pytest.raises(UsageError, match=message) as caught:
        train(chosen, output=output)
    assert "secret" not in str(caught.value)


@pytest.fixture
def far_config(base: Path, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run on a base in fsspec's own memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(base), "/far/base", recursive=True)
    write_rows("rows.jsonl", ROWS)
    path = tmp_path / "lora.yaml"
    path.write_text(
        "model_id: memory://far/base  # far away\ntrain_path: rows.jsonl\ncontext_length: 64\nmax_steps: 2\n"
        "lora_config: {r: 2, modules_to_save: [lm_head]}\n"
    )
    return path


def test_data_of_a_base_at_a_url_is_shown_without_fetching_its_weights(far_config: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(data)
    result = CliRunner().invoke(app, [str(far_config), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["train"]["num_rows"] == len(ROWS)
    assert "memory://far/base was copied, without its weights, to" in result.stderr.replace("\n", " ")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_check_and_plan_fetch_a_base_at_a_url_and_the_config_keeps_the_url(far_config: Path, tmp_path: Path) -> None:
    report = check(far_config)
    assert not report.problems
    assert report.exit_code == 1  # judged: modules_to_save would not be hot-swapped
    assert any(notice.startswith("model_id: memory://far/base was copied to") for notice in report.notices)
    assert write_rewritten(far_config, [], report, tmp_path / "fixed.yaml") == []
    assert "model_id: memory://far/base  # far away" in (tmp_path / "fixed.yaml").read_text()
    plan = plan_of_config(tmp_path / "fixed.yaml")
    assert plan.measured is not None
    assert plan.peak_bytes


def test_check_of_a_base_at_a_url_that_holds_nothing_is_a_problem_of_the_config(far_config: Path) -> None:
    report = check(far_config, ["model_id=memory://far/gone"])
    assert [str(problem) for problem in report.problems] == [
        "model: model_id: memory://far/gone holds no file, or this login may not see it"
    ]
    assert report.exit_code == 2
