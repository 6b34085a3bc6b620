"""Where the adapters of one layer lie in vLLM's slot stacks, as the compiled kernel wants to know it.

vLLM preallocates, for every slice of a layer, a stack of A and one of B with room for `max_loras` adapters of
`max_lora_rank`. A `SlotWeights` is their addresses and strides, and each slot's own rank in this layer: 0 where the
slot's adapter leaves the layer alone. It knows nothing of rows.

Legend of shapes: h input width, o output width of a slice, R max_lora_rank, S slots.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from loradock_serve.inside.row_kernel import COLUMNS, kernel
from loradock_serve.inside.row_plan import RowPlan


class SlotWeights:
    """One layer's stacks. The tensors stay vLLM's: what is written into a slot later shows through."""

    def __init__(
        self,
        a: Sequence[torch.Tensor],  # each (S, 1, R, h); empty where the rows come low-rank already
        b: Sequence[torch.Tensor],  # each (S, 1, o, R)
        widths: Sequence[int],
    ) -> None:
        for stack in b:
            _lay_out_by_rank(stack)
        self._kept = (*a, *b)  # the addresses below are theirs
        self._a = a
        self._full_rank = b[0].shape[-1]
        self._dtype = b[0].dtype
        self._input_width = a[0].shape[-1] if a else 0
        self._least_input = self._input_width if a else self._full_rank
        self._width = sum(widths)
        self._ranks = np.full(b[0].shape[0], self._full_rank, dtype=np.int64)
        self._table = _table(a, b, widths)
        self._seen_change = 0
        self._run: dict[tuple[torch.dtype, torch.dtype], Callable[..., None]] = {}

    def catch_up(self, news: "SlotNews") -> None:
        """Take the ranks of the slots that were written since the last call."""
        for slot, (change, rank) in news.written.items():
            if change > self._seen_change:
                # vLLM zeroes the slot in every layer that its adapter does not target.
                targets = not self._a or any(bool(stack[slot, 0, :rank].any()) for stack in self._a)
                self._ranks[slot] = rank if targets else 0
        self._seen_change = news.changes

    def add(self, plan: RowPlan, y: torch.Tensor, x: torch.Tensor, scale: float, news: "SlotNews") -> None:
        """y += x A B * scale for the plan's rows; y (n, at least the sum of o) and x (n, h).

        ValueError where the tensors are not of these shapes: the kernel takes addresses, and believes them.
        """
        fits = len(x) == len(y) >= plan.rows and y.shape[1] >= self._width and x.shape[1] >= self._least_input
        if not fits or y.stride(1) != 1:
            raise ValueError(f"adapters of shape {self._least_input} -> {self._width} on {x.shape} -> {y.shape}")
        if x.stride(1) != 1:
            x = x.contiguous()
        if self._seen_change != news.changes:
            self.catch_up(news)
        formats = (x.dtype, y.dtype)
        run = self._run.get(formats)
        if run is None:
            run = self._run[formats] = kernel(x.dtype, self._dtype, y.dtype)
        run(
            self._table,
            self._ranks,
            plan.order,
            plan.sorted_slots,
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            self._input_width,
            scale,
            torch.get_num_threads(),
        )


class SlotNews:
    """What lies in the slots, as the wrapper hears it: which were written, when, and with which rank."""

    def __init__(self) -> None:
        self.changes = 0
        self.written: dict[int, tuple[int, int]] = {}
        """Slot -> (the change's number, rank). A slot that was never told of counts as of full rank."""

    def tell(self, slot: int, rank: int) -> None:
        """Another adapter lies in the slot now."""
        self.changes += 1
        self.written[slot] = (self.changes, rank)

    def rank(self, slot: int) -> int | None:
        """The slot's rank; None where nobody told."""
        known = self.written.get(slot)
        return known[1] if known is not None else None


def _lay_out_by_rank(stack: torch.Tensor) -> None:
    """Change the memory of a B stack (S, 1, o, R) to rank after rank, each with its outputs side by side.

    The kernel then adds whole vectors of outputs, and reads nothing beyond an adapter's own rank. Shape and contents
    stay, so everything else that reads or writes the tensor goes on as before.
    """
    slots, _, width, rank = stack.shape
    if stack.stride()[2:] == (1, width):
        return
    contents = stack.clone()
    stack.as_strided_((slots, 1, width, rank), (rank * width, rank * width, 1, width))
    stack.copy_(contents)


def _table(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], widths: Sequence[int]) -> npt.NDArray[np.int64]:
    """A row of `row_kernel`'s columns for each slice."""
    table = np.zeros((len(b), COLUMNS), dtype=np.int64)
    offset = 0
    for i, (stack, width) in enumerate(zip(b, widths, strict=True)):
        if a:
            table[i, :3] = a[i].data_ptr(), a[i].stride(0), a[i].stride(2)
        table[i, 3:] = stack.data_ptr(), stack.stride(0), stack.stride(3), width, offset
        offset += width
    return table
