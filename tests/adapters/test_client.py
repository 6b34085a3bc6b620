"""The client against a real HTTP server: what is sent, what is not, and what becomes of faults."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from loradock_adapters import sending
from loradock_adapters.client import Client
from loradock_adapters.connection import Patience
from loradock_adapters.errors import CheckpointError, InvalidNameError, NotFoundError, ServerError, UnreachableError
from loradock_adapters.manifest import FileEntry, hash_file, manifest_of, scan
from loradock_testing.adapters_server import KEY, State, adapters_server
from loradock_testing.checkpoints import write_adapter, write_full, write_json


@pytest.fixture
def server() -> Iterator[State]:
    with adapters_server() as state:
        yield state


@pytest.fixture
def client(server: State) -> Iterator[Client]:
    with Client(server.url, KEY, retry_waits_s=(0, 0)) as client:
        yield client


def test_push_sends_every_content_then_the_manifest(server: State, client: Client, tmp_path: Path) -> None:
    manifest = manifest_of(write_adapter(tmp_path))
    answer = client.push(tmp_path, "sql")
    assert (answer["name"], answer["version"], answer["created"]) == ("sql", 1, True)
    assert answer["digest"] == manifest.digest
    assert answer["sent_bytes"] == answer["size_bytes"] == manifest.size_bytes
    assert answer["seconds"] >= 0
    assert {sha256: len(raw) for sha256, raw in server.blobs.items()} == manifest.blobs
    methods = [request.split()[0] for request in server.requests]
    assert (sorted(methods[:-1]), methods[-1]) == (["HEAD", "HEAD", "PUT", "PUT"], "POST")
    assert server.published == [manifest.to_json()]


def test_push_force_is_said_in_the_publication(server: State, client: Client, tmp_path: Path) -> None:
    client.push(write_adapter(tmp_path), "sql", force=True)
    assert server.published == [manifest_of(tmp_path).to_json() | {"force": True}]


def test_push_again_sends_nothing_and_says_so(server: State, client: Client, tmp_path: Path) -> None:
    client.push(write_adapter(tmp_path), "sql")
    answer = client.push(tmp_path, "sql")
    assert (answer["version"], answer["created"], answer["sent_bytes"]) == (1, False, 0)
    assert server.count("PUT") == 2


def test_push_changed_adapter_sends_only_what_changed(server: State, client: Client, tmp_path: Path) -> None:
    client.push(write_adapter(tmp_path / "a"), "sql")
    client.push(write_adapter(tmp_path / "b", seed=9), "sql")
    assert server.count("PUT") == 3
    assert len(server.versions["sql"]) == 2


def test_push_same_content_under_two_paths_sent_once(server: State, client: Client, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text("{}")
    client.push(tmp_path, "sql")
    assert server.count("PUT") == 3


def test_push_run_directory_sends_its_checkpoint(server: State, client: Client, tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint")
    write_json(tmp_path / "run.json", {})
    assert client.push(tmp_path, "sql")["digest"] == manifest_of(tmp_path / "checkpoint").digest


def test_push_progress_covers_every_byte_of_both_phases(client: Client, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def note(phase: str, done_bytes: int, total_bytes: int) -> None:
        seen.setdefault(phase, []).append((done_bytes, total_bytes))

    size_bytes = client.push(write_adapter(tmp_path), "sql", note)["size_bytes"]
    assert list(seen) == ["hash", "send", "publish"]
    assert seen.pop("publish") == [(0, 0)]
    for steps in seen.values():
        assert steps[0] == (0, size_bytes)
        assert steps[-1] == (size_bytes, size_bytes)
        assert steps == sorted(steps)


@pytest.mark.parametrize("method", ["HEAD", "PUT", "POST"])
def test_push_broken_connection_is_tried_again(server: State, client: Client, tmp_path: Path, method: str) -> None:
    client.models()
    server.drop[method] = 2
    answer = client.push(write_adapter(tmp_path), "sql")
    assert (answer["version"], server.drop[method]) == (1, 0)


def test_push_sends_one_file_while_it_hashes_another(
    server: State, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_full(tmp_path, shards=6)
    smallest = min(scan(tmp_path).kept, key=lambda path: (tmp_path / path).stat().st_size)
    overlapped: list[bool] = []

    def slowly(directory: Path, path: str, progress: Callable[[int], None]) -> FileEntry:
        if path == smallest:  # its turn comes last
            overlapped.append(server.put_came.wait(10))
        return hash_file(directory, path, progress)

    monkeypatch.setattr(sending, "hash_file", slowly)
    assert client.push(tmp_path, "full")["version"] == 1
    assert overlapped == [True]
    assert len(server.blobs) == len(scan(tmp_path).kept) >= 8


def test_push_goes_on_where_a_broken_connection_ended(server: State, client: Client, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 3_000_000)
    client.models()
    server.drop["PUT"] = 1
    answer = client.push(tmp_path, "sql")
    assert len(server.partials) == 0
    assert answer["version"] == 1
    assert answer["sent_bytes"] < 2 * answer["size_bytes"]
    assert sorted(server.blobs) == sorted(manifest_of(tmp_path).blobs)


def test_push_after_another_was_killed_sends_only_the_rest(server: State, client: Client, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    big = tmp_path / "tokenizer.json"
    big.write_bytes(b"x" * 3_000_000)
    (entry,) = [entry for entry in manifest_of(tmp_path).files if entry.path == "tokenizer.json"]
    server.partials[entry.sha256] = b"x" * 2_500_000
    answer = client.push(tmp_path, "sql")
    assert answer["sent_bytes"] == answer["size_bytes"] - 2_500_000


def test_push_whose_every_byte_is_held_has_it_completed(server: State, client: Client, tmp_path: Path) -> None:
    for entry in manifest_of(write_adapter(tmp_path)).files:
        server.partials[entry.sha256] = (tmp_path / entry.path).read_bytes()
    answer = client.push(tmp_path, "sql")
    assert (answer["version"], answer["sent_bytes"]) == (1, 0)


def test_push_that_goes_on_from_foreign_bytes_sends_all_once_more(
    server: State, client: Client, tmp_path: Path
) -> None:
    for entry in manifest_of(write_adapter(tmp_path)).files:
        server.partials[entry.sha256] = b"!"
    assert client.push(tmp_path, "sql")["version"] == 1


@pytest.mark.parametrize("status", [408, 416, 423, 429, 502, 503, 504])
def test_push_tries_again_what_passes(server: State, client: Client, tmp_path: Path, status: int) -> None:
    server.put_answers = [(status, {"Retry-After": "1"})] * 2
    assert client.push(write_adapter(tmp_path), "sql")["version"] == 1


@pytest.mark.parametrize("status", [413, 507])
def test_push_without_room_ends_with_the_servers_words(
    server: State, client: Client, tmp_path: Path, status: int
) -> None:
    server.put_answers = [(status, {})] * 2
    with pytest.raises(ServerError, match="no: made_up") as caught:
        client.push(write_adapter(tmp_path), "sql")
    assert caught.value.status == status
    assert ("run the same command again: 0 of" in str(caught.value)) == (status == 507)


def test_push_connection_that_stays_broken_ends_with_what_is_there(
    server: State, client: Client, tmp_path: Path
) -> None:
    write_adapter(tmp_path)
    weights = next(entry for entry in manifest_of(tmp_path).files if entry.path.endswith(".safetensors"))
    config = next(entry for entry in manifest_of(tmp_path).files if entry.path.endswith(".json"))
    server.blobs[weights.sha256] = (tmp_path / weights.path).read_bytes()
    server.drop["PUT"] = 99
    server.keep_dropped = False
    total_bytes = weights.size_bytes + config.size_bytes
    with pytest.raises(UnreachableError, match=f"again: {weights.size_bytes} of {total_bytes} bytes are there"):
        client.push(tmp_path, "sql")
    assert server.count("PUT") == 3
    assert server.versions == {}


def test_push_makes_no_end_while_it_gets_on(server: State, client: Client, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 3_000_000)
    server.drop["PUT"] = 8
    client.models()
    assert client.push(tmp_path, "sql")["version"] == 1
    assert server.drop["PUT"] == 0


def test_patience_waits_as_long_as_the_answer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", waited.append)  # which returns None: nobody stopped it
    patience = Patience((0.5, 1.0), stop)
    assert patience.wait(httpx.Response(503, headers={"retry-after": "7"}))
    assert patience.wait(httpx.Response(503, headers={"retry-after": "9999"}))
    assert not patience.wait()
    patience.reached(10)
    assert patience.wait(httpx.Response(503, headers={"retry-after": "soon"}))
    assert waited[:2] == [7.0, 60.0]
    assert 0.35 <= waited[2] <= 0.5


def test_push_blobs_collected_meanwhile_are_sent_again(server: State, client: Client, tmp_path: Path) -> None:
    server.forget_blobs_once = True
    answer = client.push(write_adapter(tmp_path), "sql")
    assert answer["version"] == 1
    assert server.count("PUT") == 3
    assert answer["sent_bytes"] > answer["size_bytes"]


def test_push_refused_by_the_gate_carries_every_problem(server: State, client: Client, tmp_path: Path) -> None:
    problems = [{"code": "alora", "message": "a", "where": "b", "fix": "c"}, {"code": "rank"}, "junk"]
    server.answer = (422, {"error": {"message": "rejected", "code": "rejected", "problems": problems}})
    with pytest.raises(ServerError, match="rejected") as caught:
        client.push(write_adapter(tmp_path), "sql")
    error = caught.value
    assert (error.status, error.code, error.exit_code) == (422, "rejected", 1)
    assert [problem.code for problem in error.problems] == ["alora", "rank", "unknown"]
    assert error.problems[0].fix == "c"


def test_push_broken_checkpoint_sends_nothing(server: State, client: Client, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="too short"):
        client.push(tmp_path, "sql")
    with pytest.raises(NotFoundError):
        client.push(tmp_path / "none", "sql")
    assert server.requests == []


@pytest.mark.parametrize("name", ["base", "A", "../x", "a/b", "", "a\n"])
def test_bad_name_sends_nothing(server: State, client: Client, tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path)
    with pytest.raises(InvalidNameError):
        client.push(tmp_path, name)
    for ask in (client.show, client.rm):
        with pytest.raises(InvalidNameError):
            ask(name)
    assert server.requests == []


def test_models_show_rollback_and_rm(server: State, client: Client, tmp_path: Path) -> None:
    for seed in (1, 2):
        client.push(write_adapter(tmp_path / str(seed), seed=seed), "sql")
    assert [(model["name"], model["current_version"]) for model in client.models()] == [("sql", 2)]
    assert len(client.show("sql")["versions"]) == 2
    assert client.rollback("sql", 1)["current_version"] == 1
    client.rm("sql")
    assert client.models() == []
    with pytest.raises(ServerError, match="model_not_found") as caught:
        client.show("sql")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_wrong_key_is_refused_with_the_way_out(server: State) -> None:
    for key in (None, "wrong"):
        with Client(server.url, key) as client, pytest.raises(ServerError, match="LORADOCK_API_KEY") as caught:
            client.models()
        assert caught.value.status == 401


def test_head_error_other_than_missing_is_not_taken_for_missing(server: State, tmp_path: Path) -> None:
    with Client(server.url, "wrong") as client, pytest.raises(ServerError) as caught:
        client.push(write_adapter(tmp_path), "sql")
    assert caught.value.status == 401
    assert server.count("PUT") == 0


def test_address_with_v1_and_slash_is_the_same_server(server: State) -> None:
    for address in (f"{server.url}/", f"{server.url}/v1", f"{server.url}/v1/"):
        with Client(address, KEY) as client:
            assert client.models() == []


def test_nobody_listening_fails_at_once_and_says_what_to_start() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take the port
        address = f"http://127.0.0.1:{held.getsockname()[1]}"
        with Client(address, retry_waits_s=(99,)) as client, pytest.raises(UnreachableError, match="loradock serve"):
            client.models()


@pytest.mark.parametrize("address", ["localhost:8080", "ftp://x", "", "http://[", "http://\x00"])
def test_address_that_is_none_is_explained(address: str) -> None:
    with pytest.raises(UnreachableError), Client(address, retry_waits_s=()) as client:
        client.models()


@pytest.mark.parametrize("answer", [(200, b"<html>"), (200, [1]), (200, b"\xff")])
def test_answer_that_is_no_json_object_is_an_error(
    server: State, client: Client, tmp_path: Path, answer: tuple[int, object]
) -> None:
    server.answer = answer
    with pytest.raises(ServerError, match="Loradock server"):
        client.push(write_adapter(tmp_path), "sql")


@pytest.mark.parametrize("answer", [(500, b"<html>"), (502, {}), (503, {"error": "x"}), (507, {"error": {"code": 7}})])
def test_error_answer_of_any_shape_is_a_server_error(
    server: State, client: Client, tmp_path: Path, answer: tuple[int, object]
) -> None:
    server.answer = answer
    with pytest.raises(ServerError, match=f"answered {answer[0]}") as caught:
        client.push(write_adapter(tmp_path), "sql")
    assert (caught.value.status, caught.value.code) == (answer[0], "server_error")
