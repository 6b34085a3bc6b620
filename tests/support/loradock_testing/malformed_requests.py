"""Malformed requests of an upload, with what a gateway has to answer: manifests, names, blobs."""

import hashlib
import json

from loradock_testing.malformed import Answer

SHA = hashlib.sha256(b"x").hexdigest()
GIB = 1024**3


def _row(**changes: object) -> dict[str, object]:
    return {"path": "README.md", "size_bytes": 1, "sha256": SHA, **changes}


def _files(*rows: object) -> bytes:
    return json.dumps({"files": rows}).encode()


def _path(path: object) -> bytes:
    return _files(_row(path=path))


MANIFESTS: dict[str, tuple[bytes, Answer]] = {
    "path_up": (_path("../../etc/passwd"), Answer("path_invalid", "files[0]", 400)),
    "path_absolute": (_path("/etc/passwd"), Answer("path_invalid", "files[0]", 400)),
    "path_windows": (_path("..\\x.json"), Answer("path_invalid", "files[0]", 400)),
    "path_hidden": (_path(".ssh.json"), Answer("path_invalid", "files[0]", 400)),
    "path_with_control_characters": (_path("a\x1b[2J\n.json"), Answer("path_invalid", "files[0]", 400)),
    "path_right_to_left": (_path("a\u202egnp.json"), Answer("path_invalid", "files[0]", 400)),
    "path_full_width": (_path("\uff0e\uff0e/x.json"), Answer("path_invalid", "files[0]", 400)),
    "path_endless": (_path("a" * 300 + ".json"), Answer("path_invalid", "files[0]", 400)),
    "path_a_number": (_path(7), Answer("path_invalid", "files[0]", 400)),
    "path_twice": (_files(_row(), _row()), Answer("path_duplicate", "README.md", 400)),
    "size_negative": (_files(_row(size_bytes=-1)), Answer("size_invalid", "files[0]", 400)),
    "size_a_text": (_files(_row(size_bytes="1")), Answer("size_invalid", "files[0]", 400)),
    "size_of_a_planet": (_files(_row(size_bytes=10**30)), Answer("size_invalid", "files[0]", 400)),
    "sizes_that_disagree": (
        _files(_row(), _row(path="NOTICE", size_bytes=2)),
        Answer("size_contradiction", "NOTICE", 400),
    ),
    "sha_too_short": (_files(_row(sha256="ab")), Answer("sha256_invalid", "files[0]", 400)),
    "sha_a_path": (_files(_row(sha256="../" * 21 + "x")), Answer("sha256_invalid", "files[0]", 400)),
    "entry_with_more_keys": (_files(_row(url="http://x")), Answer("manifest_entry", "files[0]", 400)),
    "entry_a_list": (_files([1]), Answer("manifest_entry", "files[0]", 400)),
    "no_files": (_files(), Answer("manifest_files", "files", 400)),
    "too_many_files": (_files(*[_row(path=f"{i}.json") for i in range(1001)]), Answer("manifest_files", "files", 400)),
    "files_an_object": (b'{"files": {}}', Answer("manifest_shape", "files", 400)),
    "not_json": (b"{files}", Answer("invalid_json", "body", 400)),
    "key_twice": (b'{"files": [], "files": []}', Answer("invalid_json", "body", 400)),
    "nested_deeply": (b"[" * 500_000, Answer("invalid_json", "body", 400)),
    "of_2_mb": (_files(*[_row(path=f"{i}.json") for i in range(20_000)]), Answer("too_large", "body", 413)),
    "unknown_option": (b'{"files": [], "shell": "rm"}', Answer("invalid_request", "files", 400)),
    "blobs_that_nobody_sent": (_files(_row(sha256="0" * 64)), Answer("missing_blobs", "files", 409)),
}
"""Bodies of a publish."""

NAMES: dict[str, Answer] = {
    "a%0Ab": Answer("invalid_name", "name", 400),
    "a%00b": Answer("invalid_name", "name", 400),
    "a%1b%5b2J": Answer("invalid_name", "name", 400),
    "..%5c..": Answer("invalid_name", "name", 400),
    "%D0%B0dmin": Answer("invalid_name", "name", 400),
    "base": Answer("invalid_name", "name", 400),
    "a" * 97: Answer("invalid_name", "name", 400),
}
"""Names that nobody may publish under, as they stand in the address."""

BLOBS: dict[str, tuple[str, dict[str, str], bytes, Answer]] = {
    "claims_10_gb": (SHA, {"content-length": str(10 * GIB)}, b"", Answer("too_large", "body", 413)),
    "claims_2_to_the_60": (SHA, {"content-length": str(2**60)}, b"", Answer("too_large", "body", 413)),
    "no_length": (
        SHA,
        {"transfer-encoding": "chunked"},
        b"0\r\n\r\n",
        Answer("length_required", "content-length", 411),
    ),
    "other_bytes": ("0" * 64, {"content-length": "1"}, b"x", Answer("digest_mismatch", "sha256", 400)),
    "sha_of_letters": ("z" * 64, {"content-length": "1"}, b"x", Answer("invalid_request", "sha256", 400)),
    "sha_upper_case": (SHA.upper(), {"content-length": "1"}, b"x", Answer("invalid_request", "sha256", 400)),
    "range_beyond_its_end": (
        SHA,
        {"content-length": "1", "content-range": "bytes 5-5/3"},
        b"x",
        Answer("invalid_request", "Content-Range", 400),
    ),
}
"""sha256 in the address, headers, body."""
