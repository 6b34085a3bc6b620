"""Which tokens an adapter can change at all, where it is on the embedding alone: what a test of it must ask.

An embedding's factor A has a column for each token, zero for every token that training never saw. Such an adapter
answers every other prompt as the base does, and rightly so. Reads one factor in rows; knows no base and no engine.
"""

from pathlib import Path

from loradock_adapters.checkpoint import ADAPTER_WEIGHTS
from loradock_adapters.errors import HeaderError, NotFoundError
from loradock_adapters.safetensors_header import TensorInfo, read_header

_TYPES = {"F32": (4, b"\0\0\0\x80"), "F16": (2, b"\0\x80"), "BF16": (2, b"\0\x80")}
"""Bytes of a value, and the one with nothing but its sign set."""


def touched_tokens(directory: Path) -> list[int] | None:
    """The ids of the tokens that an adapter on nothing but embeddings changes; None where any prompt will do."""
    path = directory / ADAPTER_WEIGHTS
    try:
        tensors = read_header(path)
    except (HeaderError, NotFoundError, OSError):
        return None
    factors = {name: info for name, info in tensors.items() if name.endswith("lora_embedding_A")}
    others = [name for name in tensors if "lora_" in name and "lora_embedding_" not in name]
    if others or not factors or any(info.dtype not in _TYPES or len(info.shape) != 2 for info in factors.values()):
        return None
    touched: set[int] = set()
    for info in factors.values():
        touched.update(_columns(path, info))
    return sorted(touched)


def _columns(path: Path, info: TensorInfo) -> list[int]:
    """The columns of a matrix that are not zero throughout; a negative zero is zero.

    All rows or-ed as one whole number each: bits that are set in none of them, but for the signs, are zeros.
    """
    width, sign = _TYPES[info.dtype]
    rows, columns = info.shape
    gathered = 0
    with path.open("rb") as file:
        file.seek(info.offsets[0])
        for _ in range(rows):
            gathered |= int.from_bytes(file.read(columns * width), "little")
    gathered &= ~int.from_bytes(sign * columns, "little")
    bits = gathered.to_bytes(columns * width, "little")
    return [column for column in range(columns) if any(bits[column * width : (column + 1) * width])]
