"""The client against a real HTTP server: what is sent, what is not, and what becomes of faults."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradock_adapters.client import Client
from loradock_adapters.errors import CheckpointError, InvalidNameError, NotFoundError, ServerError, UnreachableError
from loradock_adapters.manifest import manifest_of
from loradock_testing.adapters_server import KEY, State, adapters_server
from loradock_testing.checkpoints import write_adapter, write_json


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
    assert [request.split()[0] for request in server.requests] == ["HEAD", "HEAD", "PUT", "PUT", "POST"]


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
    assert list(seen) == ["hash", "send"]
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


def test_push_connection_that_stays_broken_ends_with_an_error(server: State, client: Client, tmp_path: Path) -> None:
    server.drop["PUT"] = 99
    with pytest.raises(UnreachableError, match=r"loradock serve"):
        client.push(write_adapter(tmp_path), "sql")
    assert server.count("PUT") == 3
    assert server.versions == {}


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
