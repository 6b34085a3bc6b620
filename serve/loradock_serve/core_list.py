"""Lists of CPU cores as vLLM writes them: "0-3", "0,2-5", one list for each worker after a "|"."""

import re

OF_THE_ENGINE = {"auto", "nobind"}
"""vLLM's own words: all cores but one, and none in particular."""
MOST_CORES = 2**16
_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*", re.ASCII)


def parse_cores(text: str) -> list[int]:
    """The cores that a list names, sorted; none for vLLM's own words.

    Raises ValueError where it is no such list.
    """
    if text in OF_THE_ENGINE:
        return []
    named: set[int] = set()
    for worker in text.split("|"):
        if not _CORES.fullmatch(worker):
            raise ValueError(f'{text!r} is no list of cores; write it as "0-3" or "0,2"')
        for part in worker.split(","):
            first, _, last = part.partition("-")
            low, high = int(first), int(last or first)
            if high < low or high > MOST_CORES:
                raise ValueError(f"{part!r} in {text!r} is no range of cores")
            named.update(range(low, high + 1))
    return sorted(named)
