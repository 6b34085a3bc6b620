"""`{"source": "hf://…"}`: what the server fetches from a Hub, what it refuses, and where the token does not go."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from loradock_adapters.manifest import Manifest
from loradock_serve import source_fetch
from loradock_serve.publish import Options, Published, Publisher
from loradock_testing.gateway import Served, serving
from loradock_testing.hub_server import Hub, hub_server
from loradock_testing.tiny_checkpoints import write_adapter, write_full_model
from loradock_testing.waiting import until

TOKEN = "hf_Secret0fNobodyElse"


pytestmark = pytest.mark.asyncio(loop_scope="module")
seeds = itertools.count(1)


@pytest.fixture(scope="module")
def one_hub() -> Iterator[Hub]:
    with pytest.MonkeyPatch.context() as monkeypatch, hub_server() as running:
        monkeypatch.setattr(source_fetch, "RETRY_WAITS_S", (0.0, 0.0))
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


@pytest.fixture
def hub(one_hub: Hub) -> Iterator[Hub]:
    """The Hub, empty."""
    yield one_hub
    one_hub.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(one_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with serving(tmp_path_factory.mktemp("sources"), monkeypatch) as running:
            await running.until_ready()
            yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that no other test has: what the store holds already is not downloaded."""
    return write_adapter(tmp_path / "adapter", seed=next(seeds))


async def push(
    served: Served, source: Any, name: str | None = None, token: str | None = None, **more: Any
) -> httpx.Response:
    headers = {"x-loradock-source-token": token} if token is not None else {}
    return await served.client.post(
        f"/v1/adapters/{name or own_name()}/versions", json={"source": source, **more}, headers=headers
    )


