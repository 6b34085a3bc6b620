"""`deepspeed:`: files of ZeRO stages are read, checked against the YAML, and run as fsdp."""

import json
from pathlib import Path
from typing import Any

import pytest

from loradock_testing.rows import WriteRows
from loradock_testing.worlds import run_worlds
from loradock_train.config_file import config_from, load_config
from loradock_train.config_fsdp import FsdpOptions
from loradock_train.errors import ConfigError
from loradock_train.zero import as_fsdp, deepspeed_notices

ZERO_3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "offload_param": {"device": "none"}},
    "bf16": {"enabled": True},
}
ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(5)]


@pytest.mark.parametrize(
    ("zero", "options"),
    [
        ({"stage": 3}, FsdpOptions()),
        ({"stage": 2}, FsdpOptions(reshard_after_forward=False)),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, FsdpOptions(cpu_offload=True)),
        ({"stage": 0}, None),
    ],
)
def test_stage_becomes_what_divides_the_same(zero: dict[str, Any], options: FsdpOptions | None) -> None:
    assert as_fsdp({"zero_optimization": zero}) == options


def test_sections_that_nobody_reads_are_named() -> None:
    (notice,) = deepspeed_notices(ZERO_3, 2)
    assert "stage 3 is run by torch's fully_shard" in notice
    assert "not read: bf16 " in notice
    assert "divides nothing over 1 process;" in deepspeed_notices(ZERO_3, 1)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "zero.json is not JSON"),
        ("[]", "holds list, expected an object"),
        ('{"zero_optimization": 3}', "zero_optimization is 3, not a section"),
        ('{"zero_optimization": {"stage": 4}}', "stage: must be 0, 1, 2 or 3, got 4"),
        ('{"train_micro_batch_size_per_gpu": 4}', "4, but train_batch_size_per_device is 16; write auto"),
        (None, "no such file"),
    ],
)
def test_file_that_cannot_be_meant_is_refused(
    base: Path, tmp_path: Path, write_rows: WriteRows, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "zero.json").write_text(text)
    values = {"model_id": str(base), "train_path": str(write_rows("r.jsonl", ROWS)), "deepspeed": "zero.json"}
    with pytest.raises(ConfigError, match=message):
        config_from(values, folder=tmp_path)


def test_stage_3_divides_every_parameter(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    (tmp_path / "zero.json").write_text(json.dumps(ZERO_3))
    config = {
        "model_id": str(base), "train_path": str(write_rows("r.jsonl", ROWS)), "mixed_precision": "no",
        "max_steps": 1, "learning_rate": 1e-3, "deepspeed": str(tmp_path / "zero.json"),
    }  # fmt: skip
    ((first, second),) = run_worlds([{"config": config, "output": str(tmp_path / "run"), "processes": 2, "spy": True}])
    assert (first["code"], second["code"]) == (0, 0), (first, second)
    facts = json.loads((tmp_path / "run-spy-0.json").read_text())
    assert all(each["here"] * 2 == each["all"] for each in facts.values())
    again, _ = load_config(tmp_path / "run" / "config.yaml")
    assert (again.deepspeed, again.fsdp) == (None, FsdpOptions())
    assert any("stage 3" in notice for notice in json.loads((tmp_path / "run" / "run.json").read_text())["notices"])
