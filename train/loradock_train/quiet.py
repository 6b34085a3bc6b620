"""A command's own words on stderr, and nobody else's: what libraries print of their own accord is turned down.

Called by commands before their heavy imports, never by the Python API: there it is the caller's choice.
"""

import logging


def quieten() -> None:
    """transformers' warnings and bars, and bitsandbytes' advice at import to fetch a kernel from the Hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
