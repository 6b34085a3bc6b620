"""A tiny Idefics3 from data to answers: trained by adapter and on chosen modules in full, scored, pushed, and asked
with an image.

Which colour a square has is in its pixels alone. One real engine for the base, float32, greedy; one dedicated.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from loradock_testing.loradock_server import LoradockServer, loradock_server
from loradock_testing.tiny_vision import COLOURS, data_url, make_idefics3, png_bytes, square
from loradock_train import Run, train

pytestmark = pytest.mark.engine

QUESTION = "What colour?"
ASKED_SIZE = 29
"""Of squares that no training row shows."""
LANGUAGE = r".*text_model.*\.(q|k|v|o|gate|up|down)_proj"
WITH_CONNECTOR = rf"({LANGUAGE}|.*connector.*proj)"


@dataclass(frozen=True)
class Seen:
    """A base that sees, and its runs."""

    base: Path
    runs: dict[str, Run]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    root = tmp_path_factory.mktemp("seen")
    base = make_idefics3(root / "tiny-idefics3")
    rows = []
    for colour in COLOURS:
        for size in (24, 40):
            (root / f"{colour}-{size}.png").write_bytes(png_bytes(square(colour, size)))
            shown = {"type": "image", "path": f"{colour}-{size}.png"}
            user = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
            rows.append({"messages": [user, {"role": "assistant", "content": colour}]})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(root / "rows.jsonl")
    common: dict[str, Any] = {"model_id": str(base), "train_path": data, "valid_path": data}
    common |= {"mixed_precision": "no", "context_length": 64, "train_batch_size_per_device": 8, "eval_steps": 1000}
    common["similarity"] = {"max_new_tokens": 12, "embedder": str(base)}
    lora = {"r": 8, "lora_alpha": 64, "use_rslora": True, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}
    kinds: dict[str, dict[str, Any]] = {
        "language": {"lora_config": lora | {"target_modules": LANGUAGE}, "learning_rate": 2e-3, "max_steps": 80},
        "connector": {"lora_config": lora | {"target_modules": WITH_CONNECTOR}, "learning_rate": 2e-3, "max_steps": 80},
        "selective": {"trainable": ["(text_model|connector).*proj"], "learning_rate": 3e-3, "max_steps": 60},
    }
    runs = {name: train({**common, **more}, output=root / name) for name, more in kinds.items()}
    return Seen(base, runs)


@pytest.fixture(scope="module")
def server(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoradockServer]:
    engine: dict[str, Any] = {
        "dtype": "float32",
        "max_loras": 2,
        "kv_cache_gib": 1,
        "max_lora_rank": 8,
        "max_model_len": 128,
    }
    engine |= {"enable_tower_connector_lora": True}
    with loradock_server(seen.base, tmp_path_factory.mktemp("served") / "data", engine=engine) as running:
        for name, run in seen.runs.items():
            running.loradock("push", str(run.directory), name)
        yield running


def ask(server: LoradockServer, model: str, image: Image.Image) -> list[int]:
    """The new tokens of a greedy chat about an image."""
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": QUESTION}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"return_token_ids": True}, timeout=300)
    assert answer.status_code == 200, f"{answer.text}\n{server.logs()}"
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


@torch.inference_mode()
def expected(model_dir: Path, adapter: Path | None, base: Path, image: Image.Image) -> tuple[list[int], str]:
    """What transformers (+ PEFT) answers, greedily."""
    processor: Any = AutoProcessor.from_pretrained(base)  # type: ignore[no-untyped-call]
    model: Any = AutoModelForImageTextToText.from_pretrained(model_dir)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["language", "connector", "selective"])
def test_training_brings_answers_nearer_to_the_truth(seen: Seen, name: str) -> None:
    told = seen.runs[name].summary["similarity"]
    assert told["own"]["after"] < 0.1 < told["own"]["before"]
    assert told["embedder"]["after"] < 0.1 < told["embedder"]["before"]
    assert seen.runs[name].summary["score"]["value"] == told["own"]["after"]


@pytest.mark.parametrize(
    ("name", "placement"), [("language", "shared"), ("connector", "shared"), ("selective", "dedicated")]
)
def test_served_model_sees_what_the_trained_one_sees(
    server: LoradockServer, seen: Seen, name: str, placement: str
) -> None:
    checkpoint = seen.runs[name].checkpoint
    model, adapter = (checkpoint, None) if name == "selective" else (seen.base, checkpoint)
    assert server.card(name)["placement"] == placement
    for colour in COLOURS:
        image = square(colour, ASKED_SIZE)
        tokens, text = expected(model, adapter, seen.base, image)
        assert text == colour
        assert ask(server, name, image) == tokens


def test_base_is_asked_beside_them_and_stays_itself(server: LoradockServer, seen: Seen) -> None:
    for colour in ("red", "blue"):
        image = square(colour, ASKED_SIZE)
        assert ask(server, "base", image) == expected(seen.base, None, seen.base, image)[0]
