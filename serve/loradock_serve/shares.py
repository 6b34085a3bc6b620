"""Who gets which version of a name whose traffic is split.

Weighted rendezvous hashing: every version draws a number from the caller's hash, scaled by its weight, and the highest
wins. So each version gets its share of the callers; a caller keeps its version while the weights stay, on every gateway
and after every restart; and when weights change, only callers move that have to: into versions that grew, out of those
that shrank. Pure; knows no versions but their numbers.
"""

import hashlib
import math
from collections.abc import Sequence

_BITS = 52
"""As many as a float holds exactly, with room to stay below 1."""


def pick(name: str, weights: Sequence[tuple[int, int]], caller: str) -> int:
    """The number of the version that a caller of `name` gets, of (number, weight) pairs.

    `caller` is any text; a random one for a request of nobody in particular.
    """
    return max(weights, key=lambda share: (_draw(name, share[0], share[1], caller), share[0]))[0]


def _draw(name: str, number: int, weight: int, caller: str) -> float:
    """Exponentially distributed with the rate 1 / weight: the highest of these is each version's with the probability
    of its share (Wang and Ravishankar 1998 for equal weights; the weighted draw is Efraimidis and Spirakis 2006)."""
    seed = hashlib.blake2b(f"{name}@{number} {caller}".encode(errors="surrogatepass"), digest_size=8).digest()
    uniform = ((int.from_bytes(seed) >> (64 - _BITS)) + 0.5) / (1 << _BITS)
    return -weight / math.log(uniform)
