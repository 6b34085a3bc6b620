"""The names that models go by: `name`, `name@3`, `name@sha256:<64 hex>`.

Pure text. Does not know which names exist; the registry does.
"""

import re
from dataclasses import dataclass

from loradock_adapters.errors import InvalidNameError

MAX_NAME_CHARS = 96
RESERVED_NAMES = frozenset({"base"})
"""Names that a publisher cannot take: the served base answers under them."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What a request's `model` asks for. With neither a version nor a digest it follows the name's current version."""

    name: str
    version: int | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.digest is not None:
            return f"{self.name}@{self.digest}"
        return self.name if self.version is None else f"{self.name}@{self.version}"


def check_name(name: str) -> str:
    """The name itself, if a publisher may take it; InvalidNameError says why not."""
    _check_form(name)
    if name in RESERVED_NAMES:
        raise InvalidNameError(f"the name {name!r} is reserved for the served base model; choose another")
    return name


def parse_ref(text: str) -> ModelRef:
    """A reference to a model. Reserved names are well-formed here: they can be asked for, only not published."""
    name, separator, pin = text.partition("@")
    _check_form(name)
    if not separator:
        return ModelRef(name)
    if _NUMBER.fullmatch(pin):
        return ModelRef(name, version=int(pin))
    if _DIGEST.fullmatch(pin):
        return ModelRef(name, digest=pin)
    raise InvalidNameError(f"{_shown(pin)} pins no version of {name}: write {name}@3 or {name}@sha256:<64 hex digits>")


def _check_form(name: str) -> None:
    if len(name) > MAX_NAME_CHARS:
        raise InvalidNameError(f"a name of {len(name)} characters is over the limit of {MAX_NAME_CHARS}")
    if not _NAME.fullmatch(name):
        raise InvalidNameError(
            f"{_shown(name)} is not a model name: lower-case letters, digits, '.', '_' and '-', "
            "and a letter or digit first"
        )


def _shown(text: str) -> str:
    """Untrusted text for a message: control characters escaped, and not endlessly long."""
    return ascii(text if len(text) <= MAX_NAME_CHARS else text[:MAX_NAME_CHARS] + "...")
