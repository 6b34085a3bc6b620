"""What a server would make of the checkpoint that a run is going to write: the adapter gate's own verdict, beforehand.

The gate is given what it is given for an upload (the adapter's config, names, types and shapes of its tensors), taken
from the model itself, which may be on the meta device. So no rule is written down twice. What only values can show
(NaN, an adapter that changes nothing) is left to the proof after the training.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loradock_adapters.base import BaseModel, base_from
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS, Checkpoint
from loradock_adapters.client import Client
from loradock_adapters.engine_rules import DEFAULT_MAX_LORA_RANK, VLLM_VERSION, EngineLimits
from loradock_adapters.errors import LoradockError, UsageError
from loradock_adapters.gate import Verdict, judge
from loradock_adapters.passport import Passport, PassportBase
from loradock_adapters.safetensors_header import DTYPE_BITS, TensorInfo
from loradock_train.encode import stop_token_ids
from loradock_train.export import adapter_settings, adapter_tensors
from loradock_train.model import base_files
from loradock_train.report import vocabulary_of

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Target:
    """Where the checkpoint is going to be served."""

    limits: EngineLimits
    base: BaseModel | None
    """The served base; None: the one that is trained on."""
    name: str
    """For messages."""


DEFAULT_TARGET = Target(
    EngineLimits(DEFAULT_MAX_LORA_RANK),
    None,
    f"vLLM {VLLM_VERSION} with max_lora_rank {DEFAULT_MAX_LORA_RANK}, `loradock serve`'s default",
)


def target_of_server(server: str, api_key: str | None) -> Target:
    """A running server, by what it says of its base and its engine. Raises ServerError, UnreachableError."""
    with Client(server, api_key) as client:
        told = client.base()
    try:
        limits = EngineLimits.from_json(told.get("limits"))
        identity = BaseIdentity.from_json(told.get("identity"))
        base = BaseModel.from_json(told, weights=identity.weights_sample if identity is not None else None)
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(f"{server} does not say what it serves as a Loradock server does: {error}") from error
    rank = f"max_lora_rank {limits.max_lora_rank}" if limits.enable_lora else "no LoRA"
    return Target(limits, base, f"{client.server}, which serves {told.get('name')} with {rank}")


@dataclass(frozen=True)
class Forecast:
    """What the run's checkpoint would be."""

    verdict: Verdict
    target: str
    checkpoint_bytes: int
    """Of its tensors."""

    @property
    def is_as_expected(self) -> bool:
        """An adapter that is hot-swapped, or whole weights that are served at all."""
        return self.verdict.placement == ("shared" if self.verdict.kind == "lora" else "dedicated")

    def line(self) -> str:
        """The verdict in a line."""
        what = {
            "shared": "shared: hot-swapped on its base's engine",
            "dedicated": "dedicated: it will be served by a dedicated engine, not hot-swapped",
            "rejected": "rejected: the server would refuse it",
        }[self.verdict.placement]
        reasons = () if self.is_as_expected else self.verdict.reasons[:3]
        why = f" ({'; '.join(str(reason).removeprefix(f'{ADAPTER_CONFIG}: ') for reason in reasons)})" * bool(reasons)
        return f"placement {what}{why}; by the rules of {self.target}"


def foretell(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    model_id: str | None,
    saved: torch.dtype,
    target: Target = DEFAULT_TARGET,
) -> Forecast:
    """The verdict on what `model`, with its adapter where it has one, would be saved as.

    model_id: the base that is trained on; None from scratch. saved: type of the exported weights.
    """
    own = None if model_id is None else base_files(model_id)
    base = target.base if target.base is not None else _read(own, model_id)
    if isinstance(model, PeftModel):
        tensors, config = _layout(adapter_tensors(model), saved), _as_json(adapter_settings(model))
        files = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS})
        passport = _passport(own, model_id, tokenizer, target.base is not None)
        found = Checkpoint(
            "lora",
            Path(),
            config,
            {ADAPTER_WEIGHTS: tensors},
            stop_token_ids=passport.stop_token_ids if passport is not None else (),
            passport=passport,
            file_names=files,
        )
        verdict = judge(found, base, target.limits, check_values=False)
    else:
        tensors, config = _layout(_untied(model), saved), _as_json(model.config.to_dict())
        config["architectures"] = [type(model).__name__]
        files = frozenset({MODEL_CONFIG, MODEL_WEIGHTS, "tokenizer.json"})
        verdict = judge(
            Checkpoint("full", Path(), config, {MODEL_WEIGHTS: tensors}, file_names=files),
            base,
            target.limits,
            check_values=False,
        )
    return Forecast(verdict, target.name, sum(tensor.size_bytes for tensor in tensors.values()))


def _read(directory: Path | None, model_id: str | None) -> BaseModel | None:
    """The base that is trained on, as a server of it would see it."""
    if directory is None:
        return None
    try:
        return base_from(directory, model_id=model_id)
    except LoradockError:
        return None  # the training says what is wrong with it


def _passport(
    directory: Path | None, model_id: str | None, tokenizer: PreTrainedTokenizerBase, elsewhere: bool
) -> Passport | None:
    """As far as the gate compares it. For a server's base with a sample of the weights in place of their hash, which
    takes minutes: both sides of the comparison are samples (`target_of_server`)."""
    if directory is None:
        return None
    sample = BaseIdentity.of("", directory, with_weights=True).weights_sample if elsewhere else None
    vocabulary = vocabulary_of(tokenizer, directory)
    return Passport(
        base=PassportBase(model_id=str(model_id), weights_sha256=sample),
        tokenizer_sha256=None if vocabulary is None else vocabulary.file_sha256,
        vocabulary_sha256=None if vocabulary is None else vocabulary.sha256,
        special_tokens={} if vocabulary is None else dict(vocabulary.special_tokens),
        stop_token_ids=stop_token_ids(tokenizer),
    )


def _untied(model: Any) -> dict[str, Tensor]:
    """The tensors of a whole model's file: a matrix that stands under two names is saved under the first."""
    once = {name for name, _ in model.named_parameters()}
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict().items() if name not in twice}


def _layout(tensors: Mapping[str, Tensor], saved: torch.dtype) -> dict[str, TensorInfo]:
    """The header that a file of these tensors would have."""
    found: dict[str, TensorInfo] = {}
    position = 0
    for name, tensor in tensors.items():
        dtype = _DTYPES[saved] if tensor.is_floating_point() else "I64"
        end = position + math.prod(tensor.shape) * DTYPE_BITS[dtype] // 8
        found[name] = TensorInfo(dtype, tuple(tensor.shape), (position, end))
        position = end
    return found


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As it reads when it was written to a file."""
    document: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return document
