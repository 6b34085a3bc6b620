"""Which base a version was published for: enough to tell another base, and one trained anew, from the same one moved.

From the config and a sample of the weights, which takes milliseconds where a hash of all of them takes minutes. Knows
nothing of what an adapter needs of a base (gate.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_SAMPLES = 16
_SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base, as a registry remembers it."""

    name: str
    """The last part of its id or path."""
    config_sha256: str
    """Of its config.json."""
    weights_sample: str | None
    """sha256 of samples of its safetensors files; None where they are not local (a Hub id)."""

    def is_same(self, other: "BaseIdentity") -> bool:
        """Whether both are one base: by their weights where both are known, else by name; and by config."""
        if self.config_sha256 != other.config_sha256:
            return False
        if self.weights_sample is None or other.weights_sample is None:
            return self.name == other.name
        return self.weights_sample == other.weights_sample

    def __str__(self) -> str:
        weights = f", weights {self.weights_sample[:12]}" if self.weights_sample is not None else ""
        return f"{self.name} (config {self.config_sha256[:12]}{weights})"

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> "BaseIdentity | None":
        """From a database row; None where that does not say."""
        if not isinstance(document, Mapping):
            return None
        sample = document.get("weights_sample")
        return cls(
            str(document.get("name", "")),
            str(document.get("config_sha256", "")),
            sample if isinstance(sample, str) else None,
        )

    @classmethod
    def of(cls, name: str, directory: Path, *, with_weights: bool) -> "BaseIdentity":
        """The base whose config.json, and where wanted whose weights, lie in `directory`. Raises OSError."""
        config_sha256 = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
        return cls(name, config_sha256, _sample_weights(directory) if with_weights else None)


def _sample_weights(directory: Path) -> str | None:
    """Of each file its name, its size and evenly spaced pieces: training anew changes every matrix."""
    files = sorted(directory.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size_bytes = path.stat().st_size
        digest.update(f"{path.name} {size_bytes}\n".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(0, size_bytes - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest() if files else None
