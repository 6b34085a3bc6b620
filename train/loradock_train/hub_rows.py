"""Data sets of the Hugging Face Hub, streamed: `hf://datasets/ORG/NAME?split=train&config=…&revision=…`.

`datasets` reads them; each of its shards is a shard of ours, and its state is our mark, so that a run goes on in the
middle of one. Other addresses under hf:// (files) are read as files, by fsspec.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from loradock_train.errors import DataError, Problem
from loradock_train.rows import Row
from loradock_train.stream import Read
from loradock_train.urls import redacted

PREFIX = "hf://datasets/"
OPTIONS = ("split", "config", "revision")


def is_hub(path: str) -> bool:
    """A data set, not a file in one: two names and no more."""
    return path.startswith(PREFIX) and urlsplit(path[len(PREFIX) :]).path.strip("/").count("/") <= 1


@dataclass(frozen=True)
class HubShard:
    """One shard of a streamed data set. Its mark: the state of `datasets`, and rows read."""

    url: str
    data: Any
    index: int
    of: int

    @property
    def name(self) -> str:
        return f"{self.url} shard {self.index}"

    @property
    def weight(self) -> float:
        return 1.0

    def fingerprint(self) -> str:
        info = self.data.info
        return f"{self.of} shards, version {info.version}, {info.download_size} bytes"

    def read(self, mark: Any, problems: list[Problem]) -> Iterator[Read]:
        state, line = mark if mark is not None else (None, 0)
        shard = self.data.shard(num_shards=self.of, index=self.index)
        if state is not None:
            shard.load_state_dict(state)
        for values in shard:
            line += 1
            row = Row(self.name, line, {key: value for key, value in values.items() if value is not None})
            yield Read(row, _size(values), [shard.state_dict(), line], 0.0)


def hub_shards(url: str, key: str) -> list[HubShard]:
    """The shards of a data set. Raises DataError naming `key`."""
    parts = urlsplit(url[len(PREFIX) :])
    options = dict(parse_qsl(parts.query))
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        told = f"unknown option {unknown[0]} (known: {', '.join(OPTIONS)})"
        raise DataError(f"{key} cannot be read:", [Problem(url, told)])
    try:
        data = _load(parts.path.strip("/"), options)
    except Exception as error:  # noqa: BLE001 (datasets and huggingface_hub raise many kinds, and the network's)
        first = redacted(str(error)).strip().splitlines()[:1]
        raise DataError(f"{key} cannot be read:", [Problem(url, ": ".join([type(error).__name__, *first]))]) from None
    return [HubShard(url, data, index, data.num_shards) for index in range(data.num_shards)]


def _load(name: str, options: dict[str, str]) -> Any:
    import datasets  # type: ignore[import-untyped]

    return datasets.load_dataset(
        name, options.get("config"), split=options.get("split", "train"), revision=options.get("revision"),
        streaming=True,
    )  # fmt: skip


def _size(values: Any) -> int:
    """About the bytes of its texts."""
    if isinstance(values, dict):
        return sum(_size(value) for value in values.values())
    if isinstance(values, list):
        return sum(_size(value) for value in values)
    return len(values) if isinstance(values, str) else 8
