"""Exact resume of runs whose data is a stream: killed, gone on, and the same bits as the run left alone."""

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from loradock_testing.tiny_models import make_llama
from loradock_testing.worlds import run_legs
from loradock_train import train
from loradock_train.errors import ResumeError

LIMITS: dict[str, dict[str, Any]] = {
    "packed": {"max_steps": 14, "train_batch_size_per_device": 1, "gradient_accumulation_steps": 2},
    "lora": {
        "num_epochs": 2,  # so that the learning rate follows the bytes read
        "train_batch_size_per_device": 3,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "lora_config": {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "down_proj"]},
    },
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def write_shards(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for shard, (ending, compress) in enumerate(COMPRESS.items()):
        rows: list[dict[str, str]] = [
            {"text": " ".join(["def", f"f{shard}_{i}"] * (3 + i % 9))}
            if kind == "packed"
            else {"prompt": f"def f{i}(x" + "y" * (i % 5) + "):", "completion": f" return {shard}" + " + x" * (i % 4)}
            for i in range(20 + shard)
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{shard}.jsonl{ending}").write_bytes(compress(content))
    return folder


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, list[int]]]:
    """Each kind alone, and killed twice between its saves: run directories, and how the legs ended."""
    chance = random.Random(f"{sys.version_info.minor} stream")
    folder = tmp_path_factory.mktemp("stream")
    legs: list[dict[str, Any]] = []
    for kind, limits in LIMITS.items():
        base = make_llama(folder / f"{kind}-base")
        config = base / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
        options = {
            **limits,
            "model_id": str(base),
            "train_path": str(write_shards(folder / f"{kind}-shards", kind)),
            "streaming": True,
            "shuffle_buffer": 9,
            "context_length": 64,
            "learning_rate": 1e-2,
            "mixed_precision": "no",
            "logging_steps": 2,
            "save_steps": 3,
        }
        kills = [chance.randint(8, 12), chance.randint(7, 12)]  # the first save is at micro-batch 6
        sys.stdout.write(f"{kind}: killed at micro-batches {kills}\n")
        killed = {"config": options, "output": str(folder / f"{kind}-killed")}
        legs += [
            {"config": options, "output": str(folder / f"{kind}-alone"), "resume": False},
            {**killed, "resume": False, "kill_at_batch": kills[0]},
            {**killed, "resume": True, "kill_at_batch": kills[1]},
            {**killed, "resume": True},
        ]
    codes = run_legs(legs)
    return {
        kind: (folder / f"{kind}-alone", folder / f"{kind}-killed", codes[4 * at : 4 * at + 4])
        for at, kind in enumerate(LIMITS)
    }


@pytest.mark.parametrize("kind", LIMITS)
def test_killed_run_over_a_stream_that_went_on_has_the_bits_of_the_run_left_alone(
    stories: dict[str, tuple[Path, Path, list[int]]], kind: str
) -> None:
    alone, killed, codes = stories[kind]
    assert codes == [0, -9, -9, 0]
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (killed / "checkpoint" / name).read_bytes() == (alone / "checkpoint" / name).read_bytes()


@pytest.mark.parametrize("kind", LIMITS)
def test_killed_run_over_a_stream_tells_the_same_story(
    stories: dict[str, tuple[Path, Path, list[int]]], kind: str
) -> None:
    timeless = {"elapsed_s", "tokens_per_s"}
    alone, killed = (
        [
            {k: v for k, v in json.loads(line).items() if k not in timeless}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in stories[kind][:2]
    )
    assert killed == alone
    mine, theirs = (json.loads((run / "run.json").read_text()) for run in stories[kind][:2])
    assert (mine["data"], mine["epochs"]) == (theirs["data"], theirs["epochs"])


def test_every_row_of_a_stream_is_trained_on_once_a_pass(stories: dict[str, tuple[Path, Path, list[int]]]) -> None:
    summary = json.loads((stories["lora"][0] / "run.json").read_text())
    assert (summary["epochs"], summary["data"]["train"]["num_rows"]) == (2.0, 2 * 63)
    assert summary["tokens"] == summary["data"]["train"]["num_tokens"]
    assert summary["steps"] == 21
    rates = [
        json.loads(line)["learning_rate"] for line in (stories["lora"][0] / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates[-1] < 0.2 * max(rates)


def test_stream_that_has_changed_is_not_gone_on_with(base: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", "packed")
    options = {"model_id": str(base), "train_path": str(shards), "streaming": True, "max_steps": 4, "save_steps": 1}
    options |= {"context_length": 64, "mixed_precision": "no", "num_probe_prompts": 1, "lora_config": {"r": 2}}
    from loradock_train.trainer import LoradockTrainer

    original = LoradockTrainer.training_step

    def broken(self: LoradockTrainer, *arguments: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("the machine is gone")
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LoradockTrainer, "training_step", broken)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(options, output=tmp_path / "run")
    (shards / "0.jsonl").write_text((shards / "0.jsonl").read_text().replace("f0_3", "f0_4", 1))
    with pytest.raises(ResumeError, match=r"train_path: 0\.jsonl has changed"):
        train(options, output=tmp_path / "run", resume=True)
