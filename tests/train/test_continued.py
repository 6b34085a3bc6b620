"""Going on from an adapter: it begins where that ended, and only where base and shape are the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_llama
from loradock_train import train
from loradock_train.config_file import config_from
from loradock_train.errors import ConfigError, ModelError, ProofError, ResumeError
from loradock_train.run import Run

ROWS = [{"prompt": f"say {word}", "completion": f" {word}"} for word in ("red", "blue", "green", "grey")]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def first(base: Path, tmp_path: Path, write_rows: WriteRows) -> Run:
    return train(options(base, write_rows, lora_config=LORA), output=tmp_path / "first")


def options(base: Path, write_rows: WriteRows, **values: Any) -> dict[str, Any]:
    return {
        "model_id": str(base),
        "train_path": str(write_rows("rows.jsonl", ROWS)),
        "valid_path": str(write_rows("rows.jsonl", ROWS)),
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "context_length": 64,
        "max_steps": 6,
        "eval_steps": 1,
        **values,
    }


def losses(run: Run) -> list[float]:
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_training_goes_on_where_the_adapter_ended(
    base: Path, tmp_path: Path, write_rows: WriteRows, first: Run
) -> None:
    again = train(
        options(base, write_rows, adapter_path=str(first.directory), learning_rate=1e-6), output=tmp_path / "again"
    )
    assert losses(again)[0] == pytest.approx(losses(first)[-1], abs=1e-3)
    assert losses(first)[0] > losses(first)[-1] + 0.1
    config = json.loads((again.checkpoint / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["down_proj", "q_proj"])
    before, after = (load_file(run.checkpoint / "adapter_model.safetensors") for run in (first, again))
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-4
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "adapter_path" not in first.summary["proof"]
    assert 0 < again.summary["proof"]["adapter_path"] < 1e-2 < again.summary["proof"]["base"]


@pytest.mark.parametrize(
    ("rate", "dtype", "reason"),
    [
        (1e-30, "float32", "raise learning_rate or the number of steps"),
        (1e-9, "bfloat16", "what it learnt is less than bfloat16 can hold: save_dtype: float32, or more"),
    ],
)
def test_continued_run_that_changed_nothing_fails_and_leaves_no_checkpoint(
    base: Path, tmp_path: Path, write_rows: WriteRows, rate: float, dtype: str, reason: str
) -> None:
    start = train(options(base, write_rows, lora_config=LORA, save_dtype=dtype), output=tmp_path / "start")
    values = options(base, write_rows, adapter_path=str(start.directory), learning_rate=rate, save_dtype=dtype)
    with pytest.raises(ProofError, match="exactly like the adapter that it went on from") as caught:
        train(values, output=tmp_path / "again")
    assert reason in str(caught.value)
    assert not (tmp_path / "again" / "checkpoint").exists()


def test_keys_that_contradict_the_adapter_are_refused_all_at_once(
    base: Path, write_rows: WriteRows, first: Run
) -> None:
    lora = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_dropout": 0.3}
    with pytest.raises(ConfigError) as caught:
        config_from(options(base, write_rows, adapter_path=str(first.checkpoint), lora_config=lora), folder=Path())
    assert [str(problem) for problem in caught.value.problems] == [
        "lora_config.r: 8, but the adapter of adapter_path has 4",
        "lora_config.target_modules: q_proj, but the adapter of adapter_path has down_proj, q_proj",
    ]


def test_keys_that_agree_and_another_dropout_are_taken(base: Path, write_rows: WriteRows, first: Run) -> None:
    lora = {"r": 4, "target_modules": ["down_proj", "q_proj"], "lora_dropout": 0.3}
    values = options(base, write_rows, adapter_path=str(first.checkpoint), lora_config=lora)
    config, _ = config_from(values, folder=Path())
    assert config.lora_config is not None
    assert (config.lora_config.r, config.lora_config.lora_alpha, config.lora_config.lora_dropout) == (4, 8, 0.3)


def test_adapter_of_another_base_is_refused(tmp_path: Path, write_rows: WriteRows, first: Run) -> None:
    other = make_llama(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=r"adapter_path: it was trained on .* \(weights .*…\), not on model_id"):
        train(options(other, write_rows, adapter_path=str(first.directory)), output=tmp_path / "run")


def test_adapter_without_passport_is_taken_with_a_notice(
    base: Path, tmp_path: Path, write_rows: WriteRows, first: Run
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(first.checkpoint, bare)
    (bare / "loradock.json").unlink()
    run = train(options(base, write_rows, adapter_path=str(bare)), output=tmp_path / "run")
    assert any("nothing says which base" in notice for notice in run.summary["notices"])


def test_folder_without_an_adapter_is_named(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    with pytest.raises(ConfigError, match=r"adapter_path: no adapter_config\.json in"):
        config_from(options(base, write_rows, adapter_path=str(tmp_path)), folder=Path())


def test_keys_of_the_hosted_trainer_are_read_in_our_words(base: Path, write_rows: WriteRows, first: Run) -> None:
    values = options(base, write_rows, initial_adapter_model_ckpt_path=str(first.checkpoint))
    values |= {"model_id": "org/model", "initial_base_model_ckpt_path": str(base)}
    config, notices = config_from(values, folder=Path())
    assert (config.model_id, config.adapter_path) == (str(base.resolve()), str(first.checkpoint.resolve()))
    assert any("in place of org/model" in notice for notice in notices)


def test_adapter_that_changed_meanwhile_is_not_resumed_with(base: Path, write_rows: WriteRows, first: Run) -> None:
    from loradock_train.saves import Position, Save, check_same, identity_of

    config, _ = config_from(options(base, write_rows, adapter_path=str(first.checkpoint)), folder=Path())
    then = identity_of(config, {}, None, {})
    weights = first.checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    save = Save(Path("s"), Position(1, 1, 1.0, 0.0, 1, []), then)
    with pytest.raises(ResumeError, match=r"adapter_path: adapter_model.safetensors has changed"):
        check_same(save, identity_of(config, {}, None, {}))
