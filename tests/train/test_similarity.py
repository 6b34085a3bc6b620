"""The similarity score: numbers computed by hand, its table, and runs that get better by it."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from loradock_testing.rows import WriteRows
from loradock_testing.tiny_vision import COLOURS, data_url, make_idefics3, square
from loradock_train import train
from loradock_train.errors import ConfigError, DataError, ModelError
from loradock_train.rows import Row
from loradock_train.similarity import Asked, distance, embed, write_csv


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([3.0, 0.0], [5.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 2.0], 1.0),
        ([1.0, 1.0], [-2.0, -2.0], 2.0),
        ([1.0, 0.0], [1.0, 1.0], 1 - 1 / math.sqrt(2)),
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([0.0, 0.0], [1.0, 0.0], 1.0),
    ],
)
def test_distance_is_one_less_the_cosine(one: list[float], other: list[float], expected: float) -> None:
    assert distance(torch.tensor(one), torch.tensor(other)) == pytest.approx(expected, abs=1e-12)


class Lookup(nn.Module):
    """Hidden states that anyone can compute: token t has (t, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor) -> Any:
        states = torch.stack([input_ids.float(), torch.ones_like(input_ids).float()], dim=-1) * self.scale
        return SimpleNamespace(last_hidden_state=states)


def by_letters(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def test_embedding_is_the_mean_over_the_tokens() -> None:
    with torch.no_grad():
        assert embed(Lookup(), by_letters, "bdi").tolist() == [(1 + 3 + 8) / 3, 1.0]
        one, other = embed(Lookup(), by_letters, "aa"), embed(Lookup(), by_letters, "bb")
        assert distance(one, other) == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-7)
        assert distance(embed(Lookup(), by_letters, ""), torch.zeros(1)) == 1.0


def test_table_has_the_seeds_columns_and_ends_with_the_averages(tmp_path: Path) -> None:
    rows = [
        Row(
            "r",
            1,
            {
                "data_id": 7,
                "item_name": "vase",
                "image_name": "v.png",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
            },
        ),
        Row("r", 2, {"prompt": "p", "completion": "c"}),
    ]
    asked = [Asked(row, [], truth) for row, truth in zip(rows, ("a vase", "c"), strict=True)]
    write_csv(tmp_path / "after.csv", asked, ["a pot", "d"], [0.25, 0.5004], [0.1, 0.3])
    with (tmp_path / "after.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert lines == [
        [
            "data_id", "item_name", "image_name", "user_question", "model_generated_answer", "ground_truth_answer",
            "semantic_similarity_score", "embedder_similarity_score",
        ],
        ["7", "vase", "v.png", "What?", "a pot", "a vase", "0.250000", "0.100000"],
        ["", "", "", "p", "d", "c", "0.500400", "0.300000"],
        ["average_semantic_similarity_score", "", "", "", "", "", "0.375", "0.200"],
    ]  # fmt: skip


def run_of(base: Path, data: Path, output: Path, **more: Any) -> Any:
    common = {"model_id": str(base), "train_path": str(data), "mixed_precision": "no", "context_length": 64}
    return train(common | {"valid_path": str(data), "train_batch_size_per_device": 4} | more, output=output)


