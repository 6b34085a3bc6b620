"""Reading a checkpoint directory: what it is, what it brings along, and what is broken in it."""

import json
from pathlib import Path

import pytest

from loradock_adapters.checkpoint import MAX_CONFIG_BYTES, read_checkpoint, resolve_checkpoint_dir
from loradock_adapters.errors import CheckpointError, NotFoundError
from loradock_adapters.passport import Passport, PassportBase, read_passport, weights_sha256, write_passport
from loradock_testing.checkpoints import LLAMA, write_adapter, write_full, write_json


def codes(directory: Path) -> list[str]:
    return [problem.code for problem in read_checkpoint(directory).problems]


def test_read_checkpoint_adapter_recognised(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_adapter(tmp_path, rank=4))
    assert checkpoint.kind == "lora"
    assert checkpoint.config["r"] == 4
    assert len(checkpoint.tensors) == 8
    assert checkpoint.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 16)
    assert checkpoint.problems == ()
    assert (checkpoint.chat_template, checkpoint.stop_token_ids, checkpoint.passport) == (None, (), None)


def test_read_checkpoint_full_model_in_one_file_recognised(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_full(tmp_path))
    assert (checkpoint.kind, checkpoint.weight_map, checkpoint.problems) == ("full", None, ())
    assert checkpoint.tensors["lm_head.weight"].shape == (40, 16)


def test_read_checkpoint_sharded_model_has_its_index(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_full(tmp_path, shards=3))
    assert len(checkpoint.shards) == 3
    assert checkpoint.weight_map is not None
    assert checkpoint.weight_map.keys() == checkpoint.tensors.keys()


def test_read_checkpoint_adapter_beside_its_bases_config_is_an_adapter(tmp_path: Path) -> None:
    write_json(write_adapter(tmp_path) / "config.json", LLAMA)
    assert read_checkpoint(tmp_path).kind == "lora"


def test_read_checkpoint_run_directory_stands_for_its_checkpoint(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint")
    write_json(tmp_path / "run.json", {})
    assert resolve_checkpoint_dir(tmp_path) == tmp_path / "checkpoint"
    assert read_checkpoint(tmp_path).directory == tmp_path / "checkpoint"


def test_read_checkpoint_folder_called_checkpoint_alone_does_not_count(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint")
    assert resolve_checkpoint_dir(tmp_path) == tmp_path


def test_read_checkpoint_neither_adapter_nor_model_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert [problem.code for problem in caught.value.problems] == ["not_a_checkpoint", "pickle_refused"]
    assert "save_pretrained" in caught.value.problems[0].fix


def test_read_checkpoint_missing_directory_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_checkpoint(tmp_path / "none")


def test_read_checkpoint_every_broken_part_named_at_once(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    (tmp_path / "loradock.json").write_text("[]")
    (tmp_path / "generation_config.json").write_text("nonsense")
    (tmp_path / "extra.pt").write_bytes(b"x")
    assert codes(tmp_path) == [
        "pickle_refused",
        "config_not_json",
        "header_truncated",
        "passport_invalid",
        "config_not_json",
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[]", "config_not_json"),
        ("[" * 90_000, "config_not_json"),
        (json.dumps({"a": "x" * MAX_CONFIG_BYTES}), "config_too_long"),
    ],
)
def test_read_checkpoint_bad_adapter_config_named(tmp_path: Path, text: str, code: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert codes(tmp_path) == [code]


def test_read_checkpoint_adapter_weights_without_config_named(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert codes(tmp_path) == ["file_missing"]


def test_read_checkpoint_bad_index_named(tmp_path: Path) -> None:
    write_json(write_full(tmp_path, shards=2) / "model.safetensors.index.json", {"weight_map": {"a": 1}})
    assert codes(tmp_path) == ["index_invalid"]


def test_chat_template_file_wins_over_tokenizer_config(tmp_path: Path) -> None:
    write_json(write_adapter(tmp_path) / "tokenizer_config.json", {"chat_template": "from config"})
    assert read_checkpoint(tmp_path).chat_template == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert read_checkpoint(tmp_path).chat_template == "from file"


def test_chat_template_passport_wins(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "chat_template.jinja").write_text("from file")
    base = PassportBase(model_id="b")
    write_passport(tmp_path, Passport(base=base, chat_template="from passport", stop_token_ids=(7,)))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.chat_template, checkpoint.stop_token_ids) == ("from passport", (7,))


def test_chat_template_default_of_several(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}, "nonsense"]
    write_json(write_adapter(tmp_path) / "tokenizer_config.json", {"chat_template": templates})
    assert read_checkpoint(tmp_path).chat_template == "d"


def test_chat_template_too_long_or_not_text_named(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "chat_template.jinja").write_text("x" * 300_000)
    assert codes(tmp_path) == ["chat_template_too_long"]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert codes(tmp_path) == ["text_not_utf8"]


@pytest.mark.parametrize(("eos", "ids"), [(2, (2,)), ([2, 5, 2], (2, 5)), (None, ()), ("2", ())])
def test_stop_tokens_of_generation_config(tmp_path: Path, eos: object, ids: tuple[int, ...]) -> None:
    write_json(write_adapter(tmp_path) / "generation_config.json", {"eos_token_id": eos})
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.stop_token_ids, checkpoint.problems) == (ids, ())


@pytest.mark.parametrize("eos", [[-1], [True], ["2"], list(range(65))])
def test_stop_tokens_insane_named(tmp_path: Path, eos: object) -> None:
    write_json(write_adapter(tmp_path) / "generation_config.json", {"eos_token_id": eos})
    assert codes(tmp_path) == ["stop_tokens_invalid"]


def test_passport_written_and_read_is_the_same(tmp_path: Path) -> None:
    passport = Passport(
        base=PassportBase(model_id="somewhere/base", weights_sha256="ab" * 32),
        chat_template="{{ messages }}",
        stop_token_ids=(1, 2),
        context_length=128,
        metrics={"eval_loss": 1.5},
        versions={"peft": "0.21.2"},
    )
    write_passport(tmp_path, passport)
    assert read_passport(tmp_path) == passport


def test_passport_of_a_newer_writer_read(tmp_path: Path) -> None:
    write_json(tmp_path / "loradock.json", {"format": 1, "base": {"model_id": "b", "new": 1}, "licence": "x"})
    passport = read_passport(tmp_path)
    assert passport is not None
    assert passport.base.model_id == "b"


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"format": 2, "base": {"model_id": "b"}}, "loradock.json: format"),
        ({"format": 1}, "loradock.json: base"),
        ({"base": {"model_id": "b", "weights_sha256": "xyz"}}, "loradock.json: base.weights_sha256"),
        ({"base": {"model_id": "b"}, "stop_token_ids": ["a"]}, "loradock.json: stop_token_ids.0"),
        ({"base": {"model_id": "b"}, "context_length": 0}, "loradock.json: context_length"),
    ],
)
def test_passport_broken_names_the_key(tmp_path: Path, document: object, where: str) -> None:
    write_json(tmp_path / "loradock.json", document)
    with pytest.raises(CheckpointError) as caught:
        read_passport(tmp_path)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("passport_invalid", where)]


def test_weights_sha256_follows_names_and_bytes(tmp_path: Path) -> None:
    a, b = write_full(tmp_path / "a"), write_full(tmp_path / "b")
    assert weights_sha256(a) == weights_sha256(b)
    (b / "model.safetensors").rename(b / "other.safetensors")
    assert weights_sha256(a) != weights_sha256(b)
    with pytest.raises(NotFoundError):
        weights_sha256(tmp_path)
