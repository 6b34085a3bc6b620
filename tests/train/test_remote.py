"""A base from an object store, and a finished run copied to one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_testing.s3_server import environment, s3_server
from loradock_train import train
from loradock_train.errors import ModelError, OutputError

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
