"""Tensors as streams of bytes, and writing a safetensors file from them: never a whole tensor in memory.

Does not know what the tensors mean, and needs neither numpy nor torch.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loradock_adapters.safetensors_header import DTYPE_BITS, TensorInfo

CHUNK_BYTES = 8 << 20
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorStream:
    """A tensor whose bytes can be read, as often as need be."""

    dtype: str
    """As safetensors calls it: F32, BF16, ..."""
    shape: tuple[int, ...]
    read: Callable[[int], Iterator[bytes]]
    """Its bytes, row by row from the first, in pieces of the given size but for the last."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def item_bytes(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    def whole(self) -> bytes:
        """All of it, for tensors that are known to be small."""
        return b"".join(self.read(CHUNK_BYTES))


def stream_of(path: Path, info: TensorInfo) -> TensorStream:
    """A tensor in a file whose header was read."""

    def read(piece_bytes: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(info.offsets[0])
            left_bytes = info.size_bytes
            while left_bytes:
                piece = file.read(min(piece_bytes, left_bytes))
                if not piece:
                    raise OSError(f"{path} ended {left_bytes} bytes before its header says")
                left_bytes -= len(piece)
                yield piece

    return TensorStream(info.dtype, info.shape, read)


def write_safetensors(path: Path, tensors: Mapping[str, TensorStream]) -> None:
    """Writes a file of these tensors. The same tensors give the same bytes, in whatever order they come."""
    # The widest types first: every tensor then begins at a multiple of its own width, which readers want.
    order = sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.size_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            written_bytes = sum(file.write(piece) for piece in tensors[name].read(CHUNK_BYTES))
            if written_bytes != tensors[name].size_bytes:
                raise ValueError(f"{name}: {written_bytes} bytes came, its shape takes {tensors[name].size_bytes}")


def pieces(content: Iterable[bytes], piece_bytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of this size, the last perhaps smaller."""
    rest = bytearray()
    for part in content:
        rest += part
        while len(rest) >= piece_bytes:
            yield bytes(rest[:piece_bytes])
            del rest[:piece_bytes]
    if rest:
        yield bytes(rest)
