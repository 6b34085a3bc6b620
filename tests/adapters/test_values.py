"""Scanning values: NaN and infinity in every floating-point type, chunk borders, and zeros."""

import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_adapters import values
from loradock_adapters.safetensors_header import read_header
from loradock_adapters.values import ValueScan, scan_values
from loradock_testing.checkpoints import Tensor, f32, safetensors_bytes, zeros

# Bit patterns: the largest finite number, the smallest above zero, negative zero, then infinities and NaNs.
FINITE = {
    "F16": [b"\xff\x7b", b"\x01\x00", b"\x00\x80"],
    "BF16": [b"\x7f\x7f", b"\x01\x00", b"\x00\x80"],
    "F32": [b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00", b"\x00\x00\x00\x80"],
    "F64": [b"\xff" * 6 + b"\xef\x7f", b"\x01" + bytes(7), bytes(7) + b"\x80"],
    "F8_E5M2": [b"\x7b", b"\x01", b"\x80"],
    "F8_E4M3": [b"\x7e", b"\x01", b"\x80"],
}
NOT_FINITE = {
    "F16": [b"\x00\x7c", b"\x00\xfc", b"\x01\x7c", b"\x00\x7e"],
    "BF16": [b"\x80\x7f", b"\x80\xff", b"\x81\x7f", b"\xc0\xff"],
    "F32": [struct.pack("<f", x) for x in (float("inf"), float("-inf"), float("nan"))] + [b"\x01\x00\x80\x7f"],
    "F64": [struct.pack("<d", x) for x in (float("inf"), float("-inf"), float("nan"))],
    "F8_E5M2": [b"\x7c", b"\xfc", b"\x7f"],
    "F8_E4M3": [b"\x7f", b"\xff"],
}


def scan(path: Path, tensors: dict[str, Tensor]) -> ValueScan:
    """What both ways of looking found."""
    file = path / "x.safetensors"
    file.write_bytes(safetensors_bytes(tensors))
    found = scan_values(file, read_header(file), by_numpy=True)
    assert scan_values(file, read_header(file), by_numpy=False) == found
    return found


@pytest.mark.parametrize("dtype", FINITE)
def test_scan_values_finite_extremes_pass(tmp_path: Path, dtype: str) -> None:
    raw = b"".join(FINITE[dtype])
    assert scan(tmp_path, {"a": (dtype, (3,), raw)}) == ValueScan((), frozenset())


@pytest.mark.parametrize(("dtype", "pattern"), [(dtype, p) for dtype, patterns in NOT_FINITE.items() for p in patterns])
def test_scan_values_not_finite_named(tmp_path: Path, dtype: str, pattern: bytes) -> None:
    raw = FINITE[dtype][0] * 2 + pattern
    assert scan(tmp_path, {"fine": f32(3), "bad": (dtype, (3,), raw)}).not_finite == ("bad",)


def test_scan_values_zeros_of_either_sign_are_zero(tmp_path: Path) -> None:
    tensors = {"zero": zeros("BF16", 4), "minus": ("F32", (1,), b"\x00\x00\x00\x80"), "one": f32(1, value=1.0)}
    assert scan(tmp_path, tensors).zero == {"zero", "minus"}


def test_scan_values_integers_not_looked_at(tmp_path: Path) -> None:
    assert scan(tmp_path, {"a": ("I16", (1,), b"\x80\x7f")}) == ValueScan((), frozenset())


def test_scan_values_chunks_do_not_hide_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", 16)
    monkeypatch.setattr(values, "INTEGER_CHUNK_BYTES", 16)
    values._of_chunk.cache_clear()
    for place in range(10):
        raw = struct.pack("<10f", *[float("nan") if i == place else 0.0 for i in range(10)])
        found = scan(tmp_path, {"zero": f32(10, value=0.0), "a": ("F32", (10,), raw)})
        assert found == ValueScan(("a",), frozenset({"zero"}))
    values._of_chunk.cache_clear()


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), st.sampled_from(["F16", "BF16"]))
def test_scan_values_without_numpy_finds_what_numpy_finds(patterns: list[int], dtype: str) -> None:
    raw = struct.pack(f"<{len(patterns)}H", *patterns)
    with tempfile.TemporaryDirectory() as directory:
        scan(Path(directory), {"a": (dtype, (len(patterns),), raw)})
