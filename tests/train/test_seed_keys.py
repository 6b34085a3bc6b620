"""Keys of other trainers' files are read in our words, each with a notice; none is dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from loradock_train.config import TrainConfig
from loradock_train.config_file import config_from, load_config
from loradock_train.errors import ConfigError
from loradock_train.seed_keys import OLD_KEYS, RENAMED, UNUSED, translate

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
MINIMAL = {"model_id": "org/model", "train_path": "rows.jsonl"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def read(folder: Path, **values: Any) -> tuple[TrainConfig, list[str]]:
    return config_from({**MINIMAL, **values}, folder)


def refused(folder: Path, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, **values)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("old", "value", "new", "read_as", "notice"),
    [
        ("num_checkpoints_to_keep", 2, "keep", 2, "num_checkpoints_to_keep: 2 is read as keep: 2"),
        ("save_total_limit", 20, "keep", 20, "save_total_limit: 20 is read as keep: 20"),
        ("num_train_epochs", 2, "num_epochs", 2, "num_train_epochs: 2 is read as num_epochs: 2"),
        (
            "per_device_train_batch_size", 4, "train_batch_size_per_device", 4,
            "per_device_train_batch_size: 4 is read as train_batch_size_per_device: 4",
        ),
        (
            "per_device_eval_batch_size", 4, "eval_batch_size_per_device", 4,
            "per_device_eval_batch_size: 4 is read as eval_batch_size_per_device: 4",
        ),
        ("max_seq_length", 64, "context_length", 64, "max_seq_length: 64 is read as context_length: 64"),
        (
            "warmup_ratio", 0.03, "warmup_steps", 0.03,
            "warmup_ratio: 0.03 is read as warmup_steps: 0.03 (below 1 it is a share of the run)",
        ),
        ("fp16", True, "mixed_precision", "fp16", "fp16: true is read as mixed_precision: fp16"),
        ("bf16", True, "mixed_precision", "bf16", "bf16: true is read as mixed_precision: bf16"),
        ("optim", "adamw_bnb_8bit", "optim", "adamw_8bit", "optim: adamw_bnb_8bit is read as optim: adamw_8bit"),
        (
            "lr_scheduler_type", "constant_with_warmup", "lr_scheduler_type", "constant",
            "lr_scheduler_type: constant_with_warmup is read as constant (warmup_steps warms every one)",
        ),
        (
            "padding", "longest", "padding", "longest",
            "padding: longest is what happens anyway: a batch is as wide as its longest row",
        ),
        (
            "padding", "max_length", "padding", "max_length",
            "padding: max_length makes every batch context_length wide: for measuring the worst case, slower otherwise",
        ),
        (
            "worker_resources", {"accelerator_type:A10G": 0.001}, "worker_resources", {"accelerator_type:A10G": 0.001},
            "worker_resources: asked of Ray for every worker (--ray); a run that Ray does not start takes this machine "
            "as it is",
        ),
        (
            "trainer_resources", {"memory": 53687091200}, "trainer_resources", {"memory": 53687091200},
            "trainer_resources: not asked for: what leads the workers only waits for them, and needs next to nothing",
        ),
    ],
)  # fmt: skip
def test_key_is_read_in_our_words_and_told(
    folder: Path, old: str, value: Any, new: str, read_as: Any, notice: str
) -> None:
    config, notices = read(folder, **{old: value})
    assert getattr(config, new) == read_as
    assert notices == [notice]


@pytest.mark.parametrize("value", ["none", ["none"]])
def test_report_to_none_is_no_tracker(folder: Path, value: Any) -> None:
    config, notices = read(folder, report_to=value)
    assert config == read(folder)[0]
    (notice,) = notices
    assert notice.startswith("report_to: ")


@pytest.mark.parametrize("value", ["all", ["all"]])
def test_report_to_all_is_what_is_installed(folder: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradock_train.seed_keys.find_spec", lambda name: name == "mlflow" or None)
    config, notices = read(folder, report_to=value)
    assert config.report_to == ("mlflow",)
    assert notices == ["report_to: all is read as report_to: [mlflow], those that are installed"]


@pytest.mark.parametrize("key", [*UNUSED, "gradient_checkpointing_kwargs", "save_strategy", "eval_strategy"])
def test_key_without_a_use_is_told_and_changes_nothing(folder: Path, key: str) -> None:
    config, notices = read(folder, **{key: "epoch"})
    assert config == read(folder)[0]
    assert len(notices) == 1
    assert notices[0].startswith(f"{key}: epoch is not needed: ")


@pytest.mark.parametrize(("installed", "kernel"), [(True, "flash_attention_2"), (False, "sdpa")])
def test_flash_attention_is_used_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, kernel: str
) -> None:
    monkeypatch.setattr("loradock_train.seed_keys.find_spec", lambda name: object() if installed else None)
    config, notices = read(folder, flash_attention_2=True)
    assert config.attn_implementation == kernel
    assert notices[0].startswith(f"flash_attention_2: true is read as attn_implementation: {kernel}")
    assert ("not installed here" in notices[0]) is not installed
    assert read(folder, flash_attention_2=False)[0].attn_implementation == "auto"


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True), (3, False), (3, True)])
def test_zero_stage_of_deepspeed_is_read_as_fsdp(folder: Path, stage: int, offload: bool) -> None:
    zero = {"stage": stage, **({"offload_param": {"device": "cpu"}} if offload else {})}
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
    for given in ("zero.json", {"config_path": "zero.json"}, {"zero_optimization": zero}):
        config, notices = read(folder, deepspeed=given, num_devices=2)
        assert config.fsdp is not None
        assert (config.fsdp.reshard_after_forward, config.fsdp.cpu_offload) == (stage == 3, offload)
        assert notices[0].startswith(f"deepspeed: ZeRO stage {stage} is read as fsdp: ")


@pytest.mark.parametrize("name", ["llama-3-8b-lora.yaml", "llama-3-8b-full-parameter.yaml"])
def test_recipe_with_the_templates_keys_is_read_and_every_key_is_told(name: str) -> None:
    config, notices = load_config(RECIPES / name)
    assert config.kind == ("lora" if "lora" in name else "full")
    assert (config.num_devices, config.keep, config.train_path[0][:5]) == (16, 1, "s3://")
    assert config.fsdp is not None
    assert (config.fsdp.reshard_after_forward, config.fsdp.cpu_offload) == (True, True)
    told = (
        "num_checkpoints_to_keep:", "dataset_size_scaling_factor:", "flash_attention_2:", "deepspeed:", "padding:",
        "worker_resources:", "trainer_resources:",
    )  # fmt: skip
    assert {key for key in told for notice in notices if notice.startswith(key)} == set(told)
    assert len(notices) == len(told)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"deepspeed": {"stage": 3, "zero_optimization": []}},
            "deepspeed: expected {config_path: FILE.json}, or DeepSpeed's own keys with zero_optimization.stage",
        ),
        (
            {"num_train_epochs": 1, "num_epochs": 2},
            "num_train_epochs: read as num_epochs, which num_epochs gives already; remove one of the two",
        ),
        (
            {"num_checkpoints_to_keep": 1, "save_total_limit": 2},
            "save_total_limit: read as keep, which num_checkpoints_to_keep gives already; remove one of the two",
        ),
        (
            {"fp16": True, "bf16": True},
            "fp16: read as mixed_precision, which bf16 gives already; remove one of the two",
        ),
        ({"fp16": "yes"}, "fp16: must be true or false, got 'yes'"),
        ({"flash_attention_2": 2}, "flash_attention_2: must be true or false, got 2"),
        (
            {"eval_strategy": False, "valid_path": "rows.jsonl"},
            "eval_strategy: no, beside valid_path: rows that are given are validated on; remove one of the two",
        ),
        (
            {"evaluation_strategy": "steps"},
            "evaluation_strategy: steps, but no eval_steps; give it, or remove this key (an epoch is then the default)",
        ),
        (
            {"eval_strategy": "epoch", "eval_steps": 5},
            "eval_strategy: epoch, beside eval_steps; remove one of the two",
        ),
        ({"num_train_epochs": -1}, "num_train_epochs: must be greater than 0, got -1"),
        ({"worker_resources": {"GPU": "many"}}, "worker_resources: must be a valid number, got 'many'"),
    ],
)
def test_key_that_cannot_be_read_is_named_as_it_stands(folder: Path, values: dict[str, Any], problem: str) -> None:
    assert refused(folder, **values) == [problem]


@pytest.mark.parametrize(
    ("values", "best_by", "notice"),
    [
        ({}, "eval_loss", "load_best_model_at_end: true is read as best_by: eval_loss"),
        (
            {"metric_for_best_model": "eval_loss", "greater_is_better": False}, "eval_loss",
            "load_best_model_at_end: true and metric_for_best_model: eval_loss is read as best_by: eval_loss",
        ),
        (
            {"metric_for_best_model": "rouge_l", "greater_is_better": True, "task": {"kind": "summarisation"}},
            "rougeL",
            "load_best_model_at_end: true and metric_for_best_model: rouge_l is read as best_by: rougeL",
        ),
        ({"best_by": "eval_loss"}, "eval_loss", "load_best_model_at_end: true is what best_by: eval_loss says"),
    ],
)  # fmt: skip
def test_best_model_of_other_trainers_is_read_as_best_by(
    folder: Path, values: dict[str, Any], best_by: str, notice: str
) -> None:
    config, notices = read(folder, load_best_model_at_end=True, valid_path="rows.jsonl", **values)
    assert config.best_by == best_by
    assert notice in notices


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"metric_for_best_model": "f1"},
            "metric_for_best_model: f1 is no metric of best_by (eval_loss, accuracy, macro_f1, rougeL, rouge1, rouge2, "
            "exact_match, token_f1); give best_by instead",
        ),
        (
            {"metric_for_best_model": "accuracy"},
            "metric_for_best_model: best_by accuracy: this run has eval_loss; task: gives more",
        ),
        ({"greater_is_better": True}, "greater_is_better: true, but of loss less is better; remove this key"),
        (
            {"metric_for_best_model": "loss", "best_by": "accuracy"},
            "metric_for_best_model: read as best_by: eval_loss, beside best_by: accuracy; remove one of the two",
        ),
        (
            {"valid_path": None},
            "load_best_model_at_end: true, but no valid_path: the best weights are those of a validation; give it",
        ),
        ({"load_best_model_at_end": "yes please"}, "load_best_model_at_end: must be true or false, got 'yes please'"),
    ],
)
def test_best_model_that_cannot_be_said_in_our_words_is_a_problem(
    folder: Path, values: dict[str, Any], problem: str
) -> None:
    told = refused(folder, **{"load_best_model_at_end": True, "valid_path": "rows.jsonl", **values})
    assert problem in told


def test_metric_of_the_best_model_without_its_switch_is_told(folder: Path) -> None:
    config, notices = read(
        folder, load_best_model_at_end=False, metric_for_best_model="f1", greater_is_better=True
    )  # fmt: skip
    assert config.best_by is None
    assert [notice.partition(":")[0] for notice in notices] == [
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    ]  # fmt: skip


def test_no_old_key_is_one_of_ours() -> None:
    assert not OLD_KEYS & set(TrainConfig.model_fields)
    assert set(RENAMED.values()) <= set(TrainConfig.model_fields)


def test_mapping_that_is_given_is_not_changed() -> None:
    values = {"warmup_ratio": 0.1, "optim": "adamw_bnb_8bit"}
    translate(values)
    assert values == {"warmup_ratio": 0.1, "optim": "adamw_bnb_8bit"}
