"""The arithmetic of a merge, a block of rows at a time: what is in memory is one block and one pair of factors.

    W' = W + s·B·A                     LoRA; rounded once, to the base's own number format
    W' = m / |W + s·B·A| · (W + s·B·A)   DoRA, the norm over each output

Values equal those of PEFT's merge_and_unload but for rounding. Decides nothing (merge_plan.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from loradock_adapters.checkpoint import MODEL_CONFIG, MODEL_INDEX
from loradock_adapters.merge_plan import Change, MergePlan
from loradock_adapters.tensor_files import TensorStream, pieces, write_safetensors

BLOCK_BYTES = 16 << 20
"""Of float32 values that are worked on at a time."""

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class BrokenAdapterError(Exception):
    """The merged weights are not finite."""


def write_merged(plan: MergePlan, out: Path, dtype: str | None = None) -> None:
    """The weights and config.json of the merged model, into an existing directory.

    `dtype`: number format of the new weights, as safetensors calls it; default that of each of the base's.
    """
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, tensors in plan.files.items():
        streams = {name: _merged(name, tensor, plan.changes.get(name), dtype) for name, tensor in tensors.items()}
        write_safetensors(out / file, streams)
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(stream.size_bytes for stream in streams.values())
    if plan.index is not None:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (out / MODEL_INDEX).write_text(json.dumps(index, indent=2))
    (out / MODEL_CONFIG).write_text(json.dumps(plan.config, indent=2))


def cast(name: str, own: TensorStream, dtype: str | None) -> TensorStream:
    """The same values in another number format; what is no matrix or vector of floats stays as it is."""
    return _merged(name, own, None, dtype)


def _merged(name: str, own: TensorStream, found: Change | None, dtype: str | None) -> TensorStream:
    """The tensor as it will be; computed when it is read."""
    new_dtype = dtype if dtype is not None and own.dtype in _DTYPES and own.shape else own.dtype
    if found is None and new_dtype == own.dtype:
        return own
    change = found if found is not None else Change()
    source = change.replaced if change.replaced is not None else own
    out_dtype = _DTYPES[new_dtype]

    def read(piece_bytes: int) -> Iterator[bytes]:
        def parts() -> Iterator[bytes]:
            for block in _blocks(source, change):  # [rows, ...], float32
                new = block.to(out_dtype)
                if found is not None and not bool(torch.isfinite(new).all()):
                    raise BrokenAdapterError(f"{name} is not finite after the merge: the adapter seems to be broken")
                yield _bytes_of(new)

        return pieces(parts(), piece_bytes)

    return TensorStream(new_dtype, source.shape, read)


def _blocks(source: TensorStream, change: Change) -> Iterator[Tensor]:
    """The changed values, rows after rows, in float32."""
    if change.added_bias is not None:
        yield _load(source) + change.scaling * _load(change.added_bias)
        return
    rows = _with_token_rows(_row_blocks(source), change)
    if change.a is None or change.b is None:
        yield from rows
        return
    a, b = _load(change.a), _load(change.b)  # [rank, in], [out, rank]
    left, right = (a.T, b.T) if change.transposed else (b, a)  # [N, rank], [rank, M] for a stored [N, M]
    if change.magnitude is None:
        yield from _plus(rows, left, right, change.scaling)
        return
    magnitude = _load(change.magnitude).flatten()  # [out]
    if not change.transposed:
        start = 0
        for block in _plus(rows, left, right, change.scaling):
            norm = torch.linalg.norm(block, dim=1)  # [rows]
            yield (magnitude[start : start + len(block)] / norm)[:, None] * block
            start += len(block)
        return
    squares = torch.zeros(source.shape[1], dtype=torch.float64)  # an output is a column: the norm takes a pass first
    for block in _plus(rows, left, right, change.scaling):
        squares += block.double().square().sum(dim=0)
    factor = (magnitude.double() / squares.sqrt()).float()  # [out]
    for block in _plus(_with_token_rows(_row_blocks(source), change), left, right, change.scaling):
        yield factor * block


def _plus(rows: Iterator[Tensor], left: Tensor, right: Tensor, scaling: float) -> Iterator[Tensor]:
    start = 0
    for block in rows:
        yield block + (left[start : start + len(block)] @ right) * scaling
        start += len(block)


def _with_token_rows(rows: Iterator[Tensor], change: Change) -> Iterator[Tensor]:
    """An embedding's rows with the retrained ones in their places."""
    if change.token_rows is None:
        yield from rows
        return
    trained = _load(change.token_rows)  # [tokens, hidden]
    start = 0
    for block in rows:
        for number, token in enumerate(change.tokens):
            if start <= token < start + len(block):
                block[token - start] = trained[number]
        yield block
        start += len(block)


def _row_blocks(source: TensorStream) -> Iterator[Tensor]:
    """A tensor's rows, as many as fit a block, in float32."""
    row_items = source.size_bytes // source.item_bytes // source.shape[0]
    block_rows = max(1, BLOCK_BYTES // (4 * row_items))
    for raw in source.read(block_rows * row_items * source.item_bytes):
        yield _values(raw, source.dtype).reshape(-1, *source.shape[1:])


def _load(source: TensorStream) -> Tensor:
    return _values(source.whole(), source.dtype).reshape(source.shape)


def _values(raw: bytes, dtype: str) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=_DTYPES[dtype]).to(torch.float32)


def _bytes_of(values: Tensor) -> bytes:
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
