"""Promoting, rolling back, tagging, splitting and removing, by the commands that people type, over real HTTP."""

import asyncio
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradock_adapters.cli import run
from loradock_serve import metrics
from loradock_serve.engine import Engine
from loradock_testing.gateway import Served, serving
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def command(shared: Served, *words: str) -> int:
    """A command line against this gateway; its status."""
    return await asyncio.to_thread(run, [*words, "--server", shared.url])


async def push(shared: Served, tmp_path: Path, name: str, count: int) -> list[str]:
    """Versions 1 to `count` of a name, of bytes that no other name has; their digests."""
    first = zlib.crc32(name.encode())
    answers = [await shared.push(write_adapter(tmp_path / str(n), seed=first + n), name) for n in range(count)]
    assert [answer.status_code for answer in answers] == [201] * count
    return [answer.json()["digest"] for answer in answers]


def version_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-loradock-version"]


async def ask(shared: Served, model: str, **fields: Any) -> int:
    """The version that answered, as its header says; the engine must have seen the same."""
    answer = await shared.complete(model, "x", **fields)
    digest = answer.json()["choices"][0]["text"].removesuffix(":x")
    shown = (await shared.client.get(f"/v1/adapters/{model.partition('@')[0]}")).json()
    number = int(version_of(answer))
    assert next(v["digest"] for v in shown["versions"] if v["version"] == number) == digest
    return number


