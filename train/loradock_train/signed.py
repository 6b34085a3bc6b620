"""Signed URLs of data: `https://…/rows.jsonl?X-Amz-Signature=…`, each opens one file to whoever has it, for some hours.

The query is used to fetch and is kept in this process (and handed to the processes that it starts) alone: a config has
the URL without it, and so has all that is written or said of a run. To go on with a run takes a signature that is good
then, of the same URL. Knows nothing of what is fetched.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from loradock_train.urls import has_login, open_system

VARIABLE = "LORADOCK_SIGNED_QUERIES"
"""Of the environment of a run's processes: the queries, by their URLs, as JSON."""
KEYS = (("train_path",), ("valid_path",), ("similarity", "path"))
_queries: dict[str, str] = {}
"""By the URL without it: those of the configs that this process has read."""


def is_signed(url: str) -> bool:
    """Whether a secret stands in the query of a web URL, and none before it."""
    return (
        url.startswith(("https://", "http://"))
        and "?" in url
        and not any(letter.isspace() for letter in url)
        and has_login(url)
        and not has_login(_bare(url))
    )


def take_signatures(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The values of a config without the signatures of its data, which are kept here; and a notice of each. Raises
    ValueError for two URLs that differ in their query alone."""
    found: dict[str, str] = {}
    notices: list[str] = []
    for keys in KEYS:
        section = values if len(keys) == 1 else values.get(keys[0])
        if isinstance(section, Mapping) and (bare := _taken(section.get(keys[-1]), found)) is not None:
            section = {**section, keys[-1]: bare}
            values = section if len(keys) == 1 else {**values, keys[0]: section}
            notices.extend(_told(".".join(keys), bare, found))
    _queries.update(found)
    return values, notices


def _taken(value: Any, found: dict[str, str]) -> Any:
    """The value without signatures; None where it has none."""
    paths = value if isinstance(value, list | tuple) else [value]
    if not any(isinstance(path, str) and is_signed(path) for path in paths):
        return None
    bare = []
    for path in paths:
        if isinstance(path, str) and is_signed(path):
            url, query = _bare(path), path[len(_bare(path)) + 1 :]
            if found.setdefault(url, query) != query:
                raise ValueError(f"{url} stands there with two signatures, and is told from the other by nothing else")
            path = url
        bare.append(path)
    return bare if isinstance(value, list | tuple) else bare[0]


def _told(key: str, bare: Any, found: Mapping[str, str]) -> Iterable[str]:
    for url in bare if isinstance(bare, list) else [bare]:
        if url in found:
            yield (
                f"{key}: {url} is fetched with the signature that it was given, which no file of the run holds; to go "
                "on with the run, give one that is good then"
            )


def _bare(url: str) -> str:
    return url.partition("?")[0]


def has_signature(url: str) -> bool:
    """Whether one is known for this URL, which stands without it."""
    _inherit()
    return url in _queries


def open_data(url: str) -> tuple[Any, str]:
    """As urls.open_system, with the signature of a URL that has one."""
    if not has_signature(url):
        return open_system(url)
    import fsspec  # type: ignore[import-untyped]

    # encoded: a signature is over the very letters of the URL.
    system, path = fsspec.url_to_fs(f"{url}?{_queries[url]}", encoded=True)
    return system, str(path)


def hidden(text: str) -> str:
    """The text without any query that is known here."""
    _inherit()
    for query in _queries.values():
        text = text.replace(query, "***")
    return text


def environment() -> dict[str, str]:
    """What a process of the run is told besides."""
    _inherit()
    return {VARIABLE: json.dumps(_queries)} if _queries else {}


def _inherit() -> None:
    """What whoever started this process has told it."""
    for url, query in json.loads(os.environ.get(VARIABLE, "{}")).items():
        _queries.setdefault(url, query)


def signed_keys(values: Mapping[str, Any]) -> list[str]:
    """Under which keys of a config data is fetched with a signature."""
    named = []
    for keys in KEYS:
        section = values if len(keys) == 1 else values.get(keys[0])
        paths = section.get(keys[-1]) if isinstance(section, Mapping) else None
        if any(has_signature(str(path)) for path in (paths if isinstance(paths, list | tuple) else [paths])):
            named.append(".".join(keys))
    return named
