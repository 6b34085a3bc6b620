"""Finished runs side by side: what is shown, what is left out, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from loradock_adapters.cli import run as command
from loradock_adapters.errors import UsageError
from loradock_train.comparison import compare, read_run
from loradock_train.comparison_plot import panels

LORA = {"lora_config": {"r": 8, "use_dora": False, "use_rslora": False}}


def finished(directory: Path, *, config: dict[str, Any] | None = None, **summary: Any) -> Path:
    """A run directory as `loradock train` leaves it, with the figures of the seed's table."""
    directory.mkdir(parents=True)
    known = {
        "kind": "lora", "base": "org/base", "device": "RTX A6000", "epochs": 3.0, "steps": 177, "learning_rate": 1e-5,
        "train_seconds": 1431.0, "peak_memory_bytes": 46_000_000_000, "checkpoint_bytes": 46_178_304,
        "parameters": {"trainable": 23_326_720, "total": 8_426_103_024, "share": 0.002768},
        "final_eval_loss": 0.627, "data_sha256": {"train": "a" * 64, "valid": "b" * 64},
    }  # fmt: skip
    values = {"train_batch_size_per_device": 14, "gradient_accumulation_steps": 1, "seed": 42, "context_length": 512}
    (directory / "config.yaml").write_text(yaml.safe_dump(values | LORA | (config or {})))
    (directory / "run.json").write_text(json.dumps(known | summary))
    return directory


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    score = {"metric": "similarity", "value": 0.037, "best": "low"}
    return finished(tmp_path / "lora", score=score, cost={"price": 0.302, "energy_wh": None})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return finished(
        tmp_path / "full",
        config={"lora_config": None, "train_batch_size_per_device": 5, "gradient_accumulation_steps": 2},
        kind="full",
        device="A100",
        train_seconds=3200.0,
        checkpoint_bytes=16_805_552_608,
        parameters={"trainable": 7_722_237_952, "total": 8_402_776_304, "share": 0.91901},
        score={"metric": "similarity", "value": 0.031, "best": "low"},
        final_eval_loss=None,
    )


