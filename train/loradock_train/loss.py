"""Cross-entropy over the vocabulary without ever holding all logits: for the rows that are learnt only, a chunk at a
time.

Half of a small model's step is the head: logits of every token in float32, twice. Here the head runs on tokens that
have a label (of a completion row: the answer alone), in chunks that stay in the cache, and the gradient is taken in
the same pass. Heads with an adapter work too, since the head is called as a module (TRL's fused loss reads its
weight, and must refuse them).

`own_loss` swaps the forward of a causal LM for the time of the training. Models whose logits are more than
`head(hidden)` (soft-capped, scaled) are found by comparing the two losses on a batch, not by a list of names: they
keep their own forward. Legend: N tokens with a label, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from loradock_train.encode import IGNORED

CHUNK_LOGITS = 2**21
"""Logits held at once: 8 MB in float32, about what the caches of two cores hold."""
CHECKED_TOKENS = 64
AGREEMENT = 2e-2
"""Relative difference up to which the two losses count as the same (bf16 arithmetic differs by about 1e-3)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; gradients are computed in forward, a chunk at a time, and handed over in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, chunk: int, *weights: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)  # N, D
        # Without a token to learn, zeros: other processes wait for this one's gradients.
        grads: list[Tensor | None] = [torch.zeros_like(weight) if not len(targets) else None for weight in weights]
        for start in range(0, len(targets), chunk):
            with torch.enable_grad():
                piece = hidden[start : start + chunk].detach().requires_grad_()
                loss = functional.cross_entropy(head(piece).float(), targets[start : start + chunk], reduction="sum")
                found = torch.autograd.grad(loss, [piece, *weights], allow_unused=True)
            total += loss.detach()
            grad_hidden[start : start + chunk] = found[0]
            for index, grad in enumerate(found[1:]):
                if grad is not None:
                    held = grads[index]
                    grads[index] = grad if held is None else held.add_(grad)
        ctx.grads = (grad_hidden, grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        grad_hidden, grads = ctx.grads
        scaled = [None if grad is None else grad.mul_(scale) for grad in grads]
        return (grad_hidden.mul_(scale.to(grad_hidden.dtype)), None, None, None, *scaled)


class _PlainCrossEntropy(torch.autograd.Function):
    """The same for a bare matrix as head, with the gradient written out: no graph, one buffer of logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, chunk: int) -> Tensor:
        needs_weight = weight.requires_grad
        compute = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else weight.dtype
        )
        matrix, states = weight.to(compute), hidden.to(compute)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(states)  # N, D
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None  # V, D
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), chunk):
                piece = states[start : start + chunk]  # n, D
                target = targets[start : start + chunk, None]  # n, 1
                logits = (piece @ matrix.T).float()  # n, V
                norm = torch.logsumexp(logits, dim=-1, keepdim=True)  # n, 1
                total += (norm - logits.gather(1, target)).sum()
                slope = logits.sub_(norm).exp_()  # softmax, in place
                slope.scatter_add_(1, target, torch.full_like(norm, -1.0))
                slope = slope.to(compute)
                torch.mm(slope, matrix, out=grad_hidden[start : start + chunk])
                if grad_weight is not None:
                    grad_weight += slope.T @ piece
        ctx.grads = (grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        grad_hidden, grad_weight = ctx.grads
        scaled = None if grad_weight is None else grad_weight.mul_(scale.to(grad_weight.dtype))
        return grad_hidden.mul_(scale.to(grad_hidden.dtype)), None, scaled, None


def cross_entropy_sum(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Sum over N tokens of -log p(target). hidden: N, D; targets: N. Differentiable in hidden and in the head's
    weights."""
    vocabulary = int(cast(Any, head).weight.shape[0])
    chunk = max(64, CHUNK_LOGITS // vocabulary)
    if not torch.is_grad_enabled():
        pieces = (
            functional.cross_entropy(head(hidden[i : i + chunk]).float(), targets[i : i + chunk], reduction="sum")
            for i in range(0, len(targets), chunk)
        )
        return sum(pieces, torch.zeros((), device=hidden.device))
    if type(head) is nn.Linear and head.bias is None:
        return cast(Tensor, cast(Any, _PlainCrossEntropy).apply(hidden, targets, head.weight, chunk))
    weights = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return cast(Tensor, cast(Any, _ChunkedCrossEntropy).apply(hidden, targets, head, chunk, *weights))


def _decoder(model: nn.Module, with_pixels: bool) -> Any:
    """What makes the hidden states: the language model, or where there are pixels all that lies below the head."""
    return cast(Any, model).base_model if with_pixels else cast(Any, model).get_decoder()


def _forward(model: nn.Module) -> Callable[..., CausalLMOutputWithPast]:
    """A causal LM's forward that computes the loss of the labelled tokens and no logits."""
    head = cast(Any, model).get_output_embeddings()

    def forward(
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        where = {name: value for name, value in others.items() if isinstance(value, Tensor)}  # an image's pixels
        decoder = _decoder(model, bool(where))
        where |= {} if position_ids is None else {"position_ids": position_ids}
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **where).last_hidden_state
        learnt = labels[:, 1:] != IGNORED  # B, T-1: position t predicts token t+1
        states, targets = hidden[:, :-1][learnt], labels[:, 1:][learnt]  # N, D; N
        total = cross_entropy_sum(states, targets, head)
        count = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=cast(Any, total / count))

    return forward


def can_own_loss(model: nn.Module, row: Tensor, pixels: Mapping[str, Tensor] | None = None) -> bool:
    """Whether our loss equals the model's own on some tokens: the proof that logits are head(hidden) and nothing more.

    row: token ids, of which the first few are used, since the model's own way holds all logits at once.
    pixels: what belongs to the images of the row, which is then used whole.
    """
    ids = row[None, :].long() if pixels else row[None, :CHECKED_TOKENS].long()  # 1, T
    batch = {"input_ids": ids, "labels": ids, **(pixels or {})}
    causal = cast(Any, model)
    head = causal.get_output_embeddings()
    if getattr(causal.config.get_text_config(), "output_router_logits", False):
        return False  # its loss has the experts' balance in it, a part too small for the comparison below
    if head is None or not hasattr(head, "weight") or not hasattr(causal, "get_decoder"):
        return False
    taken = inspect.signature(_decoder(model, bool(pixels)).forward).parameters
    if not {"input_ids", *(pixels or {})} <= set(taken):
        return False
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            theirs = float(model(**batch, use_cache=False).loss)
            ours = float(cast(Any, _forward(model)(**batch).loss))
    finally:
        model.train(was_training)
    return abs(theirs - ours) <= AGREEMENT * max(1.0, abs(theirs))


@contextmanager
def own_loss(model: nn.Module) -> Iterator[None]:
    """Swap the forward of this causal LM (the inner one, below PEFT) while the block runs."""
    model.forward = _forward(model)
    try:
        yield
    finally:
        del model.forward