async def test_promote_takes_a_number_a_tag_or_a_digest(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = await push(shared, tmp_path, "promoted", 3)
    assert await command(shared, "tag", "promoted@2", "stable") == 0
    for pin, number in (("1", 1), ("stable", 2), (digests[2], 3)):
        capsys.readouterr()
        assert await command(shared, "promote", "promoted", pin) == 0
        said = capsys.readouterr()
        assert said.out == f"promoted@{number}  {digests[number - 1]}\n"
        assert await ask(shared, "promoted") == number
    assert "pointed at version 2 before" in said.err
    assert await command(shared, "promote", "promoted", "9") == 1
    assert "there is no version 9 of promoted" in capsys.readouterr().err
    assert await command(shared, "promote", "promoted", "nope") == 1
    assert "promoted has no version with the tag 'nope'" in capsys.readouterr().err


async def test_rollback_without_a_version_goes_one_back_until_there_is_none(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await push(shared, tmp_path, "back", 3)
    assert await command(shared, "rm", "back@2") == 0
    assert await command(shared, "rollback", "back") == 0
    assert await ask(shared, "back") == 1
    capsys.readouterr()
    assert await command(shared, "rollback", "back") == 1
    assert "back@1 is the oldest version of back that is left" in capsys.readouterr().err


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
async def test_rollback_to_a_number_that_no_database_holds_is_a_wrong_request(shared: Served, number: int) -> None:
    answer = await shared.client.post("/v1/adapters/any/rollback", json={"version": number})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "version")


async def test_tag_answers_until_it_is_moved_or_taken_off(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await push(shared, tmp_path, "tagged", 3)
    assert await command(shared, "tag", "tagged@2", "prod") == 0
    assert await ask(shared, "tagged@prod") == 2
    assert (await shared.complete("tagged@prod", "x")).json()["model"] == "tagged@prod"
    capsys.readouterr()
    assert await command(shared, "tag", "tagged", "prod") == 0
    assert "tagged@prod was version 2 before" in capsys.readouterr().err
    assert await ask(shared, "tagged@prod") == 3
    assert await command(shared, "untag", "tagged", "prod") == 0
    answer = await shared.complete("tagged@prod", "x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    capsys.readouterr()
    assert await command(shared, "untag", "tagged", "prod") == 0
    assert "tagged has no tag prod" in capsys.readouterr().err


@pytest.mark.parametrize("tag", ["7", "sha256:" + "a" * 64, "Prod"])
async def test_tag_that_could_be_taken_for_a_version_refused(shared: Served, tmp_path: Path, tag: str) -> None:
    await push(shared, tmp_path, "plain", 1) if (await shared.client.get("/v1/adapters/plain")).is_error else None
    answer = await shared.client.put(f"/v1/adapters/plain/tags/{tag}", json={"version": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_name")


async def test_base_is_a_name_that_nobody_can_have(shared: Served, tmp_path: Path) -> None:
    for answer in (
        await shared.push(write_adapter(tmp_path), "base"),
        await shared.client.put("/v1/adapters/base/tags/prod", json={"version": 1}),
        await shared.client.post("/v1/adapters/base/promote", json={"version": 1}),
        await shared.client.put("/v1/adapters/base/split", json={"split": {"1": 1, "2": 1}}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_name")


async def test_current_version_cannot_be_removed_alone_and_others_can(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = await push(shared, tmp_path, "shrinking", 3)
    answer = await shared.client.delete("/v1/adapters/shrinking/versions/3")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_in_use")
    assert "`loradock promote shrinking VERSION`" in answer.json()["error"]["message"]
    assert await command(shared, "rm", f"shrinking@{digests[1]}") == 0
    assert "removed shrinking@2" in capsys.readouterr().err
    assert (await shared.complete("shrinking@2", "x")).status_code == 404
    assert await ask(shared, "shrinking@1") == 1

    async def is_unloaded() -> bool:
        return digests[1] not in (await shared.seen())["adapters"]

    await until(is_unloaded, "the engine letting go")
    assert digests[0] in (await shared.seen())["adapters"]


async def test_push_of_an_older_versions_bytes_says_so_and_moves_nothing(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await push(shared, tmp_path, "again", 2)
    assert await command(shared, "push", str(tmp_path / "0"), "again") == 0
    said = capsys.readouterr()
    assert said.out.startswith("again@1  ")
    assert "the same bytes are version 1 already, and again points at version 2" in said.err
    assert "loradock promote again 1" in said.err
    assert await ask(shared, "again") == 2


# Splits


async def test_split_shares_unpinned_traffic_and_each_user_keeps_a_version(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await push(shared, tmp_path, "canary", 4)
    assert await command(shared, "split", "canary", "3=75", "4=25") == 0
    assert capsys.readouterr().out == "canary  3 75%  4 25%\n"
    users = [f"user-{number}" for number in range(120)]
    first = [version_of(await shared.complete("canary", "x", user=user)) for user in users]
    assert [version_of(await shared.complete("canary", "x", user=user)) for user in users] == first
    assert set(first) == {"3", "4"}
    assert 10 <= first.count("4") <= 55
    assert await ask(shared, "canary@1", user="user-1") == 1
    assert {await ask(shared, "canary") for _ in range(40)} == {3, 4}, "nobody in particular gets any, each time anew"
    assert await command(shared, "split", "canary", "--off") == 0
    assert {await ask(shared, "canary", user=user) for user in users[:10]} == {4}


async def test_split_is_shown_listed_and_ended_by_a_move_that_says_so(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await push(shared, tmp_path, "seen", 2)
    await command(shared, "split", "seen", "1=90", "2=10")
    await command(shared, "tag", "seen@1", "prod")
    capsys.readouterr()
    await command(shared, "show", "seen")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line and line[0] == "VERSION")
    assert lines[start][:4] == ["VERSION", "TRAFFIC", "TAGS", "PLACEMENT"]
    assert (lines[start + 1][:3], lines[start + 2][:3]) == (["2*", "10%", "shared"], ["1", "90%", "prod"])
    await command(shared, "ls")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seen", "1", "90%", "2", "10%", "prod=1"] in [row[:6] for row in rows]
    entry = next(e for e in (await shared.client.get("/v1/adapters")).json()["data"] if e["name"] == "seen")
    assert (entry["split"], entry["tags"], entry["current_version"]) == ({"1": 90, "2": 10}, {"prod": 1}, 2)
    assert await command(shared, "promote", "seen", "2") == 0
    assert "its split has ended: 1 90%  2 10%" in capsys.readouterr().err
    assert (await shared.client.get("/v1/adapters/seen")).json()["split"] is None


async def test_push_beside_a_split_is_published_and_gets_no_traffic(
    shared: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await push(shared, tmp_path, "beside", 2)
    await command(shared, "split", "beside", "1=50", "2=50")
    assert await command(shared, "push", str(write_adapter(tmp_path / "new", seed=9)), "beside") == 0
    assert "the traffic of beside is split, and version 3 has no share in it" in capsys.readouterr().err
    assert {await ask(shared, "beside") for _ in range(20)} == {1, 2}
    assert await ask(shared, "beside@3") == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Say how to split"),
        ({"split": {"1": "90", "2": 10}}, "Say how to split"),
        ({"split": {"1": True, "2": 10}}, "Say how to split"),
        ({"split": {"prod": 1, "2": 10}}, "names versions by their numbers"),
        ({"split": {"1": 100}}, "between 2 and 16 versions"),
        ({"split": {"1": 0, "2": 100}}, "version 1 has the weight 0"),
    ],
)
async def test_split_that_is_none_refused(shared: Served, tmp_path: Path, body: Any, message: str) -> None:
    if (await shared.client.get("/v1/adapters/unsplit")).is_error:
        await push(shared, tmp_path, "unsplit", 2)
    answer = await shared.client.put("/v1/adapters/unsplit/split", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert (await shared.client.get("/v1/adapters/unsplit")).json()["split"] is None


@pytest.mark.parametrize("words", [["3"], ["3=x", "4=1"], ["3=1", "3=2"], [], ["3=1", "4=1", "--off"]])
async def test_split_that_is_typed_wrong_is_wrong_usage_and_asks_no_server(words: list[str]) -> None:
    assert await asyncio.to_thread(run, ["split", "sql", *words, "--server", "http://127.0.0.1:1"]) == 2


async def test_version_with_a_share_cannot_be_removed(shared: Served, tmp_path: Path) -> None:
    await push(shared, tmp_path, "shared-out", 3)
    await command(shared, "split", "shared-out", "1=50", "2=50")
    answer = await shared.client.delete("/v1/adapters/shared-out/versions/1")
    assert answer.status_code == 409
    assert "loradock split shared-out --off" in answer.json()["error"]["message"]


async def test_api_key_keeps_its_version_where_no_user_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, monkeypatch, admin_key="secret") as served:
        await push(served, tmp_path, "keyed", 2)
        await served.client.put("/v1/adapters/keyed/split", json={"split": {"1": 50, "2": 50}})
        assert len({version_of(await served.complete("keyed", "x")) for _ in range(12)}) == 1
        others = {version_of(await served.complete("keyed", "x", user=f"u{n}")) for n in range(12)}
        assert others == {"1", "2"}


# The header, metrics, and moves under load


async def test_every_answer_names_its_version_streams_and_errors_too(shared: Served, tmp_path: Path) -> None:
    await push(shared, tmp_path, "named", 2)
    for model, number in (("named", "2"), ("named@1", "1")):
        for fields in ({}, {"stream": True}, {"prompt": "!400"}, {"stream": "neither"}, {"priority": "none"}):
            body = {"model": model, "prompt": "x", **fields}
            answer = await shared.client.post("/v1/completions", json=body)
            assert answer.headers.get("x-loradock-version") == number, (fields, answer.text)
    assert "x-loradock-version" not in (await shared.complete("base", "x")).headers


async def test_versions_are_counted_by_how_they_ended_and_old_series_make_room(
    shared: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(shared, tmp_path, "counted", 2)
    for model in ("counted", "counted", "counted@1"):
        await shared.complete(model, "x")
    await shared.complete("counted", "x", priority="none")
    lines = (await shared.client.get("/metrics")).text.splitlines()
    for line in (
        'loradock_version_requests_total{model="counted",outcome="ok",version="2"} 2.0',
        'loradock_version_requests_total{model="counted",outcome="ok",version="1"} 1.0',
        'loradock_version_requests_total{model="counted",outcome="refused",version="2"} 1.0',
    ):
        assert line in lines
    assert any(line.startswith('loradock_version_seconds_total{model="counted",version="2"}') for line in lines)
    monkeypatch.setattr(metrics, "MAX_VERSION_LABELS", 2)
    metrics._versions.clear()
    metrics.VERSION_REQUESTS.clear()
    metrics.VERSION_SECONDS.clear()
    await push(shared, tmp_path, "counted-too", 2)
    for model in ("counted@1", "counted@2", "counted@1", "counted-too"):
        await shared.complete(model, "x")
    kept = [
        line for line in (await shared.client.get("/metrics")).text.splitlines() if "version_requests_total{" in line
    ]
    assert [line.partition("} ")[0] for line in kept] == [
        'loradock_version_requests_total{model="counted",outcome="ok",version="1"',
        'loradock_version_requests_total{model="counted-too",outcome="ok",version="2"',
    ]


async def test_moves_under_load_fail_no_request_and_mix_no_answer(shared: Served, tmp_path: Path) -> None:
    """Promote, rollback, split, tag, push and removal, again and again, while clients ask for the name and the tag."""
    assert isinstance(shared.gateway.fleet.base, Engine)
    digests = dict(enumerate(await push(shared, tmp_path, "busy", 4), 1))
    await shared.client.put("/v1/adapters/busy/tags/prod", json={"version": 1})
    answers: Counter[tuple[str, str]] = Counter()
    said: list[tuple[int, str, list[str]]] = []
    done = asyncio.Event()

    async def client(number: int) -> None:
        while not done.is_set():
            for model in ("busy", "busy@prod"):
                stream = number % 2 == 0
                answer = await shared.complete(model, "x y z", stream=stream, user=f"u{number}")
                version = answer.headers.get("x-loradock-version", "")
                words = words_of(answer.text) if stream else answer.json()["choices"][0]["text"].split()
                said.append((answer.status_code, version, words))
                answers[model, version] += 1

    async def more_answers(count: int) -> None:
        wanted = answers.total() + count
        await until(lambda: answers.total() >= wanted, "traffic")

    clients = [asyncio.create_task(client(number)) for number in range(4)]
    base = "/v1/adapters/busy"
    for turn in range(2):
        extra = await shared.push(write_adapter(tmp_path / f"extra{turn}", seed=100 + turn), "busy")
        digests[extra.json()["version"]] = extra.json()["digest"]
        moves: list[tuple[str, str, dict[str, Any] | None]] = [
            ("PUT", "split", {"split": {"3": 90, "4": 10}}),
            ("PUT", "tags/prod", {"version": 2}),
            ("PUT", "split", {"split": {"1": 50, "4": 50}}),
            ("POST", "promote", {"version": 3}),
            ("PUT", "tags/prod", {"version": 1}),
            ("POST", "rollback", None),
            ("POST", "promote", {"version": 4}),
            ("DELETE", f"versions/{extra.json()['version']}", None),
        ]
        for method, path, body in moves:
            move = await shared.client.request(method, f"{base}/{path}", json=body)
            assert move.status_code == 200, move.text
            if turn:  # at first as fast as can be, and then so that every state has its traffic
                await more_answers(8)
        await more_answers(24)
    done.set()
    await asyncio.gather(*clients)
    whole = {(200, str(number), *(f"{digest}:{word}" for word in "xyz")) for number, digest in digests.items()}
    assert {(status, version, *words) for status, version, words in said} - whole == set()
    assert {model for model, _ in answers} == {"busy", "busy@prod"}
    assert len({version for model, version in answers if model == "busy"}) > 1


def words_of(stream: str) -> list[str]:
    """The words of a streamed completion."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"]).split()
