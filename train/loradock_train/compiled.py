"""torch.compile, layer by layer: the layers of a model are alike, so one of them is compiled, and the others share it.

A whole model takes minutes to compile, and again for every new width of a batch. Layers take half a minute once: batch
and width are symbols in them. Only steps are compiled: validation, samples and proofs compute as they always do.

torch compiles a layer again for a call unlike the earlier ones, up to a limit; past it, it runs the layer as it is, and
says so in a warning of its own alone. So such calls are counted.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from loradock_train.errors import ModelError


def check_compiler() -> None:
    """Compile a line, for this device. Raises ModelError where that does not work, before anything is loaded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = random.random()  # of a line that was compiled before, what lies in torch's cache would be taken
    try:
        torch.compile(lambda value: value * 2 + new)(torch.ones(4, device=device))
    except Exception as error:  # of torch's many parts, each has its own
        first = str(error).strip().split("\n", 1)[0]
        need = "Triton" if device == "cuda" else "a C++ compiler (g++, or the one that CXX names) and Python's headers"
        raise ModelError(
            f"torch_compile: nothing can be compiled here ({first}); it needs {need}; or leave torch_compile out"
        ) from error


def layers_of(model: nn.Module) -> list[nn.Module]:
    """What is compiled: the layers that transformers would checkpoint. Raises ModelError where there is none."""
    layers: list[nn.Module] = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"torch_compile: {type(model).__name__} has no layers that transformers marks as such; leave it out"
        )
    return layers


@dataclass
class Tally:
    """Forward passes of single layers that took gradients, those of recomputed activations among them."""

    layer_calls: int = 0
    uncompiled_calls: int = 0
    """Of these, run as they are: torch would not compile the layer once more."""

    def told(self) -> str | None:
        """What is odd about it so far."""
        if not self.uncompiled_calls:
            return None
        return (
            f"torch_compile: {self.uncompiled_calls:,} of {self.layer_calls:,} calls of a layer so far ran uncompiled: "
            f"they came in more kinds than torch compiles a layer for (its recompile_limit is {_limit()}, its own "
            "warning names the reason). The results are the same, the time and memory are those of an uncompiled run; "
            "padding: max_length, or packing, makes batches more alike"
        )

    def to_json(self) -> dict[str, int]:
        """As run.json holds it."""
        return asdict(self)


def _limit() -> int:
    from torch._dynamo import config  # as torch's own warning names it

    return int(cast(Any, config).recompile_limit)


@contextmanager
def compiled_layers(model: nn.Module, tally: Tally) -> Iterator[None]:
    """The layers' forward is the compiled one while the block runs, wherever gradients are computed."""
    layers = layers_of(model)
    codes: dict[type[nn.Module], CodeType] = {}
    for layer in layers:
        layer.forward = _with_gradients(layer, codes, tally)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _with_gradients(layer: nn.Module, codes: dict[type[nn.Module], CodeType], tally: Tally) -> Callable[..., Any]:
    plain = layer.forward

    def traced(*arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():  # in compiled code this branch is not there: Python itself is running
            tally.uncompiled_calls += 1
        return plain(*arguments, **options)

    # torch keeps what it compiled, and counts it, by the code: one for all layers of a class, one for each class.
    traced.__code__ = codes.setdefault(type(layer), traced.__code__.replace(co_name=type(layer).__name__))
    compiled = torch.compile(traced, dynamic=True)

    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **options)
        tally.layer_calls += 1
        return compiled(*arguments, **options)

    return forward
