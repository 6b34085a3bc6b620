"""Every training config in the repository fits the schema that editors are given, and can be read."""

from pathlib import Path

import pytest

from loradock_adapters.strict_config import read_yaml
from loradock_train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.yaml")
    if "train_path:" in path.read_text()
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_of_the_repository_fits_the_schema(path: Path) -> None:
    assert TrainConfig.model_validate(read_yaml(path)).kind in ("lora", "full", "scratch")
