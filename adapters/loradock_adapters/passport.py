"""The passport: `loradock.json` beside the weights, which ties a checkpoint to what it was trained with.

Written by the trainer, read by the server, optional for checkpoints made elsewhere. Only the schema: comparing it with
the served base is the gate's work.
"""

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loradock_adapters.errors import CheckpointError, NotFoundError
from loradock_adapters.manifest import hash_file
from loradock_adapters.probe import Probe
from loradock_adapters.problems import Problem

PASSPORT_NAME = "loradock.json"
MAX_PASSPORT_BYTES = 4 << 20

Sha256 = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class _Part(BaseModel):
    # A newer trainer may write more than this reader knows: more is ignored, known keys must have their type.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class PassportBase(_Part):
    """What the checkpoint was trained on."""

    model_id: str
    """Hub id or path, as the training config named it."""
    weights_sha256: str | None = Sha256
    """`weights_sha256()` of the base's directory; null where the base had no local weights."""


class Passport(_Part):
    """The schema of `loradock.json`, format 1."""

    format: Literal[1] = 1
    base: PassportBase
    tokenizer_sha256: str | None = Sha256
    """sha256 of tokenizer.json."""
    vocabulary_sha256: str | None = Sha256
    """`Vocabulary.sha256` of it: equal where two tokenizer.json give every token the same id."""
    special_tokens: dict[str, int] = Field(default_factory=dict)
    """Text of each special token -> its id."""
    chat_template_sha256: str | None = Sha256
    """sha256 of `chat_template` in UTF-8."""
    chat_template: str | None = None
    """The template that chats are to be rendered with; null: that of the base."""
    stop_token_ids: tuple[int, ...] = Field(default=(), strict=False)
    """Token ids that end an answer, beside the base's own."""
    context_length: int | None = Field(default=None, gt=0)
    """Tokens of the longest training row."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Final losses and scores, by name."""
    seed: int | None = None
    data_sha256: str | None = Sha256
    """sha256 of the training file."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version that trained it."""
    created_at: datetime | None = Field(default=None, strict=False)
    license: str | None = Field(default=None, max_length=200)
    """SPDX id or name of the terms under which it may be used."""
    probe: Probe | None = None
    """Prompts with the trainer's own logits, for the server to compare with."""


def read_passport(directory: Path) -> Passport | None:
    """The passport of a checkpoint directory, None where it has none. Raises CheckpointError if it is broken."""
    path = directory / PASSPORT_NAME
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_PASSPORT_BYTES:
        message = f"{path.stat().st_size} bytes is over the limit of {MAX_PASSPORT_BYTES}"
        raise CheckpointError([Problem("passport_invalid", message, PASSPORT_NAME)])
    try:
        return Passport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            Problem(
                "passport_invalid",
                detail["msg"],
                ": ".join(filter(None, [PASSPORT_NAME, ".".join(map(str, detail["loc"]))])),
            )
            for detail in error.errors(include_url=False, include_input=False, include_context=False)
        ) from None


def write_passport(directory: Path, passport: Passport) -> Path:
    path = directory / PASSPORT_NAME
    path.write_text(passport.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def weights_sha256(directory: Path) -> str:
    """One hash for a directory's weights: of the lines `<sha256>  <file>` of its safetensors files, sorted by name.

    What `sha256sum *.safetensors | sha256sum` prints. The trainer writes it, the server compares it.
    """
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise NotFoundError(f"{directory} holds no safetensors files")
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{hash_file(directory, name).sha256}  {name}\n".encode())
    return digest.hexdigest()
