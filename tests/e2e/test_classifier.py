"""A classification head, trained, pushed and asked through `/classify`: the probabilities are transformers' own."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loradock_testing.loradock_server import LoradockServer
from loradock_testing.trained import WORDS, Trained
from loradock_train import train

pytestmark = pytest.mark.engine

LABELS = ["short", "long"]


def test_classifier_is_served_dedicated_and_answers_as_transformers_does(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    rows = [{"text": f"{word} is", "label": LABELS[len(word) > 5]} for word in WORDS]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        {
            "model_id": str(trained.base),
            "train_path": str(data),
            "valid_path": str(data),
            "task": {"kind": "sequence_classification", "labels": LABELS},
            "lora_config": {"r": 4},
            "learning_rate": 5e-3,
            "mixed_precision": "no",
            "context_length": 64,
            "num_epochs": 4,
        },
        output=tmp_path / "run",
    )
    pushed = server.loradock("push", str(run.directory), "lengths")
    assert "dedicated" in pushed.stdout
    texts = [row["text"] for row in rows]
    answer = ask(server, "/classify", model="lengths", input=texts)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["model"] == "lengths"
    model: Any = AutoModelForSequenceClassification.from_pretrained(run.checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.checkpoint)
    assert len({entry["label"] for entry in found["data"]}) == 2, "one answer for all would prove little"
    for text, entry in zip(texts, found["data"], strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert entry["probs"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert entry["label"] == LABELS[int(expected.argmax())]
    chat = ask(server, "/v1/chat/completions", model="lengths", messages=[{"role": "user", "content": "x"}])
    assert (chat.status_code, chat.json()["error"]["code"]) == (400, "wrong_task")
    assert "POST /classify" in chat.json()["error"]["message"]


def test_models_of_text_have_no_classes(server: LoradockServer) -> None:
    adapter = ask(server, "/classify", model="linear", input="x")
    assert (adapter.status_code, adapter.json()["error"]["code"]) == (400, "wrong_task")
    base = ask(server, "/classify", model="base", input="x")
    assert base.json()["error"]["code"] == "unsupported_route"
    assert "ask /v1/chat/completions" in base.json()["error"]["message"]


def ask(server: LoradockServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=180)
