"""A model divided over two processes: divided indeed, trained as the whole one, saved and exported as the whole one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loradock_testing.rows import WriteRows
from loradock_testing.worlds import run_worlds
from loradock_train import train
from loradock_train.config import TrainConfig
from loradock_train.errors import ModelError
from loradock_train.shard import check_shardable

ROWS = [
    {"prompt": f"def f{i}(x" + "y" * (i % 5) + "):", "completion": f" return {i}" + " + x" * (i % 4)} for i in range(13)
]
COMMON: dict[str, Any] = {
    "context_length": 64,
    "mixed_precision": "no",
    "num_epochs": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_steps": 1,
    "max_grad_norm": 0.5,  # below what the gradients have: a wrong norm changes every step
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2, "lora_config": {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]}},
}
LOSS_TOLERANCE = 1e-4
"""Relative: sums of float32 in another order."""


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind: `whole` in one process; `divided` in two; `killed` likewise, killed and gone on with."""
    folder = tmp_path_factory.mktemp("shards")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    legs: list[dict[str, Any]] = []
    for kind, extra in KINDS.items():
        config = {**COMMON, **extra, "model_id": str(base), "train_path": str(data), "valid_path": str(data)}
        divided = {"config": {**config, "train_batch_size_per_device": 1, "fsdp": {}}, "processes": 2}
        whole = {**config, "train_batch_size_per_device": 2}
        legs += [
            {"config": whole, "processes": 1, "output": str(folder / f"{kind}-whole")},
            {**divided, "output": str(folder / f"{kind}-divided"), "spy": True},
            {**divided, "output": str(folder / f"{kind}-killed"), "die": {"1": 8}},
            {**divided, "output": str(folder / f"{kind}-killed"), "resume": True},
        ]
    endings = run_worlds(legs)
    has_ended_well = [[each["code"] == 0 for each in leg] for leg in endings]
    assert has_ended_well == [[True], [True, True], [False, False], [True, True]] * 2, endings
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoint").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_divided(folder: Path, kind: str) -> None:
    first, second = (json.loads((folder / f"{kind}-divided-spy-{rank}.json").read_text()) for rank in (0, 1))
    assert any(facts["is_trained"] for facts in first.values())
    for name, facts in first.items():
        assert facts["is_sharded"], name
        assert facts["here"] + second[name]["here"] == facts["all"], name
        assert facts["here"] == facts["all"] / 2, name


@pytest.mark.parametrize("kind", KINDS)
def test_divided_run_has_the_loss_curve_and_the_weights_of_the_whole(folder: Path, kind: str) -> None:
    whole, divided = folder / f"{kind}-whole", folder / f"{kind}-divided"
    for mine, theirs in zip(lines(divided), lines(whole), strict=True):
        for key in theirs.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert mine[key] == pytest.approx(theirs[key], rel=LOSS_TOLERANCE), (mine["step"], key)
        assert mine["tokens"] == theirs["tokens"]
    assert weights(divided).keys() == weights(whole).keys()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(divided)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_divided_run_writes_the_checkpoint_of_the_whole(folder: Path, kind: str) -> None:
    whole, divided = (folder / f"{kind}-{name}" / "checkpoint" for name in ("whole", "divided"))
    assert {path.name for path in divided.iterdir()} == {path.name for path in whole.iterdir()}
    summary = json.loads((divided.parent / "run.json").read_text())
    assert summary["used_own_loss"]
    assert summary["parameters"] == json.loads((whole.parent / "run.json").read_text())["parameters"]


@pytest.mark.parametrize("kind", KINDS)
def test_divided_run_that_was_killed_goes_on_with_the_same_bits(folder: Path, kind: str) -> None:
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    alone, killed = (folder / f"{kind}-{run}" / "checkpoint" / name for run in ("divided", "killed"))
    assert killed.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fsdp": {}}, "fsdp needs several processes: start it with --nproc N"),
        ({"fsdp": {}, "optim": "adafactor", "num_devices": 1}, "fsdp needs several processes"),
    ],
)
def test_division_over_one_process_is_refused(
    base: Path, tmp_path: Path, write_rows: WriteRows, values: dict[str, Any], message: str
) -> None:
    config = {"model_id": str(base), "train_path": str(write_rows("r.jsonl", ROWS)), **values}
    with pytest.raises(ModelError, match=message):
        train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_best_weights_of_a_divided_model_are_refused() -> None:
    """One process keeps them, and it has a part of every parameter."""
    values = {"model_id": "m", "train_path": ("r.jsonl",), "valid_path": ("v.jsonl",), "fsdp": {}}
    check_shardable(TrainConfig.model_validate(values), 2)
    with pytest.raises(ModelError, match="fsdp needs a run without best_by"):
        check_shardable(TrainConfig.model_validate({**values, "best_by": "eval_loss"}), 2)


def test_section_that_is_switched_off_divides_nothing(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    config = {"model_id": str(base), "train_path": str(write_rows("r.jsonl", ROWS)), "fsdp": {"enabled": False}}
    run = train({**config, "max_steps": 1, "learning_rate": 1e-3, "mixed_precision": "no"}, output=tmp_path / "run")
    assert run.summary["num_devices"] == 1
