"""What a process of a training run held, written down for a test: which parameters, of what size."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from loradock_train.trainer import LoradockTrainer


def spy(path: Path) -> None:
    """At its first step, this process writes for every parameter: is it sharded, how many numbers are here, of how
    many."""
    original, was_written = LoradockTrainer.training_step, False

    def spied(self: LoradockTrainer, model: Any, *arguments: Any) -> Any:
        nonlocal was_written
        if not was_written:
            was_written = True
            path.write_text(json.dumps({name: _facts(value) for name, value in model.named_parameters()}))
        return original(self, model, *arguments)

    LoradockTrainer.training_step = spied  # type: ignore[method-assign,assignment]


def _facts(parameter: Tensor) -> dict[str, Any]:
    is_sharded = isinstance(parameter, DTensor)
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return {
        "is_sharded": is_sharded,
        "here": here.numel(),
        "all": parameter.numel(),
        "is_trained": parameter.requires_grad,
    }
