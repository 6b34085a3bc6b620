"""Packing: several documents in one row, so that little is padded, and none sees another.

Positions begin at 0 again with every document. That alone keeps them apart: transformers takes a position that does
not follow the one before it for the beginning of another sequence, and makes the mask block-diagonal. Whether a model's
attention obeys is tried on the model itself (`can_pack`), not looked up in a list. Legend: T tokens, V vocabulary.
"""

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from loradock_train.encode import IGNORED, Example
from loradock_train.loss import AGREEMENT

PROBE_TOKENS = 6


def split_long(example: Example, context_length: int) -> list[Example]:
    """A document in pieces that fit, all of nearly one length: a last piece of one token would teach nothing."""
    num_tokens = len(example.input_ids)
    pieces = max(1, math.ceil(num_tokens / context_length))
    bounds = [num_tokens * piece // pieces for piece in range(pieces + 1)]
    return [Example(example.input_ids[start:end], example.labels[start:end]) for start, end in pairwise(bounds)]


def pack(lengths: Sequence[int], context_length: int) -> list[list[int]]:
    """Which documents share a row: best fit, the longest first. Indices into `lengths`, none of which is over
    context_length. Deterministic."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context_length + 1)]
    rooms = 0  # bit n: some row has room for n tokens
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length << length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = context_length, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def join(examples: Sequence[Example]) -> tuple[Example, list[int]]:
    """One row of several documents, and its positions. The first token of a document is never learnt: what stands
    before it is another document."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += example.input_ids
        labels += [IGNORED, *example.labels[1:]][: len(example.labels)]
        positions += range(len(example.input_ids))
    return Example(ids, labels), positions


def can_pack(model: nn.Module, vocabulary: int) -> bool:
    """Whether packed documents neither see each other in this model, nor stand elsewhere than they would alone."""
    causal = cast(Any, model)
    takes = inspect.signature(causal.forward).parameters
    if "position_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return False
    device = next(model.parameters()).device
    first, other, second = (torch.arange(PROBE_TOKENS, device=device) * 7 + 3 + shift for shift in (0, 1, 2))
    rows = torch.stack([torch.cat([first, second]), torch.cat([other, second])]) % vocabulary  # 2, T
    positions = torch.arange(PROBE_TOKENS, device=device).repeat(2).expand(2, -1)  # 2, T
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed: Tensor = causal(input_ids=rows, position_ids=positions, use_cache=False).logits.float()  # 2, T, V
            alone: Tensor = causal(input_ids=second[None] % vocabulary, use_cache=False).logits.float()  # 1, T/2, V
    except TypeError:
        return False
    finally:
        model.train(was_training)
    seen = packed[:, PROBE_TOKENS:]  # the second document, after either of the first two
    tolerance = AGREEMENT * max(1.0, float(alone.abs().max()))
    return torch.equal(seen[0], seen[1]) and float((seen[0] - alone[0]).abs().max()) <= tolerance
