"""The values of tensors: NaN, Inf, all zero. Streams a file in chunks; never a whole tensor in memory.

By numpy where it is, as on the server; else, as in the light client, by whole numbers of 64 KiB, which Python adds and
masks about a third as fast. Takes its structure from a header that was already checked (safetensors_header.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from loradock_adapters.safetensors_header import TensorInfo

CHUNK_BYTES = 8 << 20
INTEGER_CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Pattern:
    """How the values of a type tell that they are no numbers."""

    bits: int
    magnitude: int
    """The bits without the sign."""
    first_bad: int
    """The smallest magnitude that is an infinity or a NaN; what is over it is none either."""


_PATTERNS: Mapping[str, _Pattern] = {
    "F8_E5M2": _Pattern(8, 0x7F, 0x7C),
    "F8_E4M3": _Pattern(8, 0x7F, 0x7F),
    "F16": _Pattern(16, 0x7FFF, 0x7C00),
    "BF16": _Pattern(16, 0x7FFF, 0x7F80),
    "F32": _Pattern(32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": _Pattern(64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "C64": _Pattern(32, 0x7FFF_FFFF, 0x7F80_0000),
}

Chunk = Callable[[bytes, _Pattern], tuple[bool, bool]]
"""Whether all values of a chunk are finite, and whether all are zero (a negative zero counts as zero)."""


@dataclass(frozen=True, slots=True)
class ValueScan:
    """What was found in one file. Tensors of types without NaN are not looked at."""

    not_finite: tuple[str, ...]
    """Names of tensors with a NaN or an infinity in them."""
    zero: frozenset[str]
    """Names of tensors that are zero throughout."""


def scan_values(path: Path, tensors: Mapping[str, TensorInfo], *, by_numpy: bool | None = None) -> ValueScan:
    """Reads every floating-point tensor of a file once, in the order in which they lie there."""
    if by_numpy is None:
        by_numpy = find_spec("numpy") is not None
    look: Chunk = _by_numpy if by_numpy else _by_integers
    chunk_bytes = CHUNK_BYTES if by_numpy else INTEGER_CHUNK_BYTES
    not_finite: list[str] = []
    zero: set[str] = set()
    with path.open("rb") as file:
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
            pattern = _PATTERNS.get(info.dtype)
            if pattern is None:
                continue
            file.seek(info.offsets[0])
            finite, only_zero, left_bytes = True, True, info.size_bytes
            while left_bytes and (chunk := file.read(min(chunk_bytes, left_bytes))):
                left_bytes -= len(chunk)
                chunk_finite, chunk_zero = look(chunk, pattern)
                finite &= chunk_finite
                only_zero &= chunk_zero
            if not finite:
                not_finite.append(name)
            if only_zero:
                zero.add(name)
    return ValueScan(tuple(not_finite), frozenset(zero))


def _by_numpy(chunk: bytes, pattern: _Pattern) -> tuple[bool, bool]:
    import numpy as np

    values = np.frombuffer(chunk, dtype=f"<u{pattern.bits // 8}")
    largest = int((values & pattern.magnitude).max(initial=0))
    return largest < pattern.first_bad, largest == 0


def _by_integers(chunk: bytes, pattern: _Pattern) -> tuple[bool, bool]:
    """The chunk as one number: adding what is missing to the sign bit carries into it from every value that is bad."""
    magnitudes = int.from_bytes(chunk, "little") & _repeated(pattern.magnitude, pattern.bits, len(chunk))
    if not magnitudes:
        return True, True
    sign = pattern.magnitude + 1
    carried = magnitudes + _repeated(sign - pattern.first_bad, pattern.bits, len(chunk))
    return not carried & _repeated(sign, pattern.bits, len(chunk)), False


@cache
def _of_chunk(value: int, bits: int) -> int:
    return int.from_bytes(value.to_bytes(bits // 8, "little") * (INTEGER_CHUNK_BYTES * 8 // bits), "little")


def _repeated(value: int, bits: int, size_bytes: int) -> int:
    """The value once for each value of a chunk."""
    if size_bytes == INTEGER_CHUNK_BYTES:
        return _of_chunk(value, bits)
    return int.from_bytes(value.to_bytes(bits // 8, "little") * (size_bytes * 8 // bits), "little")
