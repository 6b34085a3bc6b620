"""What a run was asked for, and where it tells how far it is. Knows nothing of what is measured."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IN_FLIGHT = 64
MAX_TOKENS = 48
KV_CACHE_GIB = 1


@dataclass(frozen=True)
class Options:
    """From the command line."""

    dtype: str
    slots: tuple[int, ...]
    adapters: tuple[int, ...]
    """0 is the base alone."""
    rounds: int
    quick: bool
    cores: str | None
    serve: Mapping[str, Any] = field(default_factory=dict)
    """Sections of Loradock's own config, for trying one; recorded with the results."""

    def requests(self, full: int) -> int:
        """How many, where an unhurried run takes `full`."""
        return max(IN_FLIGHT, full // 3) if self.quick else full


def progress(text: str) -> None:
    """A line for whoever waits, on stderr: stdout has the results only."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
