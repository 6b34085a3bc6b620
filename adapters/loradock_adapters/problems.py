"""One thing that is wrong with an upload, or worth saying about it. Knows nothing of how it was found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from loradock_adapters.codes import fix_of


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding of the gate: for programs by `code`, for people by `message`, and with the way out in `fix`."""

    code: str
    message: str
    where: str = ""
    """The file, tensor, module or setting that it is about."""
    fix: str = ""
    """What the publisher can do about it; by default what its code says (codes.py)."""

    def __post_init__(self) -> None:
        if not self.fix:
            object.__setattr__(self, "fix", fix_of(self.code))

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
