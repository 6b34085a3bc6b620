"""`loradock train`: data on stdout, the rest on stderr, and nothing heavy before it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_train.commands.train import train

app = typer.Typer()
app.command()(train)

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(4)]


@pytest.fixture
def config(base: Path, tmp_path: Path, write_rows: WriteRows) -> Path:
    write_rows("rows.jsonl", ROWS)
    path = tmp_path / "lora.yaml"
    path.write_text(
        f"model_id: {base}\ntrain_path: rows.jsonl\ncontext_length: 64\nmax_steps: 2\nlearning_rate: 1e-2\n"
        "mixed_precision: 'no'\nlora_config: {r: 2}\n"
    )
    return path


def test_command_prints_the_checkpoint_and_nothing_else_on_stdout(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(config), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "run" / "checkpoint")
    assert "parameters trained" in result.stderr


def test_command_json_is_one_document(config: Path, tmp_path: Path) -> None:
    arguments = [
        str(config),
        "--json",
        "--set",
        "lora_config.r=4",
        "--set",
        "seed=7",
        "--output",
        str(tmp_path / "run"),
    ]
    summary = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert summary["kind"] == "lora"
    assert summary == json.loads((tmp_path / "run" / "run.json").read_text())


def test_run_goes_below_the_working_directory_by_default(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, [str(config)]).exit_code == 0
    assert (tmp_path / "runs" / "lora" / "run.json").is_file()


def test_config_error_reaches_the_caller_as_a_usage_error(config: Path) -> None:
    result = CliRunner().invoke(app, [str(config), "--set", "sed=1"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2


def test_command_and_config_import_without_torch() -> None:
    code = (
        "import sys, loradock_train, loradock_train.commands.train, loradock_train.config_file\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_package_names_what_it_offers() -> None:
    import loradock_train

    assert all(hasattr(loradock_train, name) for name in loradock_train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = loradock_train.trian
