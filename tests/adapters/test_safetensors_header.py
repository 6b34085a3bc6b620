"""The strict header parser: every way in which a header can lie, and agreement with the reference implementation."""

import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loradock_adapters.errors import CheckpointError, HeaderError, NotFoundError
from loradock_adapters.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, TensorInfo, read_header
from loradock_testing.checkpoints import f32, safetensors_bytes, with_header, zeros


def tensor(
    dtype: object = "F32", shape: object = (2, 3), begin: object = 0, end: object = 24, **more: Any
) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def header(document: object, data_bytes: int = 24) -> bytes:
    return with_header(json.dumps(document).encode(), bytes(data_bytes))


def read(raw: bytes) -> Mapping[str, TensorInfo]:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(raw)
        file.flush()
        return read_header(Path(file.name))


def codes_of(raw: bytes) -> list[str]:
    with pytest.raises(HeaderError) as caught:
        read(raw)
    assert all(str(problem).isprintable() for problem in caught.value.problems)
    return [problem.code for problem in caught.value.problems]


def test_read_header_well_formed_has_types_shapes_and_file_positions(tmp_path: Path) -> None:
    raw = safetensors_bytes({"a": f32(2, 3), "b": zeros("BF16", 4), "c": zeros("I8")}, {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(raw)
    start = len(raw) - 24 - 8 - 1
    assert read_header(tmp_path / "x.safetensors") == {
        "a": TensorInfo("F32", (2, 3), (start, start + 24)),
        "b": TensorInfo("BF16", (4,), (start + 24, start + 32)),
        "c": TensorInfo("I8", (), (start + 32, start + 33)),
    }


def test_read_header_tensors_in_any_order_read() -> None:
    found = read(header({"late": tensor(shape=(1,), begin=4, end=8), "early": tensor(shape=(1,), begin=0, end=4)}, 8))
    assert found["late"].offsets[0] == found["early"].offsets[1]


def test_read_header_no_tensors_and_padding_read() -> None:
    assert read(with_header(b"{}      ")) == {}


def test_read_header_empty_tensors_read() -> None:
    found = read(header({"a": tensor(shape=(0, 7), end=0), "b": tensor(shape=(1,), end=4)}, 4))
    assert found["a"].size_bytes == 0


def test_read_header_missing_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_header(tmp_path / "none.safetensors")


def test_header_error_is_a_checkpoint_error() -> None:
    assert issubclass(HeaderError, CheckpointError)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_read_header_whose_length_looks_like_a_pickle_is_read(length: int) -> None:
    raw = with_header(json.dumps({"a": tensor()}).encode().ljust(length), bytes(24))
    assert raw.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    assert list(read(raw)) == ["a"]


OVERLAP = {"a": tensor(shape=(4,), begin=0, end=16), "b": tensor(shape=(4,), begin=8, end=24)}

FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header_truncated"),
    "seven_bytes": (b"1234567", "header_truncated"),
    "length_2_60": (struct.pack("<Q", 1 << 60) + b"{}", "header_too_long"),
    "length_max": (b"\xff" * 8 + b"{}", "header_too_long"),
    "length_over_limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "header_too_long"),
    "length_over_file": (struct.pack("<Q", 100) + b"{}", "header_truncated"),
    "length_zero": (struct.pack("<Q", 0), "header_not_json"),
    "pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00", "pickle_refused"),
    "elf": (b"\x7fELF\x02\x01\x01\x00" + bytes(64), "executable_refused"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(64), "format_refused"),
    "torch_zip": (b"PK\x03\x04" + bytes(64), "pickle_refused"),
    "space_first": (with_header(b" {}"), "header_not_json"),
    "list": (with_header(b"[]"), "header_not_json"),
    "cut_json": (with_header(b'{"a":'), "header_not_json"),
    "two_documents": (with_header(b"{}{}"), "header_not_json"),
    "not_utf8": (with_header(b'{"\xff": 1}'), "header_not_json"),
    "nan": (with_header(b'{"a": NaN}'), "header_not_json"),
    "deep": (with_header(b'{"a":' * 50_000), "header_not_json"),
    "huge_number": (with_header(b'{"a":' + b"9" * 10_000 + b"}"), "tensor_fields"),
    "duplicate_tensor": (with_header(b'{"a":1,"a":1}'), "header_duplicate_key"),
    "duplicate_field": (with_header(b'{"a":{"dtype":"F32","dtype":"I8"}}'), "header_duplicate_key"),
    "duplicate_metadata": (with_header(b'{"__metadata__":{"a":"1","a":"2"}}'), "header_duplicate_key"),
    "metadata_list": (header({"__metadata__": []}, 0), "header_metadata"),
    "metadata_number": (header({"__metadata__": {"a": 1}}, 0), "header_metadata"),
    "empty_name": (header({"": tensor()}), "tensor_name"),
    "control_character_name": (header({"a\x1b[31m": tensor()}), "tensor_name"),
    "nul_name": (header({"a\x00b": tensor()}), "tensor_name"),
    "surrogate_name": (with_header(b'{"\\ud800": {}}'), "header_not_json"),
    "surrogate_metadata": (with_header(b'{"__metadata__": {"a": "\\udfff"}}'), "header_not_json"),
    "cyrillic_name": (header({"q_pr\u043ej": tensor()}), "tensor_name"),
    "long_name": (header({"a" * 513: tensor()}), "tensor_name"),
    "not_an_object": (header({"a": [1]}), "tensor_fields"),
    "field_missing": (header({"a": {"dtype": "F32", "shape": []}}), "tensor_fields"),
    "field_unknown": (header({"a": tensor(strides=[1])}), "tensor_fields"),
    "dtype_unknown": (header({"a": tensor("F33")}), "tensor_dtype"),
    "dtype_number": (header({"a": tensor(32)}), "tensor_dtype"),
    "shape_negative": (header({"a": tensor(shape=(-2, -3))}), "tensor_shape"),
    "shape_float": (header({"a": tensor(shape=(2.0, 3))}), "tensor_shape"),
    "shape_bool": (header({"a": tensor(shape=(True, 6))}), "tensor_shape"),
    "shape_huge": (header({"a": tensor(shape=(2**60, 2**60))}), "tensor_shape"),
    "shape_overflows_before_its_zero": (header({"a": tensor(shape=(2**40, 2**40, 0), end=0)}, 0), "tensor_shape"),
    "shape_minus_zero": (with_header(b'{"a":{"dtype":"I8","shape":[-0],"data_offsets":[0,0]}}'), "tensor_shape"),
    "shape_text": (header({"a": tensor(shape="6")}), "tensor_shape"),
    "shape_long": (header({"a": tensor(shape=(1,) * 9, end=4)}, 4), "tensor_shape"),
    "offsets_three": (header({"a": {**tensor(), "data_offsets": [0, 24, 24]}}), "tensor_offsets"),
    "offsets_reversed": (header({"a": tensor(begin=24, end=0)}), "tensor_offsets"),
    "offsets_negative": (header({"a": tensor(begin=-24, end=0)}), "tensor_offsets"),
    "offsets_text": (header({"a": tensor(begin="0")}), "tensor_offsets"),
    "size_too_small": (header({"a": tensor(shape=(2, 2))}), "tensor_size"),
    "size_too_large": (header({"a": tensor(shape=(2, 4))}), "tensor_size"),
    "size_half_byte": (header({"a": tensor("F4", (3,), 0, 1)}, 1), "tensor_size"),
    "claims_10_gb": (header({"a": tensor(shape=(2_500_000_000,), end=10**10)}), "tensor_out_of_file"),
    "past_the_end": (header({"a": tensor()}, 23), "tensor_out_of_file"),
    "overlap": (header(OVERLAP), "tensor_overlap"),
    "same_bytes_twice": (header({"a": tensor(), "b": tensor()}), "tensor_overlap"),
    "gap": (header({"a": tensor(begin=8, end=32)}, 32), "tensor_gap"),
    "trailing": (header({"a": tensor()}, 25), "trailing_bytes"),
}


