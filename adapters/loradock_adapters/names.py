"""The names that models go by: `name`, `name@3`, `name@sha256:<64 hex>`, `name@tag`.

Pure text. Does not know which names exist; the registry does.
"""

import re
from dataclasses import dataclass

from loradock_adapters.errors import InvalidNameError

MAX_NAME_CHARS = 96
MAX_TAG_CHARS = 63
RESERVED_NAMES = frozenset({"base"})
"""Names that a publisher cannot take: the served base answers under them."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TAG = re.compile(rf"[a-z0-9_][a-z0-9._-]{{0,{MAX_TAG_CHARS - 1}}}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What a request's `model` asks for: at most one of the three below; with none it follows the name."""

    name: str
    version: int | None = None
    digest: str | None = None
    tag: str | None = None

    @property
    def pin(self) -> str | None:
        """What stands behind the `@`; None where the name is followed."""
        return self.digest or self.tag or (str(self.version) if self.version is not None else None)

    def __str__(self) -> str:
        return self.name if self.pin is None else f"{self.name}@{self.pin}"


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
    return parse_pin(name, pin)


def parse_pin(name: str, pin: str) -> ModelRef:
    """A reference to one version of a name, which is well-formed, by what stands behind the `@`."""
    if _NUMBER.fullmatch(pin):
        return ModelRef(name, version=int(pin))
    if _DIGEST.fullmatch(pin):
        return ModelRef(name, digest=pin)
    if is_tag(pin):
        return ModelRef(name, tag=pin)
    raise InvalidNameError(
        f"{_shown(pin)} pins no version of {name}: write {name}@3, {name}@sha256:<64 hex digits>, or {name}@prod for a "
        "version with that tag"
    )


def check_tag(tag: str) -> str:
    """The tag itself, if it is one; InvalidNameError says why not."""
    if not is_tag(tag):
        raise InvalidNameError(
            f"{_shown(tag)} is not a tag: 1 to {MAX_TAG_CHARS} lower-case letters, digits, '.', '_' and '-', no '.' or "
            "'-' first, and not digits alone, which are numbers of versions"
        )
    return tag


def is_tag(text: str) -> bool:
    """Whether it has a tag's form, which no number and no digest has."""
    return _TAG.fullmatch(text) is not None and not text.isdigit()


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
