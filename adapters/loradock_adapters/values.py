"""The values of tensors: NaN, Inf, all zero. Streams a file in chunks; never a whole tensor in memory.

Needs numpy, which the server has and the light client lacks: `can_scan()` says so. Takes its structure from a header
that was already checked (safetensors_header.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from loradock_adapters.safetensors_header import TensorInfo

CHUNK_BYTES = 8 << 20

# dtype -> (numpy type of its bit pattern, bits of the exponent). All exponent bits set: NaN or infinity.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}


@dataclass(frozen=True, slots=True)
class ValueScan:
    """What was found in one file. Tensors of types without NaN are not looked at."""

    not_finite: tuple[str, ...]
    """Names of tensors with a NaN or an infinity in them."""
    zero: frozenset[str]
    """Names of tensors that are zero throughout."""


def can_scan() -> bool:
    return find_spec("numpy") is not None


def scan_values(path: Path, tensors: Mapping[str, TensorInfo]) -> ValueScan:
    """Reads every floating-point tensor of a file once, in the order in which they lie there."""
    not_finite: list[str] = []
    zero: set[str] = set()
    with path.open("rb") as file:
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
            if info.dtype not in _EXPONENTS:
                continue
            file.seek(info.offsets[0])
            finite, only_zero, left_bytes = True, True, info.size_bytes
            while left_bytes and (chunk := file.read(min(CHUNK_BYTES, left_bytes))):
                left_bytes -= len(chunk)
                chunk_finite, chunk_zero = _chunk(chunk, info.dtype)
                finite &= chunk_finite
                only_zero &= chunk_zero
            if not finite:
                not_finite.append(name)
            if only_zero:
                zero.add(name)
    return ValueScan(tuple(not_finite), frozenset(zero))


def _chunk(chunk: bytes, dtype: str) -> tuple[bool, bool]:
    """Whether all values are finite, and whether all are zero (a negative zero counts as zero)."""
    import numpy as np

    pattern, exponent_bits = _EXPONENTS[dtype]
    bits = np.frombuffer(chunk, dtype=pattern)
    magnitudes = bits & (exponent_bits | (exponent_bits & -exponent_bits) - 1)  # without the sign
    largest = int(magnitudes.max(initial=0))
    return largest < exponent_bits, largest == 0