@pytest.mark.parametrize(("raw", "code"), FAULTS.values(), ids=FAULTS.keys())
def test_read_header_fault_refused_by_its_code(raw: bytes, code: str) -> None:
    assert codes_of(raw) == [code]


def test_read_header_several_faults_all_named() -> None:
    faults = {"a\n": tensor(), "b": tensor("F33"), "c": tensor(shape=(9,)), "d": tensor()}
    assert codes_of(header(faults)) == ["tensor_name", "tensor_dtype", "tensor_size"]


def test_read_header_thousand_faults_answer_stays_short() -> None:
    assert len(codes_of(header({f"t{i}": tensor("F33") for i in range(1000)}))) == 20


def test_read_header_message_has_both_numbers_and_the_place() -> None:
    with pytest.raises(HeaderError, match=r"blob\.x: a: shape \[2, 4\] of F32 takes 32 bytes, data_offsets hold 24"):
        _read_named("blob.x", header({"a": tensor(shape=(2, 4))}))


def _read_named(name: str, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(raw)
        read_header(path)


counts = st.integers(-1, 5) | st.integers(0, 2**70)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F33"]),
        "shape": st.lists(counts, max_size=4),
        "data_offsets": st.lists(counts | st.integers(0, 64), min_size=1, max_size=3),
    }
)
headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | st.none() | st.text(), max_size=4)
plausible = st.builds(lambda document, size: header(document, size), headers, st.integers(0, 64))
prefixed = st.builds(
    lambda length, body: struct.pack("<Q", length) + body, st.integers(0, 80) | st.integers(0, 2**64 - 1), st.binary()
)


@settings(max_examples=1500)
@given(st.binary(max_size=200) | prefixed | plausible)
@example(header({"a": tensor()}))
@example(header({"a": tensor("F4", (2,), 0, 1)}, 1))
def test_read_header_any_bytes_never_more_lenient_than_the_reference(raw: bytes) -> None:
    safetensors = pytest.importorskip("safetensors")
    try:
        found = read(raw)
    except HeaderError as error:
        problems = error.problems
        assert problems
        assert all(problem.code and str(problem).isprintable() for problem in problems)
        return
    reference = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(raw)}
    assert {name: info.shape for name, info in found.items()} == reference


@st.composite
def valid_files(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    names = draw(st.lists(st.text("abc._", min_size=1, max_size=8), unique=True, max_size=6))
    whole_bytes = [dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0 and "FNUZ" not in dtype]
    return {
        name: zeros(draw(st.sampled_from(whole_bytes)), *draw(st.lists(st.integers(0, 4), max_size=3)))
        for name in names
    }


@given(valid_files())
def test_read_header_any_valid_file_read_as_the_reference_reads_it(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
) -> None:
    safetensors = pytest.importorskip("safetensors")
    raw = safetensors_bytes(tensors)
    found = read(raw)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {n: t[:2] for n, t in tensors.items()}
    reference = dict(safetensors.deserialize(raw))
    for name, info in found.items():
        assert raw[info.offsets[0] : info.offsets[1]] == bytes(reference[name]["data"])


@given(valid_files(), st.data())
def test_read_header_any_cut_file_refused(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]], data: st.DataObject
) -> None:
    raw = safetensors_bytes(tensors)
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    with pytest.raises(HeaderError):
        read(cut)
