"""The corrected LoRA wrapper of vLLM's CPU backend.

Stock `PunicaWrapperCPU` (vLLM 0.32) indexes the adapter slots with -1 for rows that have no adapter, which selects the
*last* slot: a base-model request that shares a batch with adapters is answered with some adapter's weights. It also
raises when the logits of prompt tokens are wanted of a wrapped `lm_head` (rows are then tokens, not requests), and it
copies a slot's whole weights for every row of the batch. This one sorts the rows by adapter once per step and hands
each layer to one compiled call (`row_kernel.py`): base rows are not touched, a step without adapters costs nothing, and
the cost otherwise follows the rows that have adapters, at their own ranks.

It does not know who loads adapters or what a request is. Where it cannot tell which adapter a row belongs to it
raises: no answer is better than one from another tenant's weights. Mixture-of-experts layers with LoRA are not
supported on CPU, as in stock vLLM.

Legend of shapes: n rows, h input width, o output width, R max_lora_rank, r the adapter's own rank, S slots.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from loradock_serve.inside.row_kernel import kernel
from loradock_serve.inside.row_plan import EMPTY_PLAN, NO_ADAPTER, RowPlan, Slots, slots_of
from loradock_serve.inside.slot_watch import watch_slots
from loradock_serve.inside.slot_weights import SlotNews, SlotWeights

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


class AdapterRowsError(RuntimeError):
    """Rows reached a layer and nothing says which adapter they belong to."""


class CorrectedPunicaWrapperCPU(PunicaWrapperCPU):
    """Applies to every row its own adapter, and to rows without an adapter nothing."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._tokens = EMPTY_PLAN
        self._samples = EMPTY_PLAN
        self._news = SlotNews()
        self._layers: dict[tuple[int, tuple[int, ...]], SlotWeights] = {}  # by the address of B, and its widths
        lora_config = kwargs.get("lora_config")
        if lora_config is not None:  # compiled now, and not while the first request waits
            kernel(lora_config.lora_dtype, lora_config.lora_dtype, lora_config.lora_dtype)
        watch_slots()

    def slot_written(self, slot: int, rank: int) -> None:
        """Another adapter lies in the slot: what was known of the one before is void."""
        self._news.tell(slot, rank)

    # -- once per step ---------------------------------------------------------------------------------------------

    def update_metadata(
        self,
        mapping: "LoRAMapping",
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Take the adapter of every token and of every sampled row; `max_loras` is one more than there are slots."""
        tokens = slots_of(mapping.index_mapping, lora_index_to_id)
        samples = slots_of(mapping.prompt_mapping, lora_index_to_id)
        self._tokens = RowPlan.of(tokens)
        self._samples = self._tokens if np.array_equal(tokens, samples) else RowPlan.of(samples)
        self._fill_stock_buffers(tokens, samples, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        self.no_lora = self._tokens.is_empty

    def _fill_stock_buffers(self, tokens: Slots, samples: Slots, max_loras: int, vocab_size: int) -> None:
        """Keep what layers read of the base class: the embedding layer its row offsets, the classifier its slots."""
        padded = np.where(samples == NO_ADAPTER, max_loras - 1, samples)
        padded = np.arange(len(samples)) + padded * len(samples)
        for buffer, values in (
            (self._token_lora_indices, tokens),
            (self._sampler_indices, samples),
            (self._sampler_indices_padded, padded),
            (self._embeddings_indices, np.maximum(tokens, 0) * vocab_size),
        ):
            buffer[: len(values)] = torch.from_numpy(values)
        self.indices_len[:] = [len(tokens), len(samples), len(samples), len(tokens)]

    # -- called by the layers --------------------------------------------------------------------------------------

    def add_lora_linear(
        self,
        y: torch.Tensor,  # (n, sum of output_slices), changed in place
        x: torch.Tensor,  # (n, h)
        lora_a_stacked: tuple[torch.Tensor, ...],  # each (S, 1, R, h)
        lora_b_stacked: tuple[torch.Tensor, ...],  # each (S, 1, o, R)
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice] += x @ A @ B * scale, for each slice of a packed layer and each row's own adapter."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if not add_inputs:
            y.zero_()
        plan = self._token_plan(x.shape[0])
        if not plan.is_empty:
            self._weights(lora_a_stacked, lora_b_stacked, output_slices).add(plan, y, x, scale, self._news)

    def add_lora_logits(
        self,
        y: torch.Tensor,  # (n, at least o), changed in place
        x: torch.Tensor,  # (n, h)
        lora_a_stacked: torch.Tensor,  # (S, 1, R, h)
        lora_b_stacked: torch.Tensor,  # (S, 1, o, R)
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y[:, :o] += x @ A @ B * scale; the rows are sampled positions, or prompt tokens for `prompt_logprobs`."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        plan = self._logits_plan(x)
        if not plan.is_empty:
            width = min(lora_b_stacked.shape[-2], y.shape[-1])  # logits may carry padding of the vocabulary
            self._weights((lora_a_stacked,), (lora_b_stacked,), (width,)).add(plan, y, x, scale, self._news)

    def add_lora_embedding(
        self,
        y: torch.Tensor,  # (n, o), changed in place
        x: torch.Tensor,  # (n, R), the rows of A that the tokens picked
        lora_b_stacked: torch.Tensor,  # (S, 1, o, R)
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += x @ B; what stock looked up for rows of the base is some slot's, and is not used."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if not add_inputs:
            y.zero_()
        plan = self._token_plan(x.shape[0])
        if not plan.is_empty:
            self._weights((), (lora_b_stacked,), (lora_b_stacked.shape[-2],)).add(plan, y, x, 1.0, self._news)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,  # slices x (n, R), overwritten where a row has an adapter
        x: torch.Tensor,  # (n, h)
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[slice] = x @ A * scale; used by itself only with fully sharded adapters."""
        x = x.view(-1, x.shape[-1])
        for rows, slot in _each_group(self._token_plan(x.shape[0])):
            for target, a in zip(y, lora_a_stacked, strict=True):
                shrunk = x[rows].to(a.dtype) @ a[slot, 0].t()
                target.view(-1, target.shape[-1])[rows, : shrunk.shape[-1]] = (shrunk * scale).to(target.dtype)

    def add_expand(
        self,
        y: torch.Tensor,  # (n, wide), changed in place
        x: tuple[torch.Tensor, ...] | torch.Tensor,  # slices x (n, R)
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice] += x[slice] @ B; used by itself only with fully sharded adapters."""
        y = y.view(-1, y.shape[-1])
        if not add_inputs:
            y[:, offset_start : offset_start + sum(output_slices)] = 0
        for rows, slot in _each_group(self._token_plan(y.shape[0])):
            rank = self._news.rank(slot)
            start = offset_start
            for shrunk, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                delta = shrunk[rows, :rank].to(b.dtype) @ b[slot, 0, :width, :rank].t()
                y[rows, start : start + width] += delta.to(y.dtype)
                start += width

    # -- which rows ------------------------------------------------------------------------------------------------

    def _token_plan(self, rows: int) -> RowPlan:
        """The plan of a layer that sees the step's tokens; more rows than tokens are padding at the end."""
        plan = self._tokens
        if rows >= plan.rows:
            return plan
        if plan.is_uniform:
            return plan.part(0, rows)
        raise AdapterRowsError(f"a layer saw {rows} rows of a step of {plan.rows} tokens with several adapters")

    def _logits_plan(self, x: torch.Tensor) -> RowPlan:
        """The plan of the rows whose logits are wanted.

        The runner asks for sampled rows, which it copies out of the hidden states, and for the prompt tokens of one
        request, which it slices out of them: a slice says by its place in the storage which tokens it holds.
        """
        rows, width = x.shape
        if self._tokens.is_empty and self._samples.is_empty:
            return EMPTY_PLAN
        stored_rows = x.untyped_storage().nbytes() // (width * x.element_size())
        if x.is_contiguous() and max(rows, self._tokens.rows - 1) < stored_rows:
            start = x.storage_offset() // width
            if start + rows <= self._tokens.rows:
                return self._tokens.part(start, start + rows)
        for plan in (self._samples, self._tokens):
            if rows == plan.rows:
                return plan
        if self._tokens.is_uniform:
            return RowPlan.of(np.resize(self._tokens.slots, rows))
        raise AdapterRowsError(
            f"logits of {rows} rows were wanted in a step of {self._tokens.rows} tokens and {self._samples.rows} "
            "sampled rows with several adapters"
        )

    # -- where the weights are --------------------------------------------------------------------------------------

    def _weights(
        self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], widths: tuple[int, ...]
    ) -> SlotWeights:
        """The layer's stacks, looked at once."""
        key = (b[0].data_ptr(), widths)
        weights = self._layers.get(key)
        if weights is None:
            weights = self._layers[key] = SlotWeights(a, b, widths)
        return weights


def _each_group(plan: RowPlan) -> list[tuple[torch.Tensor, int]]:
    """For each adapter an index of its rows, and its slot."""
    distinct = np.unique(plan.sorted_slots)
    return [(torch.from_numpy(plan.order[plan.sorted_slots == slot]), slot) for slot in distinct.tolist()]
