"""torch.compile, layer by layer: the layers of a model are alike, so one of them is compiled, and the others share it.

A whole model takes minutes to compile, and again for every new width of a batch. Layers take half a minute once: batch
and width are symbols in them. Only steps are compiled: validation, samples and proofs compute as they always do.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """The layers' forward is the compiled one while the block runs, wherever gradients are computed."""
    layers = layers_of(model)
    for layer in layers:
        layer.forward = _with_gradients(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _with_gradients(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True)

    def forward(*arguments: Any, **options: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*arguments, **options)

    return forward