def test_text_run_is_judged_before_and_after_by_itself_and_by_a_fixed_model(
    base: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    words = ("for", "while", "import", "return")
    data = write_rows("rows.jsonl", [{"prompt": word, "completion": f" {word} {word}"} for word in words])
    asked = {"max_new_tokens": 6, "embedder": str(base), "max_rows": 3}
    run = run_of(base, data, tmp_path / "run", max_steps=40, learning_rate=0.005, similarity=asked)
    told = run.summary["similarity"]
    assert told["rows"] == 3
    assert told["own"]["before"] == told["embedder"]["before"], "before training the base is both"
    assert told["own"]["after"] < 0.1 < told["own"]["before"]
    assert told["embedder"]["after"] < told["embedder"]["before"]
    assert run.summary["score"] == {
        "metric": "similarity", "value": told["own"]["after"], "best": "low", "base": told["own"]["before"],
    }  # fmt: skip
    folder = run.directory / "similarity"
    assert sorted(path.name for path in folder.iterdir()) == ["after.csv", "before.csv", "similarity.png"]
    last = (folder / "after.csv").read_text().splitlines()[-1].split(",")
    assert [float(value) for value in last[-2:]] == [told["own"]["after"], told["embedder"]["after"]]


def test_scoring_leaves_no_trace_on_the_weights(base: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "for", "completion": " x"}, {"prompt": "if", "completion": " y"}])
    lora = {"r": 4, "lora_dropout": 0.2}
    plain = run_of(base, data, tmp_path / "plain", max_steps=4, learning_rate=0.01, lora_config=lora)
    asked = {"max_new_tokens": 4}
    judged = run_of(
        base, data, tmp_path / "judged", max_steps=4, learning_rate=0.01, lora_config=lora, similarity=asked
    )
    one, other = ((run.checkpoint / "adapter_model.safetensors").read_bytes() for run in (plain, judged))
    assert one == other


def test_answers_of_a_model_that_sees_depend_on_the_image(write_rows: WriteRows, tmp_path: Path) -> None:
    base = make_idefics3(tmp_path / "tiny-idefics3")
    asked = {"type": "text", "text": "What colour?"}
    rows = [
        {
            "data_id": colour,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": data_url(square(colour))}}, asked],
                },
                {"role": "assistant", "content": colour},
            ],
        }
        for colour in COLOURS
    ]
    data = write_rows("rows.jsonl", rows)
    similarity = {"max_new_tokens": 8}
    run = run_of(base, data, tmp_path / "run", max_steps=40, learning_rate=3e-3, similarity=similarity)
    with (run.directory / "similarity" / "after.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["data_id"]: line["model_generated_answer"] for line in lines[:-1]} == {c: c for c in COLOURS}
    told = run.summary["similarity"]["own"]
    assert told["after"] == 0.0 < 0.2 < told["before"]


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-rows": ({"valid_path": None}, ConfigError, r"similarity needs similarity\.path or valid_path"),
    "no-file": ({"similarity": {"path": "no.jsonl"}}, ConfigError, r"similarity\.path: no such file"),
    "embedder": (
        {"similarity": {"embedder": "./no", "max_new_tokens": 2}},
        ConfigError,
        r"similarity\.embedder: no such directory",
    ),
    "too-long": (
        {"similarity": {"max_new_tokens": 512}},
        ModelError,
        r"max_new_tokens: 512 after a prompt of \d+ tokens is over the model's max_position_embeddings 512",
    ),
    "unknown": ({"similarity": {"max_token": 3}}, ConfigError, "unknown key; did you mean max_new_tokens?"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_section_is_refused_before_training(
    base: Path, write_rows: WriteRows, tmp_path: Path, name: str
) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "for", "completion": " x"}])
    more, kind, expected = BROKEN[name]
    with pytest.raises(kind, match=expected):
        run_of(base, data, tmp_path / "run", **({"similarity": {"max_new_tokens": 2}} | more))
    assert not (tmp_path / "run").exists()


def test_raw_text_has_no_true_answer(base: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", [{"text": "for x in y"}])
    with pytest.raises(DataError, match=r"similarity needs rows with a true answer(.|\n)*line 1"):
        run_of(base, data, tmp_path / "run", similarity={"max_new_tokens": 2})


def test_config_in_the_run_directory_says_how_it_was_judged(base: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", [{"prompt": "for", "completion": " x"}])
    run = run_of(base, data, tmp_path / "run", max_steps=1, similarity={"max_new_tokens": 2})
    assert json.loads((run.directory / "run.json").read_text())["similarity"]["rows"] == 1
    assert "max_new_tokens: 2" in (run.directory / "config.yaml").read_text()
