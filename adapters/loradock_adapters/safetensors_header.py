"""The header of a safetensors file, read strictly and without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without a gap.
The header is untrusted: every number in it is checked against the file before anything is allocated or believed. The
rules are those of the reference implementation (safetensors 0.8, `Metadata::validate`), and stricter in that duplicate
keys, unknown fields and names beyond printable ASCII are refused. Reads no tensor values (values.py does).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from loradock_adapters import strict_json
from loradock_adapters.contents import problem_of
from loradock_adapters.errors import HeaderError, NotFoundError
from loradock_adapters.problems import Problem

MAX_HEADER_BYTES = 32 << 20
"""About 250,000 tensors. The reference implementation stops at 100 MB."""
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 8
MAX_TENSOR_NAME_CHARS = 512
_LENGTH_BYTES = 8
_MAX_ELEMENTS = 1 << 48
_MAX_DIGITS = 20
_MAX_PROBLEMS = 20
_MAX_COMMAS = 8 * MAX_TENSORS  # an entry of two dimensions has five; a parsed value takes thirty times its text

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]
    """First byte and the byte after the last, counted from the start of the *file*."""

    @property
    def size_bytes(self) -> int:
        return self.offsets[1] - self.offsets[0]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> dtype, shape and place. Raises HeaderError with the problems found, NotFoundError."""
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size, path.name)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None


def parse_header(file: BinaryIO, size_bytes: int, where: str) -> dict[str, TensorInfo]:
    """The same for an open file, or for bytes in memory, of this size. `where` is its name in what is said of it."""
    header, data_start = _read_json(file, size_bytes, where)
    return _tensors(header, data_start, size_bytes, where)


def _read_json(file: BinaryIO, size_bytes: int, where: str) -> tuple[dict[str, Any], int]:
    """The parsed header, and the position in the file where the tensors' bytes start."""
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        _fail("header_truncated", f"a file of {size_bytes} bytes is too short to be safetensors", where)
    (length,) = struct.unpack("<Q", prefix)
    start = file.read(1)
    if start != b"{" and (foreign := problem_of(prefix + start, where, weights=True)) is not None:
        raise HeaderError([foreign])  # not before: a header of 640 bytes starts as a pickle does
    if length > MAX_HEADER_BYTES:
        _fail("header_too_long", f"a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}", where)
    if length > size_bytes - _LENGTH_BYTES:
        message = f"the header is said to be {length} bytes, but only {size_bytes - _LENGTH_BYTES} follow"
        _fail("header_truncated", message, where)
    if length == 0 or start != b"{":
        _fail("header_not_json", "the header does not start with '{'", where)
    return _parsed(start + file.read(length - 1), where), _LENGTH_BYTES + length


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b",") > _MAX_COMMAS:
        message = f"more than {MAX_TENSORS} tensors, or {_MAX_COMMAS} values"
        _fail("header_too_many", message, where)
    try:
        header = strict_json.loads(raw, integer=_count)
    except strict_json.DuplicateKeyError as error:
        _fail("header_duplicate_key", f"the header names {ascii(error.key)[:120]} twice", where)
    except ValueError:
        _fail("header_not_json", "the header is not valid JSON", where)
    if not isinstance(header, dict):
        _fail("header_not_json", "the header is not a JSON object", where)
    return header


def _tensors(header: dict[str, Any], data_start: int, size_bytes: int, where: str) -> dict[str, TensorInfo]:
    problems: list[Problem] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(Problem("header_metadata", "__metadata__ is not a map of texts", where))
    tensors: dict[str, TensorInfo] = {}
    for name, fields in header.items():
        found = _tensor(name, fields, data_start, where)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            tensors[name] = found
        if len(problems) >= _MAX_PROBLEMS:
            break
    if not problems:  # places are only compared when each is sane by itself
        problems.extend(_layout(tensors, data_start, size_bytes, where))
    if problems:
        raise HeaderError(problems[:_MAX_PROBLEMS])
    return tensors


def _tensor(name: str, fields: object, data_start: int, where: str) -> TensorInfo | Problem:
    """One entry of the header, or the first thing wrong with it."""
    if not 0 < len(name) <= MAX_TENSOR_NAME_CHARS or not (name.isascii() and name.isprintable()):
        return Problem("tensor_name", f"{ascii(name)[:120]} is not a tensor name", where)
    at = f"{where}: {name}"
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        return Problem("tensor_fields", "an entry has exactly dtype, shape and data_offsets", at)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return Problem("tensor_dtype", f"dtype {ascii(dtype)[:40]} is unknown", at)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
        return Problem("tensor_shape", f"the shape is not a list of up to {MAX_DIMENSIONS} sizes", at)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        return Problem("tensor_offsets", "data_offsets is not a pair of byte positions", at)
    begin, end = offsets
    if begin > end:
        return Problem("tensor_offsets", f"data_offsets end at {end}, before they begin at {begin}", at)
    elements = _elements(shape)
    if elements is None:
        return Problem("tensor_shape", f"the shape has more than {_MAX_ELEMENTS} elements", at)
    bits = elements * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        message = f"shape {shape} of {dtype} takes {bits / 8:g} bytes, data_offsets hold {end - begin}"
        return Problem("tensor_size", message, at)
    return TensorInfo(dtype, tuple(shape), (data_start + begin, data_start + end))


def _layout(tensors: Mapping[str, TensorInfo], data_start: int, size_bytes: int, where: str) -> Iterator[Problem]:
    """The tensors fill the rest of the file, in some order, without an overlap, a gap or a byte left over."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offsets):
        begin, end = tensor.offsets
        if end > size_bytes:
            message = f"ends at byte {end} of a file of {size_bytes}"
            yield Problem("tensor_out_of_file", message, f"{where}: {name}")
            return
        if begin < position:
            yield Problem("tensor_overlap", f"begins at byte {begin}, inside another tensor", f"{where}: {name}")
        elif begin > position:
            yield Problem("tensor_gap", f"{begin - position} bytes before it belong to no tensor", f"{where}: {name}")
        position = max(position, end)
    if position < size_bytes:
        yield Problem("trailing_bytes", f"{size_bytes - position} bytes after the last tensor", where)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ELEMENTS


def _elements(shape: list[int]) -> int | None:
    """How many elements a shape has; None where the product, on its way, leaves what a reader can count to."""
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_ELEMENTS:
            return None
    return elements


def _count(text: str) -> int:
    """A whole number of a header; the reference takes none with a sign, not even -0."""
    return -1 if text.startswith("-") or len(text) > _MAX_DIGITS else int(text)


def _fail(code: str, message: str, where: str) -> NoReturn:
    raise HeaderError([Problem(code, message, where)])
