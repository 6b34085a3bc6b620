"""Rows with images as tokens, labels and pixels; and whole runs of a tiny Idefics3."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from loradock_testing.rows import WriteRows
from loradock_testing.tiny_vision import (
    IMAGE_TOKENS,
    data_url,
    make_idefics2,
    make_idefics3,
    make_smolvlm,
    png_bytes,
    square,
)
from loradock_train import train
from loradock_train.check import check
from loradock_train.config import TrainConfig
from loradock_train.config_file import config_from
from loradock_train.dataset import Collator, build_dataset
from loradock_train.encode import IGNORED, Encoder
from loradock_train.errors import DataError, ModelError
from loradock_train.loss import can_own_loss, own_loss
from loradock_train.model import base_config
from loradock_train.rows import Row, read_rows
from loradock_train.vision import VisionCollator, VisionEncoder, loss_sample, make_encoder, make_processor, probes_of

_ = IGNORED


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_idefics3(tmp_path_factory.mktemp("seeing") / "tiny-idefics3")


@pytest.fixture(scope="module")
def tokenizer(seeing: Path) -> Any:
    return AutoTokenizer.from_pretrained(seeing)


@pytest.fixture(scope="module")
def encoder(seeing: Path, tokenizer: Any) -> VisionEncoder:
    processor: Any = AutoProcessor.from_pretrained(seeing)  # type: ignore[no-untyped-call]
    return VisionEncoder(tokenizer, processor=processor)


def shown(colour: str, size: int = 24) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(square(colour, size))}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def row(*messages: tuple[str, Any], weights: Mapping[int, int] | None = None) -> Row:
    made = [{"role": role, "content": content} for role, content in messages]
    for index, weight in (weights or {}).items():
        made[index]["weight"] = weight
    return Row("rows.jsonl", 3, {"messages": made})


def colour_row(colour: str, size: int = 24) -> dict[str, Any]:
    return row(("user", [shown(colour, size), said("What?")]), ("assistant", colour)).values


# ---- tokens and labels --------------------------------------------------------------------------------------------

IMAGE = ["<fake_token_around_image>", "<global-img>", *["<image>"] * IMAGE_TOKENS, "<fake_token_around_image>"]
END = "<end_of_utterance>"


def pieces(tokenizer: Any, text: str) -> list[str]:
    tokens: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokens


def test_image_and_user_turn_are_masked_and_the_answer_is_learnt_through_its_stop(
    encoder: VisionEncoder, tokenizer: Any
) -> None:
    example = encoder.encode(row(("user", [shown("red"), said("Hi")]), ("assistant", "red")), "chat")
    head = ["<s>", *pieces(tokenizer, "User:"), *IMAGE, *pieces(tokenizer, " Hi"), END]
    head += pieces(tokenizer, "\nAssistant:")
    answer = [*pieces(tokenizer, " red"), END]
    tokens = [*head, *answer, *pieces(tokenizer, "\n")]
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == tokens
    learnt = tokenizer.convert_tokens_to_ids(answer)
    assert example.labels == [_] * len(head) + learnt + [_] * (len(tokens) - len(head) - len(answer))
    assert example.images_end == head.index("<image>") + IMAGE_TOKENS


def test_two_images_and_two_turns_learn_both_answers_and_no_image_token(encoder: VisionEncoder, tokenizer: Any) -> None:
    example = encoder.encode(
        row(
            ("user", [said("A"), shown("red"), said("B"), shown("blue", 40)]),
            ("assistant", "one"),
            ("user", [shown("green")]),
            ("assistant", [said("two")]),
        ),
        "chat",
    )
    assert tokenizer.convert_ids_to_tokens(example.input_ids).count("<image>") == 3 * IMAGE_TOKENS
    learnt = [label for label in example.labels if label != _]
    spans = [*pieces(tokenizer, " one"), END, *pieces(tokenizer, " two"), END]
    assert tokenizer.convert_ids_to_tokens(learnt) == spans


def test_answer_of_weight_0_is_not_learnt(encoder: VisionEncoder, tokenizer: Any) -> None:
    turns = (("user", [shown("red")]), ("assistant", "one"), ("user", "again"), ("assistant", "two"))
    example = encoder.encode(row(*turns, weights={1: 0}), "chat")
    learnt = [label for label in example.labels if label != _]
    assert tokenizer.convert_ids_to_tokens(learnt) == [*pieces(tokenizer, " two"), END]


def test_tokens_are_those_of_the_processor_for_the_whole_row(encoder: VisionEncoder) -> None:
    """`check` raises where they are not: the next test shows it."""
    encoder.check(row(("user", [said("A"), shown("red"), shown("blue", 60)]), ("assistant", "x")))


def test_processor_that_places_images_otherwise_is_refused(encoder: VisionEncoder) -> None:
    other = VisionEncoder(encoder.tokenizer, processor=encoder.processor)
    checked = row(("user", [shown("red")]), ("assistant", "x"))
    other.expansion(checked.images[0])[1] += 1
    with pytest.raises(ModelError, match="places images in a way that is not trained here"):
        other.check(checked)


def test_literal_image_token_in_a_text_is_refused(encoder: VisionEncoder) -> None:
    with pytest.raises(DataError, match="1 images, but 2 times <image>"):
        encoder.encode(row(("user", [shown("red"), said("<image>")]), ("assistant", "x")), "chat")


def test_model_that_sees_nothing_refuses_images_and_takes_parts_of_text(
    base: Path, write_rows: WriteRows, tokenizer: Any
) -> None:
    path = write_rows("rows.jsonl", [colour_row("red")])
    config, _notices = config_from({"model_id": str(base), "train_path": str(path)}, folder=path.parent)
    rows = read_rows(config.train_path, "auto", "train_path")
    with pytest.raises(DataError, match=r"a llama model sees none(.|\n)*line 1"):
        make_processor(config, base_config(config), rows, tokenizer)
    plain = AutoTokenizer.from_pretrained(base)
    parts, text = (Encoder(plain).encode(row(("user", c), ("assistant", "x")), "chat") for c in ([said("hi")], "hi"))
    assert parts == text


def test_cut_through_an_image_is_refused_with_the_place(encoder: VisionEncoder, write_rows: WriteRows) -> None:
    rows = read_rows((str(write_rows("r.jsonl", [colour_row("red")])),), "auto", "train_path")
    with pytest.raises(DataError, match=r"line 1: cut to context_length 8, half an image would be left"):
        build_dataset(rows, encoder, 8, "truncate", False, "train_path")


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batch_pads_tokens_and_tiles_and_masks_both(encoder: VisionEncoder, write_rows: WriteRows) -> None:
    two = row(("user", [shown("red"), shown("blue")]), ("assistant", "x")).values
    none = row(("user", "hello"), ("assistant", "x")).values
    rows = read_rows((str(write_rows("r.jsonl", [two, colour_row("red"), none])),), "auto", "train_path")
    dataset, _report = build_dataset(rows, encoder, 128, "error", False, "train_path")
    collate = VisionCollator(Collator(0), encoder.processor.image_processor)
    batch = collate([dataset[index] for index in range(3)])
    assert batch["pixel_values"].shape == (3, 2, 3, 32, 32)
    assert batch["pixel_attention_mask"].flatten(2).sum(-1).tolist() == [[1024, 1024], [1024, 0], [0, 0]]
    lengths = dataset["length"].tolist() if hasattr(dataset["length"], "tolist") else list(dataset["length"])
    assert batch["attention_mask"].sum(-1).tolist() == lengths
    assert bool((batch["labels"][batch["attention_mask"] == 0] == _).all())
    assert bool((batch["labels"][batch["input_ids"] == encoder.processor.image_token_id] == _).all())
    assert "pixel_values" not in collate([dataset[2]])


def test_own_loss_of_a_batch_with_images_is_the_models_own(
    seeing: Path, encoder: VisionEncoder, write_rows: WriteRows
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(seeing)
    rows = read_rows((str(write_rows("r.jsonl", [colour_row("red"), colour_row("blue", 50)])),), "auto", "train_path")
    dataset, _report = build_dataset(rows, encoder, 128, "error", False, "train_path")
    ids, pixels = loss_sample(dataset, encoder.processor)
    assert can_own_loss(model, ids, pixels)
    batch = VisionCollator(Collator(0), encoder.processor.image_processor)([dataset[0], dataset[1]])
    batch.pop("num_tokens")
    theirs = model(**batch).loss
    theirs.backward()
    connector = model.model.connector.modality_projection.proj.weight
    expected, connector.grad = connector.grad, None
    with own_loss(model):
        ours = model(**batch).loss
        ours.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(connector.grad, expected, atol=1e-5, rtol=1e-4)


def test_model_whose_logits_with_pixels_are_more_than_the_head_keeps_its_own_loss(
    seeing: Path, encoder: VisionEncoder, write_rows: WriteRows
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(seeing)
    rows = read_rows((str(write_rows("r.jsonl", [colour_row("red")])),), "auto", "train_path")
    dataset, _report = build_dataset(rows, encoder, 128, "error", False, "train_path")
    ids, pixels = loss_sample(dataset, encoder.processor)
    assert not can_own_loss(model, ids, {**pixels, "unheard_of": torch.zeros(1)})
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        answer = forward(**inputs)
        answer.loss = answer.loss * (2 if "pixel_values" in inputs else 1)
        return answer

    model.forward = scaled
    assert can_own_loss(model, ids[:8])
    assert not can_own_loss(model, ids, pixels)


def test_probes_of_a_row_with_an_image_are_with_and_without_it(encoder: VisionEncoder) -> None:
    prompts, pixels = probes_of(encoder, [Row("r", 1, colour_row("red"))], "chat")
    image = encoder.processor.image_token_id
    assert [prompt.count(image) for prompt in prompts] == [0, IMAGE_TOKENS]
    assert {number: value["pixel_values"].shape for number, value in pixels.items()} == {1: (1, 1, 3, 32, 32)}


# ---- runs ------------------------------------------------------------------------------------------------------------

PATTERN = r".*(text_model.*\.(q|k|v|o|gate|up|down)_proj|connector.*proj)"


def config_of(seeing: Path, data: Path, **more: Any) -> dict[str, Any]:
    common = {"model_id": str(seeing), "train_path": str(data), "mixed_precision": "no", "max_steps": 4}
    common |= {"train_batch_size_per_device": 2, "context_length": 64, "learning_rate": 0.01, "num_probe_prompts": 1}
    return common | more


def test_lora_by_pattern_trains_text_and_connector_and_its_passport_asks_by_text_alone(
    seeing: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows("rows.jsonl", [colour_row("red"), colour_row("blue"), colour_row("green")])
    lora = {"r": 4, "target_modules": PATTERN}
    run = train(config_of(seeing, data, lora_config=lora), output=tmp_path / "run")
    config = json.loads((run.checkpoint / "adapter_config.json").read_text())
    assert config["target_modules"] == PATTERN
    assert run.summary["parameters"]["trainable"] == 9472
    assert run.summary["used_own_loss"]
    assert run.summary["proof"]["prompts"] == 2
    passport = json.loads((run.checkpoint / "loradock.json").read_text())
    image = AutoTokenizer.from_pretrained(seeing).convert_tokens_to_ids("<image>")
    (probe,) = passport["probe"]["prompts"]
    assert image not in probe["prompt_token_ids"]
    assert len(passport["stop_token_ids"]) == 2


def test_full_checkpoint_has_its_processor_and_loads_alone(seeing: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", [colour_row("red"), colour_row("blue")])
    run = train(config_of(seeing, data), output=tmp_path / "run")
    processor: Any = AutoProcessor.from_pretrained(run.checkpoint)  # type: ignore[no-untyped-call]
    assert processor.image_processor.max_image_size["longest_edge"] == 32
    assert processor.chat_template
    model: Any = AutoModelForImageTextToText.from_pretrained(run.checkpoint)
    assert type(model).__name__ == "Idefics3ForConditionalGeneration"


def test_packed_rows_with_images_are_refused(seeing: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", [colour_row("red")])
    with pytest.raises(ModelError, match="rows with images are not packed; set packing: false"):
        train(config_of(seeing, data, packing=True), output=tmp_path / "run")


def test_pattern_that_matches_nothing_is_refused_with_a_name(
    seeing: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows("rows.jsonl", [colour_row("red")])
    with pytest.raises(ModelError, match=r"matches no module's whole name; one of them is lm_head"):
        train(config_of(seeing, data, lora_config={"target_modules": ".*attention"}), output=tmp_path / "run")


def test_encoder_of_a_config_sees_where_its_model_does(seeing: Path, write_rows: WriteRows, tokenizer: Any) -> None:
    data = write_rows("rows.jsonl", [colour_row("red")])
    config, _notices = config_from(config_of(seeing, data), folder=data.parent)
    processor = make_processor(config, base_config(config), read_rows(config.train_path, "auto", "t"), tokenizer)
    assert isinstance(make_encoder(config, tokenizer, processor), VisionEncoder)
    assert type(make_encoder(config, tokenizer, None)) is Encoder


def test_idefics2_trains_and_is_told_that_nobody_serves_it(write_rows: WriteRows, tmp_path: Path) -> None:
    base = make_idefics2(tmp_path / "tiny-idefics2")
    data = write_rows("rows.jsonl", [colour_row("red"), colour_row("blue")])
    trainable = ["(text_model|connector).*proj"]
    run = train(config_of(base, data, trainable=trainable, learning_rate=1e-3), output=tmp_path / "run")
    assert run.summary["final_train_loss"] > 0
    assert run.summary["proof"]["base"] > 0
    told = " ".join(run.summary["notices"])
    assert "vLLM 0.32.0 does not list 'Idefics2ForConditionalGeneration'" in told


def test_killed_run_with_images_goes_on_to_the_same_bits(seeing: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    for colour in ("red", "blue", "green"):
        (tmp_path / f"{colour}.png").write_bytes(png_bytes(square(colour)))
    rows = [
        row(("user", [{"type": "image", "path": f"{colour}.png"}, said(text)]), ("assistant", colour)).values
        for colour in ("red", "blue", "green")
        for text in ("What?", "Which colour is it?")
    ]
    data = write_rows("rows.jsonl", rows)
    lora = {"r": 4, "lora_dropout": 0.2, "target_modules": PATTERN}
    similarity = {"max_new_tokens": 3, "path": str(data)}
    config = config_of(seeing, data, lora_config=lora, max_steps=6, save_steps=2, similarity=similarity)
    killed = {"config": config, "output": str(tmp_path / "killed")}
    legs = [
        {"config": config, "output": str(tmp_path / "alone"), "resume": False},
        {**killed, "resume": False, "kill_at_batch": 4},
        {**killed, "resume": True},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "loradock_testing.train_legs"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input=json.dumps(legs), capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [0, -9, 0], done.stderr
    for name in ("checkpoint/adapter_model.safetensors", "similarity/before.csv", "similarity/after.csv"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_check_looks_at_images_and_says_where_the_adapter_goes(
    seeing: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows("rows.jsonl", [colour_row("red"), colour_row("blue")])
    lora = {"target_modules": r".*text_model.*_proj"}
    values = {"model_id": str(seeing), "train_path": str(data), "context_length": 64, "lora_config": lora}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    report = check(tmp_path / "c.yaml")
    assert report.problems == []
    assert report.forecast is not None
    assert report.forecast.verdict.placement == "shared"
    assert report.examined["train"].findings == (), "equal questions about other images are no copies"


def test_streamed_rows_bring_their_images(seeing: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    data = write_rows("rows.jsonl", [colour_row("red"), colour_row("blue")])
    whole = train(config_of(seeing, data, max_steps=1), output=tmp_path / "whole")
    run = train(config_of(seeing, data, max_steps=1, streaming=True), output=tmp_path / "run")
    assert run.final_train_loss == pytest.approx(whole.final_train_loss, abs=1e-5)


def test_image_in_a_later_row_is_refused_by_a_model_that_sees_none(base: Path) -> None:
    with pytest.raises(DataError, match=r"the model sees none(.|\n)*line 3"):
        Encoder(AutoTokenizer.from_pretrained(base)).encode(Row("rows.jsonl", 3, colour_row("red")), "chat")


# ---- recipes, and what needs more than every machine has ------------------------------------------------

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


@pytest.mark.parametrize(("name", "kind"), [("idefics3-lora", "lora"), ("idefics3-selective-full", "full")])
def test_recipe_is_a_config_and_selects_what_it_says(seeing: Path, name: str, kind: str) -> None:
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    config = TrainConfig.model_validate({**values, "train_path": ("t",), "valid_path": ("v",)})
    assert config.kind == kind
    assert (config.peak_learning_rate, config.max_grad_norm, config.epoch_limit) == (1e-5, 0.3, 3)
    names = [name for name, _module in AutoModelForImageTextToText.from_pretrained(seeing).named_modules()]
    if config.lora_config is not None:
        pattern = str(config.lora_config.target_modules)
        hit = [name for name in names if re.fullmatch(pattern, name)]
        assert len(hit) == 2 * 7
        assert all(".text_model." in name for name in hit)
    else:
        assert config.trainable is not None
        hit = [name for name in names if any(re.search(pattern, name + ".weight") for pattern in config.trainable)]
        assert "model.connector.modality_projection.proj" in hit
        assert not [name for name in hit if "vision" in name or "lm_head" in name]


@pytest.mark.skipif(
    find_spec("torchvision") is None or find_spec("num2words") is None,
    reason="SmolVLM's processor needs torchvision and num2words: pip install torchvision num2words",
)
def test_smolvlm_is_encoded_as_its_processor_does(tmp_path: Path, write_rows: WriteRows) -> None:
    base = make_smolvlm(tmp_path / "tiny-smolvlm")
    data = write_rows("rows.jsonl", [colour_row("red"), colour_row("blue")])
    run = train(config_of(base, data, lora_config={"r": 4, "target_modules": PATTERN}), output=tmp_path / "run")
    assert run.summary["proof"]["base"] > 0
