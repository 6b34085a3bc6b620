"""A tokenizer's vocabulary as tokenizer.json has it: which text each token id stands for, and which are special.

Two files may differ in a thousand ways (order of keys, an added template, a newer format) and still give every text the
same ids; ids that stand for other texts make a model talk nonsense. Needs nothing but the file: no transformers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TOKENIZER_JSON = "tokenizer.json"
MAX_TOKENIZER_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer.json says of its tokens."""

    file_sha256: str
    """Of the file."""
    sha256: str
    """Of its tokens: of the lines `<id> <text as JSON>`, by id and text."""
    special_tokens: Mapping[str, int]
    """Text -> id."""
    size: int
    """Different ids."""


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary of a model's directory; None where it has no tokenizer.json, or one that cannot be read.

    Kept for a few files, as long as they stay as they are: those of large vocabularies take half a second.
    """
    path = directory / TOKENIZER_JSON
    try:
        status = path.stat()
    except OSError:
        return None
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _changed_ns: int, size_bytes: int) -> Vocabulary | None:
    try:
        if not path.is_file() or size_bytes > MAX_TOKENIZER_BYTES:
            return None
        content = path.read_bytes()
        document = json.loads(content)
        tokens = _tokens(document)
        special = {
            str(added["content"]): int(added["id"])
            for added in document.get("added_tokens") or ()
            if added.get("special") is True
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    digest = hashlib.sha256()
    for token, text in sorted(tokens):
        digest.update(f"{token} {json.dumps(text)}\n".encode())
    ids = {token for token, _ in tokens}
    return Vocabulary(hashlib.sha256(content).hexdigest(), digest.hexdigest(), special, len(ids))


def _tokens(document: dict[str, object]) -> set[tuple[int, str]]:
    """All tokens, of the two layouts that exist: a map of text to id (BPE, WordPiece), a list of pairs (Unigram)."""
    model = document["model"]
    vocabulary = model["vocab"]  # type: ignore[index]
    if isinstance(vocabulary, dict):
        tokens = {(int(token), str(text)) for text, token in vocabulary.items()}
    else:
        tokens = {(token, str(pair[0])) for token, pair in enumerate(vocabulary)}
    added = document.get("added_tokens") or ()
    return tokens | {(int(entry["id"]), str(entry["content"])) for entry in added}  # type: ignore[attr-defined]
