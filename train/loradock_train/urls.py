"""URLs of data, models and runs: which file system of fsspec reads one, and that no login stands in it or is told.

What a run is given stands in its config.yaml, in run.json and in messages, so a login in a URL is refused; drivers
take theirs from the environment. Their error texts are told without what looks like one. Reads and writes nothing.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

HIDDEN = "***"
DRIVERS = {
    "s3": "'loradock[s3]'",
    "s3a": "'loradock[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "webhdfs": "requests",
    "github": "requests",
    "hdfs": "pyarrow",
    "oss": "ossfs",
    "oci": "ocifs",
    "webdav": "'webdav4[fsspec]'",
}
"""What pip is asked to install for a scheme: our extra, or the driver's package."""
NAMES_BEFORE_AT = ("abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "smb", "hdfs", "webhdfs")
"""There a name before the @ is a container, or a user without a secret."""
_AUTHORITY = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):/{1,2}([^/\s?#'\"]*)")
_BROKEN_LOGIN = re.compile(r"(:/{1,2})[^/\s@]*:(?!\d+(?:/|$))[^\s@]*@")
"""A password with a slash in it: the host seems to end before the @."""
_SECRET_VALUE = re.compile(
    r"([?&;](?:[\w.-]*(?:sig|signature|token|secret|password|passwd|credential|api[_-]?key|access_?key\w*|auth))=)"
    r"[^&;\s'\"]+",
    re.IGNORECASE,
)


def has_login(url: str) -> bool:
    """Whether a password, a token or a signature stands in it."""
    return redacted(url) != url


def redacted(text: str) -> str:
    """The text without logins in its URLs: a driver's message, or a URL itself."""
    text = _AUTHORITY.sub(_without_login, text)
    text = _BROKEN_LOGIN.sub(rf"\1{HIDDEN}@", text)
    return _SECRET_VALUE.sub(rf"\1{HIDDEN}", text)


def _without_login(found: re.Match[str]) -> str:
    login, at, host = found[2].rpartition("@")
    if not at or login == HIDDEN or (found[1].lower() in NAMES_BEFORE_AT and ":" not in login):
        return found[0]
    return found[0].replace(f"{login}@{host}", f"{HIDDEN}@{host}")


def keys_with_login(values: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys of a config under which a URL with a login stands, at any depth. Texts with spaces are no URLs."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((str(key), *inner) for inner in keys_with_login(value))
            continue
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Mapping):
                yield from ((str(key), *inner) for inner in keys_with_login(each))
            elif isinstance(each, str) and "://" in each and not re.search(r"\s", each) and has_login(each):
                yield (str(key),)
                break


LOGIN_TOLD = (
    "a URL with a login in it would stand in files of the run; give the login by the environment, as the driver of "
    "the file system takes it"
)


def open_system(url: str) -> tuple[Any, str]:
    """The file system and the path in it. Raises ImportError, or ValueError for an unknown one: `missing_told`."""
    import fsspec  # type: ignore[import-untyped]

    system, path = fsspec.url_to_fs(url)
    return system, str(path)


def missing_told(url: str, error: Exception) -> str:
    """Of an error of open_system: what is to be installed, or what the driver says, without a login."""
    scheme = urlsplit(url).scheme
    if isinstance(error, ImportError):
        package = DRIVERS.get(scheme)
        fix = f"pip install {package}" if package is not None else f"fsspec says: {redacted(str(error))}"
        return f"nothing installed reads {scheme}:// ({fix})"
    from fsspec.registry import known_implementations  # type: ignore[import-untyped]

    if scheme in known_implementations:
        return f"{type(error).__name__}: {redacted(str(error))}"
    return f"nothing installed reads {scheme}:// (fsspec knows no such file system)"