def own_name() -> str:
    """A name for the test that runs, and for it alone."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)")
    return f"bot-{hashlib.sha256(test.encode()).hexdigest()[:16]}"


def route() -> str:
    return f"/v1/adapters/{own_name()}/versions"


async def is_visible(served: Served) -> bool:
    return (await served.client.get(f"/v1/adapters/{own_name()}")).status_code != 404


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def test_adapter_of_the_hub_is_published_at_its_commit_and_answers(
    served: Served, hub: Hub, adapter: Path
) -> None:
    commit = hub.commit("org/bot", adapter)
    answer = await push(served, "hf://org/bot")
    assert answer.status_code == 201, answer.text
    assert (answer.json()["source"], answer.json()["version"]) == (f"hf://org/bot@{commit}", 1)
    assert answer.json()["placement"] == "shared"
    assert await served.text(own_name(), "hi") == f"{answer.json()['digest']}:hi"


async def test_uploads_and_fetches_of_the_same_files_are_the_same_version(
    served: Served, hub: Hub, adapter: Path
) -> None:
    uploaded = (await served.push(adapter, own_name())).json()
    hub.commit("org/bot", adapter)
    fetched = await push(served, "hf://org/bot")
    assert (fetched.status_code, fetched.json()["digest"]) == (200, uploaded["digest"])


async def test_same_commit_again_is_a_no_op_and_downloads_nothing(served: Served, hub: Hub, adapter: Path) -> None:
    commit = hub.commit("org/bot", adapter)
    await push(served, "hf://org/bot@main")
    downloads = hub.count("/resolve/")
    again = await push(served, f"hf://org/bot@{commit}")
    assert (again.status_code, again.json()["created"], again.json()["version"]) == (200, False, 1)
    assert hub.count("/resolve/") == downloads


async def test_branch_that_moved_makes_the_next_version(served: Served, hub: Hub, adapter: Path) -> None:
    hub.commit("org/bot", adapter)
    first = await push(served, "hf://org/bot")
    commit = hub.commit("org/bot", write_adapter(adapter.parent / "b", seed=next(seeds)))
    second = await push(served, "hf://org/bot")
    assert (second.json()["version"], second.json()["source"]) == (2, f"hf://org/bot@{commit}")
    assert first.json()["digest"] != second.json()["digest"]


async def test_revision_is_a_branch_a_tag_or_a_pull_request(served: Served, hub: Hub, adapter: Path) -> None:
    hub.commit("org/bot", adapter)
    wanted = hub.commit("org/bot", write_adapter(adapter.parent / "b", seed=next(seeds)), branch="refs/pr/7")
    answer = await push(served, "hf://org/bot@refs/pr/7")
    assert answer.json()["source"] == f"hf://org/bot@{wanted}"
    missing = await push(served, "hf://org/bot@v9")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "source_not_found")
    assert "no such revision" in error_of(missing)["message"]


async def test_only_the_files_of_the_checkpoint_are_fetched(served: Served, hub: Hub, adapter: Path) -> None:
    files = files_of(adapter)
    extra = dict.fromkeys(
        [
            "adapter_model.bin",
            "training_args.bin",
            "run.py",
            "model.safetensors",
            "checkpoint-5/adapter_model.safetensors",
        ],
        b"no",
    )
    hub.commit("org/bot", files | extra | {"README.md": b"# A bot"})
    assert (await push(served, "hf://org/bot")).status_code == 201
    fetched = {asked.path.rpartition("/")[2] for asked in hub.asked if "/resolve/" in asked.path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


async def test_full_model_of_the_hub_is_dedicated(served: Served, hub: Hub, adapter: Path) -> None:
    hub.commit("org/model", files_of(write_full_model(adapter.parent / "m")) | {"consolidated.safetensors": b"twice"})
    answer = await push(served, "hf://org/model")
    assert (answer.status_code, answer.json()["kind"], answer.json()["placement"]) == (201, "full", "dedicated")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"adapter_model.safetensors": None, "adapter_model.bin": b"\x80\x04."}, "pickle_refused"),
        ({"adapter_config.json": None, "adapter_model.safetensors": None}, "not_a_checkpoint"),
        ({"bad name\n.json": b"{}"}, "path_invalid"),
        ({"adapter_model.safetensors": b"\xff" * 40}, "header_too_long"),
    ],
)
async def test_what_is_no_good_checkpoint_is_refused_with_its_problems(
    served: Served, hub: Hub, adapter: Path, change: dict[str, bytes | None], code: str
) -> None:
    files = files_of(adapter) | change
    hub.commit("org/bot", {path: content for path, content in files.items() if content is not None})
    answer = await push(served, "hf://org/bot")
    assert answer.status_code in (400, 422), answer.text
    assert code in [problem["code"] for problem in error_of(answer)["problems"]]
    assert not await is_visible(served)


# What must not be fetched


@pytest.mark.parametrize(
    "source",
    ["hf://org", "hf://org/bot/more", "hf://org/bot@", "hf://org/bot@../x", "hf://../bot", "hf://org/..", "hf:///bot"],
)
async def test_address_of_the_hub_that_is_none_is_refused_without_network(
    served: Served, hub: Hub, source: str
) -> None:
    answer = await push(served, source)
    assert answer.status_code == 400, answer.text
    assert hub.asked == []


@pytest.mark.parametrize(
    "source",
    ["http://127.0.0.1/x", "file:///etc/passwd", "s3://", "s3://b/../c", "s3://a/b::file:///etc", "hf://o\n/b", 7, ""],
)
async def test_other_address_that_is_none_is_refused(served: Served, source: object) -> None:
    answer = await push(served, source)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["code"] in ("invalid_source", "invalid_request")


async def test_prefix_that_is_not_allowed_is_refused_and_names_the_key(served: Served, hub: Hub) -> None:
    answer = await push(served, "s3://bucket/adapters/bot")
    assert (answer.status_code, error_of(answer)["code"]) == (403, "source_not_allowed")
    assert "`sources.push`" in error_of(answer)["message"]


async def test_prefixes_are_compared_part_by_part(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("acme/bot", "acme-evil/bot", "other/bot"):
        hub.commit(name, adapter)
    hub.renamed["acme/gone"] = "other/bot"
    async with serving(adapter.parent, monkeypatch, sources={"push": ["hf://acme"]}) as served:
        assert (await push(served, "hf://acme/bot")).status_code == 201
        assert (await push(served, "hf://acme-evil/bot")).status_code == 403
        renamed = await push(served, "hf://acme/gone")
        assert (renamed.status_code, error_of(renamed)["code"]) == (403, "source_not_allowed")
        assert "hf://other/bot" in error_of(renamed)["message"]


async def test_sizes_over_the_limits_are_refused_before_a_byte_is_downloaded(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/bot", adapter)
    async with serving(adapter.parent, monkeypatch, max_upload_bytes=10_000, sources={"max_bytes": 12_000}) as served:
        hub.sizes = {"adapter_model.safetensors": 10_001}
        answer = await push(served, "hf://org/bot")
        assert (answer.status_code, error_of(answer)["code"]) == (413, "source_too_large")
        assert "10001 bytes, over this server's limit of 10000" in error_of(answer)["message"]
        hub.sizes = {"adapter_model.safetensors": 9_000, "adapter_config.json": 9_000}
        answer = await push(served, "hf://org/bot")
        assert "have 18000 bytes, over this server's limit of 12000" in error_of(answer)["message"]
        hub.sizes = {"adapter_model.safetensors": 1 << 62}
        assert (await push(served, "hf://org/bot")).status_code == 413
    assert hub.count("/resolve/") == 0


async def test_source_larger_than_the_free_disk_is_refused_before_a_byte_is_downloaded(
    served: Served, hub: Hub, adapter: Path
) -> None:
    hub.commit("org/bot", adapter)
    hub.sizes = {"adapter_model.safetensors": 200 << 30}
    answer = await push(served, "hf://org/bot")
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_full")
    assert hub.count("/resolve/") == 0


# Tokens


async def test_private_repository_needs_its_token_which_goes_to_the_hub_alone(
    served: Served, hub: Hub, adapter: Path
) -> None:
    hub.commit("org/private", adapter, tokens={TOKEN})
    without = await push(served, "hf://org/private")
    assert (without.status_code, error_of(without)["code"]) == (404, "source_not_found")
    assert "or it is private: send a token" in error_of(without)["message"]
    assert (await push(served, "hf://org/private", token=TOKEN)).status_code == 201
    sent = {(asked.host.partition(":")[0], asked.authorization) for asked in hub.asked[1:]}
    assert sent == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}


async def test_token_is_in_no_log_no_error_and_nothing_that_is_stored(
    served: Served, hub: Hub, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")  # as the server sets it; what could know the token with all that it has to say
    for name in ("loradock", "huggingface_hub"):
        caplog.set_level("DEBUG", logger=name)
    hub.commit("org/private", adapter, tokens={TOKEN})
    hub.commit("org/gated", write_adapter(adapter.parent / "b"), gated=True)
    answers = [
        await push(served, "hf://org/private", token=TOKEN),
        await push(served, "hf://org/gated", token=TOKEN),
        await push(served, "hf://org/missing", token=TOKEN),
        await push(served, "hf://org/private@nothing", token=TOKEN),
        await push(served, "s3://bucket/x", token=TOKEN),
        await push(served, "hf://org/private", token=f"{TOKEN} and more"),
    ]
    assert [answer.status_code for answer in answers] == [201, 403, 404, 404, 400, 400]
    assert hub.count() > 5
    assert TOKEN not in "".join(answer.text + str(answer.headers) for answer in answers)
    assert TOKEN not in "".join(f"{record.getMessage()} {record.exc_text} {vars(record)}" for record in caplog.records)
    kept = [path for path in served.data_dir.rglob("*") if path.is_file()]
    assert any(path.name.startswith("registry.sqlite") for path in kept)
    assert [path for path in kept if TOKEN.encode() in path.read_bytes()] == []


async def test_signed_addresses_are_in_no_log(
    served: Served, hub: Hub, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hub.commit("org/bot", adapter)
    assert (await push(served, "hf://org/bot")).status_code == 201
    assert hub.count("signature=") == 1
    assert "signature=" not in caplog.text


async def test_own_token_of_the_server_is_used_only_where_the_operator_says_so(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/private", adapter, tokens={TOKEN})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    async with serving(adapter.parent, monkeypatch) as served:
        assert (await push(served, "hf://org/private")).status_code == 404
    assert {asked.authorization for asked in hub.asked} == {None}
    async with serving(adapter.parent, monkeypatch, sources={"server_token": True}) as served:
        assert (await push(served, "hf://org/private")).status_code == 201


# A network that is not what it should be


@pytest.mark.parametrize("ranges", [True, False])
async def test_download_that_breaks_off_goes_on_where_it_was(
    served: Served, hub: Hub, adapter: Path, ranges: bool
) -> None:
    hub.knows_ranges = ranges
    hub.commit("org/bot", adapter)
    hub.cut_after = {"adapter_model.safetensors": [700, 900], "adapter_config.json": [10]}
    assert (await push(served, "hf://org/bot")).status_code == 201
    asked = [asked.range for asked in hub.asked if asked.path.startswith("/lfs/")]
    assert asked[:2] == [None, "bytes=700-"]
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("longer", [0, 3, -3])
async def test_other_bytes_than_listed_are_refused_and_a_retry_completes(
    served: Served, hub: Hub, adapter: Path, name: str, longer: int
) -> None:
    hub.commit("org/bot", adapter)
    hub.wrong = {name: b"x" * ((adapter / name).stat().st_size + longer)}
    answer = await push(served, "hf://org/bot")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "source_unavailable")
    assert name in error_of(answer)["message"]
    assert list((served.data_dir / "tmp").iterdir()) == []
    assert not await is_visible(served)
    hub.wrong = {}
    assert (await push(served, "hf://org/bot")).status_code == 201


async def test_hub_that_fails_or_is_gone_is_a_503_with_retry_after(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/bot", adapter)
    async with serving(adapter.parent, monkeypatch) as served:
        for status in (500, 429, 502):
            hub.statuses = [status]
            answer = await push(served, "hf://org/bot")
            assert (answer.status_code, error_of(answer)["code"]) == (503, "source_unavailable")
            assert f"the Hub answered with status {status}" in error_of(answer)["message"]
            assert int(answer.headers["retry-after"]) > 0
    async with serving(adapter.parent, monkeypatch, sources={"hub_url": "http://127.0.0.1:9"}) as served:
        answer = await push(served, "hf://org/bot")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "source_unavailable")


async def test_sizes_that_the_listing_lacks_are_asked_for(served: Served, hub: Hub, adapter: Path) -> None:
    hub.sizes_in_listing = False
    hub.commit("org/bot", adapter)
    assert (await push(served, "hf://org/bot")).status_code == 201


# Long ones


async def test_fetch_that_takes_long_says_how_far_it_is_and_is_asked_again(
    served: Served, hub: Hub, adapter: Path
) -> None:
    hub.hold = threading.Event()
    hub.commit("org/bot", adapter)
    soon = {"prefer": "wait=0"}
    document: dict[str, Any] = {"source": "hf://org/bot"}
    first = await served.client.post(route(), json=document, headers=soon)
    assert (first.status_code, first.json()["state"], first.headers["retry-after"]) == (202, "fetching", "1")
    await until(lambda: hub.count("/lfs/") == 1, "the download")
    document["fetch"] = first.json()["fetch"]
    second = await served.client.post(route(), json=document, headers=soon)
    assert second.json()["fetch"] == first.json()["fetch"]
    assert second.json()["total_bytes"] > second.json()["done_bytes"] > 0
    hub.hold.set()
    done = await served.client.post(route(), json=document)
    assert (done.status_code, done.json()["created"]) == (201, True)
    # Whoever asks once more with the id is told the same, also though it is published by now.
    assert (await served.client.post(route(), json=document)).json() == done.json()


async def test_pushes_of_the_same_source_share_one_fetch(served: Served, hub: Hub, adapter: Path) -> None:
    hub.commit("org/bot", adapter)
    answers = await asyncio.gather(*(push(served, "hf://org/bot") for _ in range(8)))
    assert {answer.json()["version"] for answer in answers} == {1}
    assert hub.count("/api/") == 1
    assert hub.count("/lfs/") == 1


async def test_client_that_hangs_up_leaves_a_fetch_that_completes(served: Served, hub: Hub, adapter: Path) -> None:
    hub.hold = threading.Event()
    hub.commit("org/bot", adapter)
    asking = asyncio.create_task(push(served, "hf://org/bot"))
    await until(lambda: hub.count("/lfs/") == 1, "the download")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    hub.hold.set()
    answer = await push(served, "hf://org/bot")
    assert answer.json()["version"] == 1
    assert hub.count("/lfs/") == 1


async def test_more_fetches_than_may_wait_are_answered_429(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.hold = threading.Event()
    for number in range(3):
        hub.commit(f"org/bot{number}", adapter)
    async with serving(adapter.parent, monkeypatch, sources={"max_running": 1, "max_waiting": 1}) as served:
        running = [asyncio.create_task(push(served, f"hf://org/bot{n}", name=f"bot{n}")) for n in range(2)]
        await until(lambda: hub.count("/lfs/") == 1, "the first download")
        busy = await push(served, "hf://org/bot2", name="bot2")
        assert (busy.status_code, error_of(busy)["code"]) == (429, "source_busy")
        assert hub.count("bot1") == 0
        hub.hold.set()
        assert [answer.status_code for answer in await asyncio.gather(*running)] == [201, 201]


async def test_gateway_that_stops_in_the_middle_leaves_nothing_visible_and_the_next_one_completes(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.hold = threading.Event()
    hub.commit("org/bot", adapter)
    async with serving(adapter.parent, monkeypatch) as served:
        asking = asyncio.create_task(push(served, "hf://org/bot"))
        await until(lambda: hub.count("/lfs/") == 1, "the download")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert not await is_visible(served)
    hub.hold.set()
    async with serving(adapter.parent, monkeypatch) as served:
        assert not await is_visible(served)
        assert (await push(served, "hf://org/bot")).status_code == 201


async def test_file_that_is_collected_before_the_publish_is_fetched_again(
    served: Served, hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/bot", adapter)
    publish = Publisher.publish_manifest
    collected: list[str] = []

    async def late(self: Publisher, name: str, manifest: Manifest, options: Options) -> Published:
        if not collected:
            collected.extend(manifest.blobs)
            for sha256 in collected:
                (served.data_dir / "blobs" / sha256[:2] / sha256).unlink()
        return await publish(self, name, manifest, options)

    monkeypatch.setattr(Publisher, "publish_manifest", late)
    assert (await push(served, "hf://org/bot")).status_code == 201
    assert len(collected) == 2
    assert hub.count("/lfs/") == 2


async def test_files_and_a_source_together_are_refused(served: Served) -> None:
    answer = await push(served, "hf://org/bot", files=[])
    assert (answer.status_code, error_of(answer)["param"]) == (400, "source")


async def test_registry_and_its_answers_hold_the_commit(served: Served, hub: Hub, adapter: Path) -> None:
    source = f"hf://org/bot@{hub.commit('org/bot', adapter)}"
    await push(served, "hf://org/bot")
    with contextlib.closing(sqlite3.connect(served.data_dir / "registry.sqlite")) as database:
        query = "select source, publisher from versions where name = ?"
        assert database.execute(query, [own_name()]).fetchall() == [(source, "anonymous")]
    shown = (await served.client.get(f"/v1/adapters/{own_name()}")).json()
    assert (shown["source"], shown["versions"][0]["source"]) == (source, source)
    card = (await served.client.get(f"/v1/models/{own_name()}")).json()
    assert card["loradock"]["source"] == source
