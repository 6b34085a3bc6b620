"""Malformed checkpoints, each with the status, the code and the place that a gateway has to answer it with.

Each is made from an adapter that is right but for one thing. Malformed requests are in malformed_requests.py. Knows
nothing of how they are sent.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loradock_adapters.passport import Passport, PassportBase, write_passport
from loradock_testing.checkpoints import (
    LLAMA,
    PREFIX,
    Tensor,
    f32,
    lora_config,
    lora_tensors,
    safetensors_bytes,
    with_header,
    write_full,
    write_json,
    zeros,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
FIRST_A, FIRST_B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


@dataclass(frozen=True)
class Answer:
    """What a malformed upload is answered with."""

    code: str
    where: str
    status: int = 422


Make = Callable[[Path], object]


def _weights(raw: bytes) -> Make:
    return lambda directory: (directory / WEIGHTS).write_bytes(raw)


def _header(document: object, data_bytes: int = 24) -> Make:
    return _weights(with_header(json.dumps(document).encode(), bytes(data_bytes)))


def _tensors(changes: Mapping[str, Tensor | None], *, rename: tuple[str, str] = ("", "")) -> Make:
    tensors: dict[str, Tensor | None] = {**lora_tensors(), **changes}
    kept = {name.replace(*rename): tensor for name, tensor in tensors.items() if tensor is not None}
    return _weights(safetensors_bytes(kept))


def _config(**settings: Any) -> Make:
    return lambda directory: write_json(directory / CONFIG, lora_config(**settings))


def _file(name: str, raw: bytes) -> Make:
    return lambda directory: (directory / name).write_bytes(raw)


def _zip_bomb() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_model.safetensors", bytes(16 << 20))
    return packed.getvalue()


def _tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../etc/cron.d/x"))
    return packed.getvalue()


def _cut(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


def _without_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def _other_base(directory: Path) -> None:
    write_passport(directory, Passport(base=PassportBase(model_id="other", weights_sha256="0" * 64)))


def _merged_beside(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(safetensors_bytes({"a": f32(1)}))


def _full(change: Callable[[Path], object], shards: int = 1) -> Make:
    def made(directory: Path) -> None:
        for name in (CONFIG, WEIGHTS):
            (directory / name).unlink()
        write_full(directory, shards=shards)
        change(directory)

    return made


def _reindex(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["lm_head.weight"] = "model-00009-of-00002.safetensors"
    write_json(path, index)


def _swap_shards(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    (file,) = other - {index["weight_map"]["lm_head.weight"]}
    index["weight_map"]["lm_head.weight"] = file
    write_json(path, index)


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NAN, INF = float("nan"), float("inf")
ZERO_B = {name: f32(*tensor[1], value=0.0) for name, tensor in lora_tensors().items() if "lora_B" in name}
SHAPES = {"a": _entry([4], 0, 16), "b": _entry([4], 8, 24)}

DIRECTORIES: dict[str, tuple[Make, Answer]] = {
    "empty_weights": (_weights(b""), Answer("header_truncated", WEIGHTS)),
    "truncated_header": (_weights(struct.pack("<Q", 4000) + b'{"a":'), Answer("header_truncated", WEIGHTS)),
    "truncated_data": (
        _cut,
        Answer("tensor_out_of_file", f"{WEIGHTS}: {PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"),
    ),
    "header_of_2_to_the_60": (_weights(struct.pack("<Q", 1 << 60) + b"{}"), Answer("header_too_long", WEIGHTS)),
    "header_of_all_ones": (_weights(b"\xff" * 8 + b"{}"), Answer("header_too_long", WEIGHTS)),
    "header_not_utf8": (_weights(with_header(b'{"\xff":1}')), Answer("header_not_json", WEIGHTS)),
    "header_nested_deeply": (_weights(with_header(b'{"a":' * 50_000)), Answer("header_not_json", WEIGHTS)),
    "header_is_a_list": (_weights(with_header(b"[]")), Answer("header_not_json", WEIGHTS)),
    "header_of_too_many_values": (
        _weights(with_header(b'{"a":[' + b"1," * 2_100_000 + b"1]}")),
        Answer("header_too_many", WEIGHTS),
    ),
    "duplicate_tensor": (_weights(with_header(b'{"a":{},"a":{}}')), Answer("header_duplicate_key", WEIGHTS)),
    "duplicate_field": (
        _weights(with_header(b'{"a":{"dtype":"F32","dtype":"I8"}}')),
        Answer("header_duplicate_key", WEIGHTS),
    ),
    "metadata_of_numbers": (_header({"__metadata__": {"a": 1}}, 0), Answer("header_metadata", WEIGHTS)),
    "overlapping_offsets": (_header(SHAPES), Answer("tensor_overlap", f"{WEIGHTS}: b")),
    "gap_between_tensors": (_header({"a": _entry([4], 8, 24)}), Answer("tensor_gap", f"{WEIGHTS}: a")),
    "trailing_bytes": (_header({"a": _entry([4], 0, 16)}, 99), Answer("trailing_bytes", WEIGHTS)),
    "reversed_offsets": (_header({"a": _entry([4], 16, 0)}), Answer("tensor_offsets", f"{WEIGHTS}: a")),
    "negative_offsets": (_header({"a": _entry([4], -16, 0)}), Answer("tensor_offsets", f"{WEIGHTS}: a")),
    "claims_10_gb_of_data": (
        _header({"a": _entry([2_500_000_000], 0, 10**10)}),
        Answer("tensor_out_of_file", f"{WEIGHTS}: a"),
    ),
    "shape_times_dtype": (_header({"a": _entry([5], 0, 16)}, 16), Answer("tensor_size", f"{WEIGHTS}: a")),
    "shape_overflows": (_header({"a": _entry([2**40, 2**40, 0], 0, 0)}, 0), Answer("tensor_shape", f"{WEIGHTS}: a")),
    "shape_negative": (_header({"a": _entry([-4], 0, 16)}), Answer("tensor_shape", f"{WEIGHTS}: a")),
    "dtype_unknown": (_header({"a": _entry([4], 0, 16, "F33")}), Answer("tensor_dtype", f"{WEIGHTS}: a")),
    "field_too_many": (
        _header({"a": {**_entry([4], 0, 16), "strides": [1]}}, 16),
        Answer("tensor_fields", f"{WEIGHTS}: a"),
    ),
    "tensor_name_with_an_escape": (_header({"a\x1b[2J": _entry([6], 0, 24)}), Answer("tensor_name", WEIGHTS)),
    "tensor_name_in_cyrillic": (_header({"q_pr\u043ej": _entry([6], 0, 24)}), Answer("tensor_name", WEIGHTS)),
    "pickle_as_safetensors": (_weights(pickle.dumps({"a": 1}, protocol=4)), Answer("pickle_refused", WEIGHTS)),
    "torch_zip_as_safetensors": (_weights(_zip_bomb()), Answer("pickle_refused", WEIGHTS)),
    "gzip_as_safetensors": (_weights(gzip.compress(bytes(1000))), Answer("format_refused", WEIGHTS)),
    "program_as_safetensors": (_weights(b"\x7fELF" + bytes(60)), Answer("executable_refused", WEIGHTS)),
    "zip_bomb_as_tokenizer": (_file("tokenizer.json", _zip_bomb()), Answer("format_refused", "tokenizer.json")),
    "tar_as_tokenizer_model": (_file("tokenizer.model", _tar()), Answer("format_refused", "tokenizer.model")),
    "pickle_as_text": (_file("vocab.txt", pickle.dumps([1], protocol=5)), Answer("pickle_refused", "vocab.txt")),
    "script_as_readme": (_file("README.md", b"#!/bin/sh\nrm -rf /\n"), Answer("executable_refused", "README.md")),
    "template_not_utf8": (_file("chat_template.jinja", b"\xff\xfe"), Answer("text_not_utf8", "chat_template.jinja")),
    "template_with_nul": (_file("chat_template.jinja", b"a\0b"), Answer("text_not_utf8", "chat_template.jinja")),
    "template_endless": (
        _file("chat_template.jinja", b"x" * 300_000),
        Answer("chat_template_too_long", "chat_template"),
    ),
    "config_not_json": (_file(CONFIG, b"{r: 4}"), Answer("config_not_json", CONFIG)),
    "config_is_a_list": (_file(CONFIG, b"[]"), Answer("config_not_json", CONFIG)),
    "config_nested_deeply": (_file(CONFIG, b'{"a":' * 40 + b"1" + b"}" * 40), Answer("config_not_json", CONFIG)),
    "config_with_nan": (_file(CONFIG, b'{"r":4,"lora_alpha":NaN}'), Answer("config_not_json", CONFIG)),
    "config_duplicate_key": (_file(CONFIG, b'{"r":4,"r":8}'), Answer("config_duplicate_key", CONFIG)),
    "config_of_2_mb": (_file(CONFIG, b'{"r":4}' + b" " * (2 << 20)), Answer("config_too_long", CONFIG)),
    "config_missing": (lambda directory: (directory / CONFIG).unlink(), Answer("file_missing", CONFIG)),
    "config_flag_as_text": (_config(use_rslora="false"), Answer("config_type", f"{CONFIG}: use_rslora")),
    "rank_zero": (_config(r=0), Answer("rank", f"{CONFIG}: r")),
    "rank_endless": (_config(r=10**40), Answer("rank", f"{CONFIG}: r")),
    "alpha_as_text": (_config(lora_alpha="8"), Answer("lora_alpha", f"{CONFIG}: lora_alpha")),
    "targets_missing": (_config(target_modules=None), Answer("target_modules", f"{CONFIG}: target_modules")),
    "pattern_that_hangs": (
        _config(rank_pattern={"(a+)+$": 4}),
        Answer("pattern_unsafe", f"{CONFIG}: rank_pattern: (a+)+$"),
    ),
    "other_method": (_config(peft_type="IA3"), Answer("peft_type", f"{CONFIG}: peft_type")),
    "activated_lora": (_config(alora_invocation_tokens=[1]), Answer("alora", f"{CONFIG}: alora_invocation_tokens")),
    "pissa_without_its_start": (
        _config(init_lora_weights="pissa"),
        Answer("init_changes_base", f"{CONFIG}: init_lora_weights"),
    ),
    "fused_experts": (
        _config(target_parameters=["experts.w1"]),
        Answer("target_parameters", f"{CONFIG}: target_parameters"),
    ),
    "weights_missing": (_without_weights, Answer("weights_missing", WEIGHTS)),
    "no_tensors": (_weights(safetensors_bytes({})), Answer("no_lora_tensors", WEIGHTS)),
    "a_without_b": (_tensors({FIRST_B: None}), Answer("factor_missing", FIRST_A)),
    "wrong_shape": (_tensors({FIRST_A: f32(4, 32)}), Answer("shape_mismatch", Q0)),
    "wrong_rank": (_tensors({FIRST_A: f32(8, 16), FIRST_B: f32(16, 8)}), Answer("rank_mismatch", Q0)),
    "empty_tensor": (_tensors({FIRST_A: f32(0, 16)}), Answer("empty_tensor", FIRST_A)),
    "integer_matrix": (_tensors({FIRST_A: zeros("I8", 4, 16)}), Answer("adapter_dtype", Q0)),
    "unknown_tensor": (
        _tensors({f"{PREFIX}{Q0}.lora_C.weight": f32(4)}),
        Answer("unsupported_tensor", f"{PREFIX}{Q0}.lora_C.weight"),
    ),
    "layer_beyond": (
        _tensors({}, rename=("layers.1", "layers.7")),
        Answer("layer_beyond_base", "model.layers.7.self_attn.q_proj"),
    ),
    "module_of_another_family": (
        _tensors({}, rename=("self_attn.q_proj", "attn.c_attn")),
        Answer("module_not_in_base", "model.layers.0.attn.c_attn"),
    ),
    "target_lost": (_config(target_modules=["q_proj", "v_proj", "o_proj"]), Answer("target_without_tensors", "o_proj")),
    "other_vocabulary": (
        _tensors({f"{PREFIX}lm_head.lora_A.weight": f32(4, 16), f"{PREFIX}lm_head.lora_B.weight": f32(48, 4)}),
        Answer("vocab_mismatch", "lm_head"),
    ),
    "nan": (_tensors({FIRST_B: f32(16, 4, value=NAN)}), Answer("not_finite", f"{WEIGHTS}: {FIRST_B}")),
    "infinity": (_tensors({FIRST_A: f32(4, 16, value=INF)}), Answer("not_finite", f"{WEIGHTS}: {FIRST_A}")),
    "nothing_changed": (_tensors(ZERO_B), Answer("changes_nothing", WEIGHTS)),
    "two_checkpoints": (_merged_beside, Answer("two_checkpoints", "model.safetensors")),
    "wrong_base": (_other_base, Answer("base_weights_differ", "loradock.json: base.weights_sha256")),
    "passport_broken": (_file("loradock.json", b"[]"), Answer("passport_invalid", "loradock.json")),
    "not_a_checkpoint": (
        lambda directory: [path.rename(directory / f"x{i}.txt") for i, path in enumerate(sorted(directory.iterdir()))],
        Answer("not_a_checkpoint", CONFIG),
    ),
    "full_without_tokenizer": (
        _full(lambda d: (d / "tokenizer.json").unlink()),
        Answer("tokenizer_missing", "tokenizer.json"),
    ),
    "full_with_a_shard_missing": (_full(_reindex, 2), Answer("shard_missing", "model-00009-of-00002.safetensors")),
    "full_without_its_index": (
        _full(lambda d: (d / "model.safetensors.index.json").unlink(), 2),
        Answer("index_missing", "model.safetensors.index.json"),
    ),
    "full_of_unknown_architecture": (
        _full(lambda d: write_json(d / "config.json", {**LLAMA, "architectures": ["Nope"]})),
        Answer("architecture_unknown", "config.json: architectures"),
    ),
    # by their names alone: refused before a byte of them is asked for
    "pickle_by_name": (_file("adapter_model.bin", b"x"), Answer("pickle_refused", "adapter_model.bin", 400)),
    "archive_by_name": (_file("weights.tar.gz", b"x"), Answer("format_refused", "weights.tar.gz", 400)),
    "code_by_name": (_file("modeling.py", b"x"), Answer("file_not_allowed", "modeling.py", 400)),
    "case_collision": (_file("Adapter_Config.json", b"{}"), Answer("path_clash", "adapter_config.json", 400)),
}
