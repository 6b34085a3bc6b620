"""JSON as strangers send it: what two readers could read in two ways is refused.

Python's own reader takes the last of two equal keys, `NaN`, UTF-16 and half a surrogate pair, and Rust's takes none of
them: whoever checks a document must not see another one than whoever uses it. Knows nothing of what documents mean.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 32
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class DuplicateKeyError(ValueError):
    """Two equal keys in one JSON object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {ascii(key)[:120]} is there twice")
        self.key = key


def loads(text: bytes | str, *, constants: bool = False, integer: Callable[[str], int] = int) -> Any:
    """The document. Raises DuplicateKeyError, or ValueError for everything else that is wrong with it.

    `constants` lets `NaN` and `Infinity` pass, which transformers writes into config.json. `integer` reads whole
    numbers.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=float if constants else _no_constant,
            parse_float=float if constants else _finite,
            parse_int=integer,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _SURROGATE.search(text):
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # half a pair raises a UnicodeEncodeError
    if _deeper_than(document, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return found


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is over what a number can hold")
    return value


def _deeper_than(document: object, levels: int) -> bool:
    level = [document]
    for _ in range(levels):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = [item for item in below if isinstance(item, dict | list)]
        if not level:
            return False
    return True
