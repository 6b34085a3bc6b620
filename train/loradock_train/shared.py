"""What several runs in one process have in common: the encoded data, and the frozen base, once in memory.

Each run gets a model of its own, whose parameters are the very tensors of the one base. So whatever it puts around
them (an adapter, a loss, hooks) is its own, and it ends with the bits of the run alone. Runs that would change the base
itself are refused in sweep.py.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


class Alone:
    """A run of its own: everything is made when it is asked for."""

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` makes."""
        return make()

    def model(self, load: Callable[[], nn.Module]) -> nn.Module:
        """The base."""
        return load()


class Shared(Alone):
    """For runs one after the other: what the first one made is kept for the others."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` made when this key was first asked for."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def model(self, load: Callable[[], nn.Module]) -> nn.Module:
        """A model whose parameters and buffers are those of the one base."""
        return twin(self.once("base", load))


def twin(model: nn.Module) -> nn.Module:
    """Modules of its own around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
