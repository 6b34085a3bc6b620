"""What a file is by its first bytes, whatever it is called: a pickle, an archive, a program, no text.

Reads the beginning of a file and nothing else. What names are allowed is filetypes.py's, what is inside a file of the
right kind that of whoever reads it.
"""

import codecs
from pathlib import Path

from loradock_adapters.problems import Problem

_HEAD_BYTES = 4096
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".tiktoken")
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257

_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_PROGRAMS = (
    b"\x7fELF", b"#!/", b"#! /", b"\xca\xfe\xba\xbe", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe",
    b"\xcf\xfa\xed\xfe", b"\x00asm",
)  # fmt: skip
_FOREIGN = (
    b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x04\x22\x4d\x18",
    b"\x89HDF\r\n\x1a\n", b"\x93NUMPY",
)  # fmt: skip
# These begin with letters, as a text may; only what is no text has a NUL this early.
_LETTERED_PROGRAMS = (b"MZ",)
_LETTERED_FOREIGN = (b"BZh", b"GGUF", b"ggml", b"lmgg")
_EARLY_BYTES = 64


def problem_of(head: bytes, where: str, *, weights: bool = False) -> Problem | None:
    """What the first bytes of a file give away; None where they could be anything that is allowed.

    Of `weights` a zip is what torch.save writes: a pickle.
    """
    binary = b"\0" in head[:_EARLY_BYTES]
    if head.startswith(_PICKLES) or (weights and head.startswith(_ZIPS)):
        return Problem("pickle_refused", "a pickle by its first bytes: reading it would run what is inside", where)
    if head.startswith(_PROGRAMS) or (binary and head.startswith(_LETTERED_PROGRAMS)):
        return Problem("executable_refused", "a program by its first bytes", where)
    if head.startswith(_FOREIGN + _ZIPS) or (binary and head.startswith(_LETTERED_FOREIGN)) or _is_tar(head):
        return Problem("format_refused", "an archive or a foreign format by its first bytes", where)
    return None


def _is_tar(head: bytes) -> bool:
    return head[_TAR_OFFSET:].startswith(_TAR_MAGIC)


def look_into(directory: Path, names: frozenset[str]) -> list[Problem]:
    """What is wrong with a checkpoint's files by their first bytes. Weights are left to their header's reader."""
    found = (_look(directory / name, name) for name in sorted(names) if not name.endswith(".safetensors"))
    return [problem for problem in found if problem is not None]


def _look(path: Path, name: str) -> Problem | None:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if (foreign := problem_of(head, name)) is not None:
        return foreign
    if not name.endswith(_TEXT_SUFFIXES):
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return Problem("text_not_utf8", "not UTF-8 text", name)
    return Problem("text_not_utf8", "text with a NUL character in it", name) if "\0" in text else None
