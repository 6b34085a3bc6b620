"""One base, three runs of `loradock train` on it, and one `loradock serve` with all of them, for the engine-marked
tests here.

An engine's start costs most of a minute, so they share one; each test pushes under names of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loradock_testing.loradock_server import LoradockServer, loradock_server
from loradock_testing.tiny_models import LINEAR_MODULES, make_llama
from loradock_testing.trained import WHOLE_LIST, WORDS, Trained
from loradock_train import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    base = make_llama(root / "tiny-llama")
    rows = [{"prompt": a, "completion": f" {b} {a}"} for a, b in zip(WORDS, reversed(WORDS), strict=True)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, **config: Any) -> Path:
        common = {
            "model_id": str(base),
            "train_path": str(root / "rows.jsonl"),
            "mixed_precision": "no",
            "max_steps": 8,
        }
        common |= {"train_batch_size_per_device": 4, "context_length": 64, "learning_rate": 0.02}
        return train(common | config, output=root / name).directory

    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    return Trained(
        base,
        run("linear", lora_config=lora | {"target_modules": list(LINEAR_MODULES)}),
        run("whole-list", lora_config=lora | {"target_modules": WHOLE_LIST}),
        run("full", learning_rate=0.005),
    )


@pytest.fixture(scope="session")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoradockServer]:
    engine = {"dtype": "float32", "max_loras": 4, "kv_cache_gib": 1, "max_lora_rank": 16, "max_model_len": 256}
    with loradock_server(trained.base, tmp_path_factory.mktemp("served") / "data", engine=engine) as running:
        running.loradock("push", str(trained.linear), "linear")
        running.loradock("push", str(trained.whole_list), "whole-list")
        running.loradock("push", str(trained.full), "full")
        yield running
