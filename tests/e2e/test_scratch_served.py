"""A GPT-2 from scratch on a stream of text, killed and gone on, pushed, and answered by an engine of its own with the
tokens of transformers."""

import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from loradock_testing.loradock_server import LoradockServer
from loradock_testing.tiny_models import reference
from loradock_testing.worlds import run_legs

pytestmark = pytest.mark.engine

PROMPTS = ["def ", "import os", "class Thread", "    return self", "for name in"]
MAX_TOKENS = 16


def write_shards(folder: Path) -> tuple[Path, Path]:
    """Sources of the standard library: gzip shards to train on, and a held-out file."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [source.read_text(encoding="utf-8", errors="ignore")[:20_000] for source in sources]
    (folder / "shards").mkdir()
    for shard in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[4 + shard :: 4])
        (folder / "shards" / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    valid = folder / "valid.jsonl"
    valid.write_text("".join(json.dumps({"text": text[:4000]}) + "\n" for text in texts[:4]))
    return folder / "shards", valid


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The run directory, and how the killed and the last leg ended."""
    folder = tmp_path_factory.mktemp("gpt2")
    shards, valid = write_shards(folder)
    config = {
        "model": {"name": "gpt2-small", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
        "tokenizer": {"train_vocab_size": 600}, "train_path": str(shards), "valid_path": str(valid),
        "streaming": True, "shuffle_buffer": 8, "context_length": 128, "max_steps": 40, "eval_steps": 10,
        "save_steps": 8, "train_batch_size_per_device": 4, "learning_rate": 5e-3, "warmup_steps": 4,
        "mixed_precision": "no", "samples": {"prompts": ["def "], "every_steps": 20, "max_tokens": 8},
    }  # fmt: skip
    legs = [
        {"config": config, "output": str(folder / "run"), "resume": False, "kill_at_batch": 21},
        {"config": config, "output": str(folder / "run"), "resume": True},
    ]
    codes = run_legs(legs)
    return folder / "run", codes


def test_run_that_was_killed_goes_on_and_its_perplexity_falls(run: tuple[Path, list[int]]) -> None:
    directory, codes = run
    assert codes == [-9, 0]
    lines: list[dict[str, Any]] = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_perplexity"] for line in lines if "eval_perplexity" in line}
    assert list(found) == [10, 20, 30, 40]
    assert found[10] > found[20] > found[30] > found[40]
    summary = json.loads((directory / "run.json").read_text())
    assert summary["final_perplexity"] == pytest.approx(found[40])
    assert found[40] < 0.5 * 600, "a uniform guess has the vocabulary's"
    samples = [json.loads(line)["step"] for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert samples == [20, 40]


def test_model_from_scratch_is_answered_by_an_engine_of_its_own(
    run: tuple[Path, list[int]], server: LoradockServer
) -> None:
    server.loradock("push", str(run[0]), "gpt2")
    assert server.card("gpt2")["placement"] == "dedicated"
    expected = reference(run[0] / "checkpoint", None, PROMPTS, MAX_TOKENS)
    wrong = [
        prompt
        for prompt, answer in zip(PROMPTS, expected, strict=True)
        if answer.is_contradicted_by(server.tokens("gpt2", prompt, MAX_TOKENS))
    ]
    assert wrong == []
    assert server.card("gpt2")["state"] == "ready"
