"""`s3://bucket/prefix` as a source, from a server process that speaks S3."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3  # type: ignore[import-untyped]
import httpx
import pytest

from loradock_adapters.source_ref import parse_source
from loradock_serve import source_fetch
from loradock_serve.errors import SourceNotFoundError, SourceUnavailableError
from loradock_serve.object_source import ObjectSource
from loradock_testing.gateway import Served, serving
from loradock_testing.s3_server import S3Server, environment, s3_server
from loradock_testing.tiny_checkpoints import write_adapter


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server, environment(server.environment):
        yield server


@pytest.fixture
def url(s3: S3Server) -> str:
    """A folder in a bucket of the test's own."""
    return s3.new_bucket()


@pytest.fixture
async def served(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(source_fetch, "RETRY_WAITS_S", (0.0,))
    async with serving(tmp_path, monkeypatch, sources={"push": [url]}) as running:
        await running.until_ready()
        yield running


def put(url: str, files: Path | dict[str, bytes]) -> None:
    """Files into a folder of a bucket."""
    if isinstance(files, Path):
        files = {path.name: path.read_bytes() for path in files.iterdir()}
    place = urlsplit(url)
    client = boto3.client("s3")
    for path, content in files.items():
        client.put_object(Bucket=place.netloc, Key=f"{place.path.strip('/')}/{path}", Body=content)


async def push(served: Served, source: str, name: str = "bot") -> httpx.Response:
    return await served.client.post(f"/v1/adapters/{name}/versions", json={"source": source})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


async def test_folder_of_a_bucket_is_published_and_the_same_one_again_is_a_no_op(
    served: Served, url: str, s3: S3Server, tmp_path: Path
) -> None:
    put(f"{url}/bot", write_adapter(tmp_path / "a", seed=1))
    put(f"{url}/bot", {"optimizer.pt": b"\x80", "run.py": b"x", "checkpoint-5/adapter_config.json": b"{}"})
    first = await push(served, f"{url}/bot")
    assert first.status_code == 201, first.text
    assert first.json()["source"].startswith(f"{url}/bot@etags-")
    assert await served.text("bot", "hi") == f"{first.json()['digest']}:hi"
    reads = s3.asked("GET", "bot/adapter_model")
    again = await push(served, f"{url}/bot/")
    assert (again.status_code, again.json()["created"]) == (200, False)
    assert s3.asked("GET", "bot/adapter_model") == reads
    assert s3.asked("GET", "bot/optimizer") == s3.asked("GET", "bot/run") == 0
    put(f"{url}/bot", write_adapter(tmp_path / "b", seed=2))
    changed = await push(served, f"{url}/bot")
    assert (changed.status_code, changed.json()["version"]) == (201, 2)
    assert changed.json()["source"] != first.json()["source"]


async def test_folder_outside_of_the_prefix_or_without_a_checkpoint_is_refused(
    served: Served, url: str, tmp_path: Path
) -> None:
    put(f"{url}-other", write_adapter(tmp_path / "a"))
    outside = await push(served, f"{url}-other")
    assert (outside.status_code, error_of(outside)["code"]) == (403, "source_not_allowed")
    nothing = await push(served, f"{url}/nothing")
    assert (nothing.status_code, error_of(nothing)["code"]) == (404, "source_not_found")
    put(f"{url}/other", {"notes.txt": b"no model"})
    neither = await push(served, f"{url}/other")
    assert (neither.status_code, error_of(neither)["problems"][0]["code"]) == (400, "not_a_checkpoint")


async def test_sizes_are_checked_before_anything_is_read(
    s3: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{url}/large", write_adapter(tmp_path / "a"))
    async with serving(tmp_path, monkeypatch, sources={"push": ["s3://"], "max_bytes": 2000}) as served:
        answer = await push(served, f"{url}/large")
        assert (answer.status_code, error_of(answer)["code"]) == (413, "source_too_large")
    assert s3.asked("GET", "large/adapter") == 0


def test_folder_that_is_written_to_while_it_is_read_is_noticed(url: str, tmp_path: Path) -> None:
    put(url, write_adapter(tmp_path / "a", seed=1))
    source = ObjectSource(parse_source(url))
    listing = source.look()
    assert source.still_is(listing)
    put(url, write_adapter(tmp_path / "b", seed=2))
    assert not source.still_is(listing)


def test_rest_of_an_object_is_read_from_where_it_broke_off(url: str) -> None:
    content = bytes(range(256)) * 40_000  # more than one piece
    put(url, {"config.json": content})
    source = ObjectSource(parse_source(url))
    listing = source.look()
    assert b"".join(source.read(listing, listing.files[0], 7_000_001)) == content[7_000_001:]


def test_bucket_that_is_not_there_holds_no_file(s3: S3Server) -> None:
    with pytest.raises(SourceNotFoundError, match="s3://no-such-bucket-here/x holds no file, or this server may not"):
        ObjectSource(parse_source("s3://no-such-bucket-here/x")).look()


def test_store_that_is_not_there_is_unavailable(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError, match="cannot be reached, or broke off"):
        ObjectSource(parse_source("s3://bucket/x")).look()


def test_kind_of_store_whose_package_is_not_installed_says_so() -> None:
    with pytest.raises(SourceUnavailableError, match="this server cannot read gs://"):
        ObjectSource(parse_source("gs://bucket/x")).look()
