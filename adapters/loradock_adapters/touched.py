"""Which tokens an adapter can change at all, where it is on the embedding alone: what a test of it must ask.

An embedding's factor A has a column for each token, zero for every token that training never saw. Such an adapter
answers every other prompt as the base does, and rightly so. Reads one factor in rows; knows no base and no engine.
"""

from pathlib import Path

from loradock_adapters.checkpoint import ADAPTER_WEIGHTS
from loradock_adapters.errors import HeaderError, NotFoundError
from loradock_adapters.safetensors_header import TensorInfo, read_header

_TYPES = {"F32": ("<u4", 0x7FFF_FFFF), "F16": ("<u2", 0x7FFF), "BF16": ("<u2", 0x7FFF)}


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
    """The columns of a matrix that are not zero throughout; a negative zero is zero."""
    import numpy as np

    pattern, magnitude = _TYPES[info.dtype]
    rows, columns = info.shape
    found = np.zeros(columns, dtype=bool)
    with path.open("rb") as file:
        file.seek(info.offsets[0])
        for _ in range(rows):
            row = np.frombuffer(file.read(columns * np.dtype(pattern).itemsize), dtype=pattern)
            found |= (row & magnitude) != 0
    return [int(column) for column in np.flatnonzero(found)]