def table_of(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_table_is_the_seeds_with_what_the_runs_measured(lora: Path, full: Path) -> None:
    text = compare([lora, full]).markdown()
    rows = table_of(text)
    assert rows[0] == {
        "run": "lora", "approach": "LoRA r=8", "devices": "RTX A6000 x1", "epochs": "3", "batch size": "14",
        "learning rate": "1e-05", "training time": "23:51 min", "peak memory": "46.00 GB", "checkpoint": "46.18 MB",
        "trained parameters": "23,326,720 (0.2768%)", "similarity (best is low)": "0.037", "eval loss": "0.6270",
        "perplexity": "1.872", "cost": "0.302",
    }  # fmt: skip
    assert (rows[1]["approach"], rows[1]["batch size"], rows[1]["training time"]) == (
        "full-parameter",
        "10",
        "53:20 min",
    )
    assert (rows[1]["eval loss"], rows[1]["cost"]) == ("–", "–")
    assert "full against lora: checkpoint 363.9x, training time 2.2x, peak memory 1.0x" in text
    assert "Note: different device: lora RTX A6000 x1, full A100 x1" in text


def test_columns_that_no_run_can_fill_are_left_out(lora: Path, full: Path) -> None:
    assert {"energy", "push to first token"}.isdisjoint(table_of(compare([lora, full]).markdown())[0])


def test_push_to_first_token_comes_from_the_file_that_push_left(lora: Path, full: Path) -> None:
    (lora / "push.json").write_text('{"first_token_s": 0.4237}')
    rows = table_of(compare([lora, full]).markdown())
    assert [row["push to first token"] for row in rows] == ["0.42 s", "–"]


def test_several_devices_multiply_the_batch(tmp_path: Path, lora: Path) -> None:
    many = finished(tmp_path / "many", config={"gradient_accumulation_steps": 3}, num_devices=4)
    row = table_of(compare([lora, many]).markdown())[1]
    assert (row["devices"], row["batch size"]) == ("RTX A6000 x4", "168")


def test_approaches_have_the_names_people_use(tmp_path: Path) -> None:
    def approach(name: str, **config: Any) -> str:
        return read_run(finished(tmp_path / name, config=config)).approach

    assert approach("dora", lora_config={"r": 4, "use_dora": True}) == "DoRA r=4"
    assert (
        approach("qrs", lora_config={"r": 64, "use_rslora": True}, quantisation={"load_in": "4bit"}) == "QrsLoRA r=64"
    )
    assert approach("selective", lora_config=None, trainable=["proj"]) == "full, selected modules"
    assert read_run(finished(tmp_path / "scratch", kind="scratch")).approach == "from scratch"


def test_runs_of_different_data_are_refused_with_both_hashes(lora: Path, tmp_path: Path) -> None:
    other = finished(tmp_path / "other", data_sha256={"train": "c" * 64})
    with pytest.raises(UsageError) as error:
        compare([lora, other])
    assert "different train data (sha256): lora aaaaaaaaaaaa, other cccccccccccc" in str(error.value)
    assert "different valid data (sha256): lora bbbbbbbbbbbb, other none" in str(error.value)
    assert "--force" in str(error.value)


def test_force_compares_them_all_the_same_and_says_what_differs(lora: Path, tmp_path: Path) -> None:
    other = finished(tmp_path / "other", data_sha256={"train": "c" * 64, "valid": "b" * 64}, base="org/other")
    text = compare([lora, other], force=True).markdown()
    assert "Note: different train data" in text
    assert "Note: different base: lora org/base, other org/other" in text
    assert "valid data" not in text


def test_scores_of_different_metrics_are_named_in_their_cells(lora: Path, tmp_path: Path) -> None:
    other = finished(tmp_path / "other", score={"metric": "accuracy", "value": 0.9, "best": "high"})
    text = compare([lora, other]).markdown()
    assert [row["score"] for row in table_of(text)] == ["similarity 0.037", "accuracy 0.900"]
    assert "different scores" in text


def test_unfinished_run_is_refused_with_what_to_do(lora: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    (stopped / "saves" / "step-00000120").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"stopped is not finished \(saved at step 120\).*--resume"):
        compare([lora, stopped])
    with pytest.raises(UsageError, match=r"no such run: .*nowhere"):
        compare([lora, tmp_path / "nowhere"])
    with pytest.raises(UsageError, match=r"holds no run of `loradock train`: there is no run\.json"):
        compare([lora, tmp_path])
    with pytest.raises(UsageError, match="two runs or more"):
        compare([lora])


def test_run_of_an_unknown_shape_is_refused_and_not_a_traceback(lora: Path, tmp_path: Path) -> None:
    odd = finished(tmp_path / "odd", parameters=None)
    with pytest.raises(UsageError, match="not a run that this version can read"):
        compare([lora, odd])


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    runs = [finished(tmp_path / folder / "lora") for folder in ("a", "b")]
    assert [row["run"] for row in table_of(compare(runs).markdown())] == [str(run) for run in runs]


def test_older_runs_are_compared_by_their_passports(lora: Path, tmp_path: Path) -> None:
    older = finished(tmp_path / "older", data_sha256=None)
    (older / "checkpoint").mkdir()
    (older / "checkpoint" / "loradock.json").write_text(json.dumps({"data_sha256": "a" * 64}))
    with pytest.raises(UsageError) as error:
        compare([lora, older])
    assert "train" not in str(error.value).split("\n")[1]


def test_command_prints_markdown_or_json_and_draws(
    lora: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["compare", str(lora), str(full), "--plot", str(tmp_path / "runs.png")]) == 0
    printed = capsys.readouterr()
    assert printed.out == compare([lora, full]).markdown()
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert command(["compare", str(lora), str(full), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["score"] for run in document["runs"]] == [0.037, 0.031]
    assert command(["compare", str(lora), str(tmp_path)]) == 2


def test_picture_has_a_panel_for_each_figure_that_is_known(lora: Path, full: Path) -> None:
    drawn = dict(panels(compare([lora, full]).runs))
    assert drawn["similarity (score)"] == [0.037, 0.031]
    assert drawn["cost"] == [0.302, None]
    assert "energy (Wh)" not in drawn
