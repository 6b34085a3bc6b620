"""Proof that the checkpoint on disk is the model that was trained, and that training changed something.

The next-token logits of a few prompts, each time: base, adapter that training went on from, trained model, checkpoint
reloaded from its files. An adapter that does nothing is the most common complaint about LoRA serving, and it is found
here in seconds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from loradock_adapters.probe import Probe, ProbePrompt, ProbeToken
from loradock_train.errors import ProofError
from loradock_train.head import class_logits
from loradock_train.model import auto_class, has_head, inner_model

MAX_PROMPT_TOKENS = 256
TOP = 8
PROOF_ADAPTER = "proof"
Pixels: TypeAlias = Mapping[int, Mapping[str, Tensor]]
"""By the number of a prompt that shows an image: what the model gets beside its tokens."""


@dataclass(frozen=True)
class Proof:
    """What was compared. Differences are the largest over all probes and the whole vocabulary, in logits."""

    prompts: tuple[tuple[int, ...], ...]
    reloaded: Tensor  # prompts, V
    base: Tensor  # prompts, V
    reloaded_difference: float
    base_difference: float
    dtype: str
    """Of the saved weights."""
    computed_in: str
    """Of the weights in memory, with which the logits were computed."""
    pictured: frozenset[int] = frozenset()
    """Numbers of the prompts that show an image."""
    began_difference: float | None = None
    """From the adapter that training went on from; None where it began with a new one."""

    def passport_entry(self) -> Probe:
        """The `probe` of the passport: each prompt's best tokens, by the checkpoint as it is on disk and by its base.

        The server compares its engine's answers with both: from the base's it learns how much of a difference is
        rounding. Prompts with images stay here: tokens alone do not show one.
        """
        prompts = tuple(
            ProbePrompt(prompt_token_ids=prompt, top=_best(logits), base_top=_best(base))
            for number, (prompt, logits, base) in enumerate(zip(self.prompts, self.reloaded, self.base, strict=True))
            if number not in self.pictured
        )
        differences = {"reloaded": self.reloaded_difference, "base": self.base_difference}
        return Probe(dtype=self.dtype, computed_in=self.computed_in, prompts=prompts, max_logit_difference=differences)


def _best(logits: Tensor) -> tuple[ProbeToken, ...]:
    """The likeliest tokens, the best first. `logits` (V)."""
    logs = logits.log_softmax(-1)
    best: list[int] = logits.topk(min(TOP, len(logits))).indices.tolist()
    return tuple(ProbeToken(id=i, logit=round(float(logits[i]), 5), logprob=round(float(logs[i]), 5)) for i in best)


def probe_logits(model: nn.Module, prompts: Sequence[Sequence[int]], pixels: Pixels | None = None) -> Tensor:
    """Next-token logits of each prompt, float32, on the CPU. Returns (prompts, V)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows: list[Tensor] = []
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            beside = {name: value.to(device) for name, value in (pixels or {}).get(number, {}).items()}
            ids = torch.tensor([list(prompt)], device=device)  # 1, T
            if has_head(model):
                logits = class_logits(inner_model(model), ids, None)[0]
            else:
                logits = model(input_ids=ids, use_cache=False, **beside).logits[0, -1]
            rows.append(logits.float().cpu())
    model.train(was_training)
    return torch.stack(rows)


def reload_logits(
    model: nn.Module, checkpoint: Path, prompts: Sequence[Sequence[int]], pixels: Pixels | None = None
) -> Tensor:
    """The same from the files of the checkpoint. An adapter is loaded over the base that is in memory anyway."""
    if isinstance(model, PeftModel):
        if getattr(model.peft_config["default"], "bias", "none") != "none":
            return _reload_in_place(model, checkpoint, prompts)
        model.load_adapter(str(checkpoint), adapter_name=PROOF_ADAPTER)
        model.set_adapter(PROOF_ADAPTER)
        try:
            return probe_logits(model, prompts, pixels)
        finally:
            model.set_adapter("default")
            model.delete_adapter(PROOF_ADAPTER)
    parameter = next(model.parameters())
    loader = AutoModelForSequenceClassification if has_head(model) else auto_class(cast(Any, model).config)
    loaded: Any = loader.from_pretrained(str(checkpoint), dtype=parameter.dtype)
    loaded.to(parameter.device)
    return probe_logits(loaded, prompts, pixels)


def _reload_in_place(model: PeftModel, checkpoint: Path, prompts: Sequence[Sequence[int]]) -> Tensor:
    """For trained biases, which are the base's own: there is no room for a second adapter's. What was trained gives way
    to zeros and the files' tensors, and comes back afterwards."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {name: tensor.detach().clone() for name, tensor in state.items()}
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    try:
        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        return probe_logits(model, prompts)
    finally:
        set_peft_model_state_dict(model, kept)


def prove(
    prompts: Sequence[Sequence[int]],
    base: Tensor,
    trained: Tensor,
    reloaded: Tensor,
    saved: torch.dtype,
    kind: str,
    computed_in: torch.dtype | None = None,
    pictured: Collection[int] = (),
    began: Tensor | None = None,
) -> Proof:
    """Raises ProofError when the checkpoint answers unlike the trained model, or exactly like what it was made from.

    `saved`, `computed_in`: types of the weights in the files, and in memory (default: the same). `began`: answers of
    the adapter that training went on from.
    """
    if not bool(torch.isfinite(reloaded).all()):
        raise ProofError(
            "the reloaded checkpoint gives NaN or infinite logits; lower the learning rate and train again"
        )
    scale = max(1.0, float(trained.abs().max()))
    tolerance = (2e-3 if saved == torch.float32 else 5e-2) * scale
    difference = float((reloaded - trained).abs().max())
    if difference > tolerance:
        raise ProofError(
            f"the checkpoint reloaded from its files differs from the trained model by {difference:.4g} logits "
            f"(at most {tolerance:.4g} is rounding): do not serve it"
        )
    change = float((reloaded - base).abs().max())
    if change == 0.0:
        raise ProofError(
            f"training changed nothing: on {len(prompts)} prompts the {kind} checkpoint answers exactly like its base "
            "(0 difference); raise learning_rate or the number of steps, and check lora_config.target_modules"
        )
    further = None if began is None else _further(len(prompts), began, trained, reloaded, saved)
    return Proof(
        tuple(tuple(int(token) for token in prompt) for prompt in prompts),
        reloaded,
        base,
        difference,
        change,
        str(saved).removeprefix("torch."),
        str(computed_in if computed_in is not None else saved).removeprefix("torch."),
        frozenset(pictured),
        further,
    )


def _further(num_prompts: int, began: Tensor, trained: Tensor, reloaded: Tensor, saved: torch.dtype) -> float:
    """How far the checkpoint came from the adapter that training went on from. Raises ProofError for not at all."""
    change = float((reloaded - began).abs().max())
    if float((trained - began).abs().max()) == 0.0:
        why = "raise learning_rate or the number of steps"
    elif change == 0.0:
        why = f"what it learnt is less than {str(saved).removeprefix('torch.')} can hold: save_dtype: float32, or more"
    else:
        return change
    raise ProofError(
        f"training changed nothing: on {num_prompts} prompts the checkpoint answers exactly like the adapter that it "
        f"went on from, adapter_path (0 difference); {why}"
    )
