"""`--resume` on a run that is finished: nothing to do with its own config, refused with another one."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loradock_adapters.cli import run as loradock
from loradock_testing.rows import WriteRows
from loradock_testing.worlds import run_worlds
from loradock_train import train
from loradock_train.commands.train import train as train_command
from loradock_train.errors import OutputError, ResumeError

app = typer.Typer()
app.command()(train_command)
ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def options(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model_id": str(base), "train_path": str(data), "context_length": 64, "learning_rate": 1e-2,
        "mixed_precision": "no", "max_steps": 2, "lora_config": {"r": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(options, output=tmp_path_factory.mktemp("finished") / "run").directory


def contents(run: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()}


def test_command_says_where_the_checkpoint_lies_and_exits_with_0(
    options: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    before = contents(run)
    config = tmp_path / "lora.yaml"
    config.write_text(json.dumps(options))
    for _ in range(2):
        result = CliRunner().invoke(app, [str(config), "--output", str(run), "--resume"])
        assert (result.exit_code, result.stdout.strip()) == (0, str(run / "checkpoint"))
        told = " ".join(result.stderr.split())
        assert f"the run in {run} is finished, at step 2: nothing is left to do" in told
        assert f"its checkpoint: {run / 'checkpoint'}" in told
        assert "parameters trained" not in told
    assert contents(run) == before
    document = json.loads(CliRunner().invoke(app, [str(config), "--output", str(run), "--resume", "--json"]).stdout)
    assert document == json.loads((run / "run.json").read_text())


def test_run_is_returned_from_python(options: dict[str, Any], run: Path) -> None:
    found = train(options, output=run, resume=True)
    assert found.summary == json.loads((run / "run.json").read_text())
    assert (found.kind, found.checkpoint) == ("lora", run / "checkpoint")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"learning_rate": 2e-2}, "learning_rate: 0.01 when the run began, 0.02 now"),
        ({"max_steps": 4}, "max_steps: 2 when the run began, 4 now"),
        ({"lora_config": {"r": 4}}, 'lora_config: {"r": 2'),
        ({"adapter_path": "RUN"}, "adapter_path: None when the run began"),
        ({"train_path": "OTHER"}, "train_path: elsewhere than when the run began, and not the same data"),
        ({"train_path": "BROKEN"}, "train_path: elsewhere than when the run began, and not the same data"),
        ({"valid_path": "OTHER"}, "valid_path: elsewhere"),
    ],
)
def test_other_config_is_refused_with_its_keys(
    options: dict[str, Any], run: Path, changed: dict[str, Any], told: str, write_rows: WriteRows
) -> None:
    before = contents(run)
    broken = write_rows("broken.jsonl", [{"prompt": 1}])
    stands_for = {"OTHER": str(write_rows("other.jsonl", ROWS[:-1])), "RUN": str(run), "BROKEN": str(broken)}
    values = {key: stands_for.get(value, value) if isinstance(value, str) else value for key, value in changed.items()}
    with pytest.raises(ResumeError, match="holds a finished run that is not this one") as caught:
        train({**options, **values}, output=run, resume=True)
    assert caught.value.exit_code == 2
    assert any(told in str(problem) for problem in caught.value.problems), caught.value
    assert str(run / "checkpoint") in str(caught.value)
    assert contents(run) == before


def test_command_exits_with_2_where_the_config_differs(options: dict[str, Any], run: Path, tmp_path: Path) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text(json.dumps(options))
    assert loradock(["train", str(config), "--output", str(run), "--resume", "--set", "seed=1"]) == 2


def test_same_data_elsewhere_and_free_keys_are_the_same_run(
    options: dict[str, Any], run: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {"prompts": ["def"], "every_steps": 1}
    free = {"train_path": str(write_rows("moved.jsonl", ROWS)), "save_steps": 1, "keep": 3, "samples": samples}
    train({**options, **free}, output=run, resume=True)
    told = " ".join(capsys.readouterr().err.split())
    assert "note: samples: changed since, and without effect on a finished run" in told


def test_run_without_resume_is_refused_as_ever(options: dict[str, Any], run: Path) -> None:
    with pytest.raises(OutputError, match="already holds a run"):
        train(options, output=run)


def test_run_whose_files_are_damaged_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    train(options, output=tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ResumeError, match="holds a finished run that cannot be read"):
        train(options, output=tmp_path / "run", resume=True)


def test_every_process_of_several_finds_the_run_finished(options: dict[str, Any], tmp_path: Path) -> None:
    leg = {"config": {**options, "train_batch_size_per_device": 2}, "output": str(tmp_path / "run")}
    endings = run_worlds([
        {**leg, "processes": 2}, {**leg, "processes": 2, "resume": True}, {**leg, "processes": 1, "resume": True}
    ])  # fmt: skip
    assert [[each["code"] == 0 for each in leg] for leg in endings] == [[True, True], [True, True], [False]], endings
    assert "num_devices: 2 processes when the run began, 1 now" in json.dumps(endings[2])


def test_sweep_is_finished_adapter_by_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    swept = {**options, "sweep": [{"name": "a"}, {"name": "b", "r": 4}]}
    first = train(swept, output=tmp_path / "sweep")
    before = (tmp_path / "sweep" / "a" / "run.json").read_bytes()
    assert train(swept, output=tmp_path / "sweep", resume=True).summary == first.summary
    assert (tmp_path / "sweep" / "a" / "run.json").read_bytes() == before
    with pytest.raises(ResumeError, match=r"sweep/a holds a finished run that is not this one"):
        train({**swept, "learning_rate": 2e-2}, output=tmp_path / "sweep", resume=True)
