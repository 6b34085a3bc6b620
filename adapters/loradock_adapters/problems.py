"""One thing that is wrong with an upload, or worth saying about it. Knows nothing of how it was found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding of the gate: for programs by `code`, for people by `message`, and with the way out in `fix`."""

    code: str
    message: str
    where: str = ""
    """The file, tensor, module or setting that it is about."""
    fix: str = ""
    """What the publisher can do about it; empty where there is nothing to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> "Problem":
        """A problem from an answer or a database row. Lenient: an older or newer writer must not break a reader."""
        fields: Mapping[object, object] = document if isinstance(document, Mapping) else {}

        def text(key: str) -> str:
            value = fields.get(key)
            return value if isinstance(value, str) else ""

        return cls(code=text("code") or "unknown", message=text("message"), where=text("where"), fix=text("fix"))
