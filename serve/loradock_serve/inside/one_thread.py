"""Small operators of CPU engines on the thread that calls them.

PyTorch's and vLLM's operators share their work out over all of an engine's cores, however little it is: a norm of 64
rows takes 6 µs on one thread, and 50 where a second one has to be woken for it (measured: docs/decisions.md). OpenMP
keeps the number of threads per calling thread, so turning it down for one call is nobody else's business.
"""

import ctypes
from collections.abc import Callable
from typing import Any

SMALL_ELEMENTS = 2**18
"""Up to so many numbers are written by one thread. Two were as quick from about twice as many on."""

# In the process, as row_kernel.py does: by a file's name another OpenMP might be found.
_process = ctypes.CDLL(None)
_get_threads: Callable[[], int] = _process.omp_get_max_threads
_set_threads: Callable[[int], Any] = _process.omp_set_num_threads


def on_one_thread(elements: int, operator: Callable[..., Any], *arguments: Any) -> Any:
    """What the operator returns, computed on this thread alone where it writes few numbers."""
    if elements > SMALL_ELEMENTS:
        return operator(*arguments)
    threads = _get_threads()
    _set_threads(1)
    try:
        return operator(*arguments)
    finally:
        _set_threads(threads)
