"""Proofs through the gateway, on engines whose answers a test decides: at a publish, at a first load, at a first start.

`metrics: {"fake": …}` in a passport tells the fake engine what to answer with that checkpoint.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from loradock_adapters.passport import Passport, PassportBase, write_passport
from loradock_adapters.probe import Probe, ProbePrompt, ProbeToken
from loradock_adapters.registry import Registry
from loradock_serve import prover
from loradock_serve.engine import Engine
from loradock_testing.gateway import Served, serving
from loradock_testing.tiny_checkpoints import write_adapter, write_full_model
from loradock_testing.waiting import until

PROMPTS = ((3, 4, 5), (6, 7))


def give_passport(directory: Path, fake: str | None = None, *, offset: float = 0.0) -> Path:
    """A passport whose trainer saw what the fake engine will say; `fake` makes the engine say something else."""
    prompts = tuple(
        ProbePrompt(
            prompt_token_ids=ids,
            top=tuple(ProbeToken(id=20 + k, logprob=-0.4 - k) for k in range(5)),
            base_top=tuple(ProbeToken(id=ids[0] % 7 + k, logprob=-0.5 - k + offset) for k in range(5)),
        )
        for ids in PROMPTS
    )
    probe = Probe(dtype="float32", prompts=prompts)
    metrics = {"fake": fake} if fake is not None else {}
    write_passport(directory, Passport(base=PassportBase(model_id="x"), metrics=metrics, probe=probe))
    return directory


async def push(served: Served, directory: Path, name: str, **options: Any) -> httpx.Response:
    """As `Served.push`, with options of the publish."""
    from loradock_adapters.manifest import manifest_of

    manifest = manifest_of(directory)
    for entry in manifest.files:
        content = (directory / entry.path).read_bytes()
        (await served.client.put(f"/v1/adapters/blobs/{entry.sha256}", content=content)).raise_for_status()
    return await served.client.post(f"/v1/adapters/{name}/versions", json=manifest.to_json() | options)


def problem_of(answer: httpx.Response) -> Any:
    return answer.json()["error"]["problems"][0]


async def probes(served: Served) -> list[Any]:
    asked: list[Any] = (await served.seen())["probes"]
    return asked


async def test_adapter_is_proven_before_it_is_published(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    answer = await served.push(write_adapter(tmp_path / "a"), "good")
    assert (answer.status_code, answer.json()["state"], answer.json()["proof"]["state"]) == (201, "ready", "proven")
    assert answer.json()["proof"]["change"] == 0.25
    shown = (await served.client.get("/v1/adapters/good")).json()
    assert (shown["proof"]["state"], shown["proven"], shown["versions"][0]["proven"]) == ("proven",) * 3


async def test_adapter_with_a_passport_is_held_to_the_trainers_answers(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    answer = await served.push(give_passport(write_adapter(tmp_path / "a")), "good")
    assert answer.json()["state"] == "ready", answer.text
    proof = answer.json()["proof"]
    assert (proof["agreement"]["difference"], proof["tolerance"]) == (0.0, 0.005)
    assert [probe["prompts"] for probe in await probes(served)] == [[list(prompt) for prompt in PROMPTS]] * 2


@pytest.mark.parametrize(
    ("fake", "offset", "code"),
    [
        ("half", 0.0, "proof_mismatch"),
        ("base", 0.0, "changes_nothing"),
        ("nan", 0.0, "proof_not_finite"),
        (None, -2.0, "proof_other_base"),
    ],
)
async def test_adapter_that_fails_its_proof_is_refused_and_nothing_stays(
    served: Served, tmp_path: Path, fake: str | None, offset: float, code: str
) -> None:
    await served.until_ready()
    directory = give_passport(write_adapter(tmp_path / "a"), fake, offset=offset)
    answer = await served.push(directory, "bad")
    assert answer.status_code == 422, answer.text
    assert problem_of(answer)["code"] == code
    assert problem_of(answer)["fix"]
    assert (await served.client.get("/v1/adapters")).json()["data"] == []
    assert (await served.seen())["adapters"] == {}


async def test_forced_adapter_is_published_unproven_and_serves_without_another_proof(
    served: Served, tmp_path: Path
) -> None:
    await served.until_ready()
    directory = give_passport(write_adapter(tmp_path / "a"), "half")
    answer = await push(served, directory, "forced", force=True)
    assert (answer.status_code, answer.json()["state"]) == (201, "unproven")
    proof = answer.json()["proof"]
    assert (proof["forced"], proof["reason"]["code"]) == (True, "proof_mismatch")
    asked = len(await probes(served))
    assert await served.text("forced", "x") == f"{answer.json()['digest']}:x"
    assert len(await probes(served)) == asked


async def test_answers_that_are_no_numbers_are_refused_even_with_force(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    directory = give_passport(write_adapter(tmp_path / "a"), "nan")
    assert (await push(served, directory, "bad", force=True)).status_code == 422


async def test_base_is_asked_once_for_all_adapters_of_a_start(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    for seed in range(3):
        assert (await served.push(write_adapter(tmp_path / str(seed), seed), f"a{seed}")).json()["state"] == "ready"
    assert [probe.get("name") is None for probe in await probes(served)].count(True) == 1


async def test_engine_that_cannot_be_asked_publishes_unproven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE_PROBES", "404")
    async with serving(tmp_path, monkeypatch) as served:
        await served.until_ready()
        answer = await served.push(write_adapter(tmp_path / "a"), "old")
        assert (answer.status_code, answer.json()["state"]) == (201, "unproven")
        assert answer.json()["proof"]["reason"]["code"] == "proof_pending"
        for _ in range(3):
            assert await served.text("old", "x")
        assert (await served.client.get("/v1/adapters/old")).json()["proven"] == "unproven"


async def test_proof_that_gets_no_turn_in_time_leaves_the_version_unproven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prover, "TIMEOUT_S", 0.2)
    async with serving(tmp_path, monkeypatch, engine={"max_loras": 2, "max_num_seqs": 1}) as served:
        await served.until_ready()
        waiting = asyncio.create_task(served.complete("base", "!wait"))

        async def runs() -> bool:
            return bool((await served.seen())["requests"])

        await until(runs, "the only seat is taken")
        answer = await served.push(write_adapter(tmp_path / "a"), "busy")
        assert (answer.status_code, answer.json()["state"]) == (201, "unproven")
        assert await probes(served) == []
        waiting.cancel()


def late(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Engines that start only when the event is set."""
    may_start = asyncio.Event()
    live = Engine._live

    async def later(self: Engine) -> None:
        await may_start.wait()
        await live(self)

    monkeypatch.setattr(Engine, "_live", later)
    return may_start


async def test_adapter_published_without_an_engine_is_proven_at_its_first_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = late(monkeypatch)
    async with serving(tmp_path, monkeypatch) as served:
        digest = (await served.push(give_passport(write_adapter(tmp_path / "a")), "early")).json()["digest"]
        assert (await served.client.get("/v1/adapters/early")).json()["proven"] == "unproven"
        may_start.set()
        texts = await asyncio.gather(*(served.text("early", "x") for _ in range(5)))
        assert set(texts) == {f"{digest}:x"}
        assert (await served.client.get("/v1/adapters/early")).json()["proof"]["state"] == "proven"
        assert len(await probes(served)) == 2, "once the base and once the adapter, for all five requests"
        scraped = (await served.client.get("/metrics")).text
        assert 'loradock_versions_proof{state="proven"} 1.0' in scraped


async def test_adapter_whose_proof_cannot_be_kept_answers_and_is_proven_once_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_arguments: object) -> int:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("the server is away"))

    may_start = late(monkeypatch)
    monkeypatch.setattr(Registry, "set_proof", away)
    async with serving(tmp_path, monkeypatch) as served:
        digest = (await served.push(give_passport(write_adapter(tmp_path / "a")), "early")).json()["digest"]
        may_start.set()
        for _ in range(3):
            assert await served.text("early", "x") == f"{digest}:x"
        assert len(await probes(served)) == 2
        assert (await served.client.get("/v1/adapters/early")).json()["proven"] == "unproven"


async def test_adapter_that_fails_at_its_first_load_answers_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = late(monkeypatch)
    async with serving(tmp_path, monkeypatch) as served:
        directory = give_passport(write_adapter(tmp_path / "a"), "half")
        await served.push(directory, "wrong")
        may_start.set()
        for _ in range(2):  # once by the proof itself, once from the registry
            answer = await served.complete("wrong", "x")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "proof_failed")
            assert problem_of(answer)["code"] == "proof_mismatch"
        assert (await served.seen())["requests"] == []
        shown = (await served.client.get("/v1/adapters/wrong")).json()
        assert (shown["state"], shown["proof"]["reason"]["code"]) == ("failed", "proof_mismatch")
        assert 'loradock_versions_proof{state="failed"} 1.0' in (await served.client.get("/metrics")).text
        assert (await served.text("base", "x")) == "base:x"


@pytest.mark.parametrize(("fake", "code"), [("half", "proof_mismatch"), ("nan", "proof_not_finite")])
async def test_full_model_that_fails_at_its_engines_first_start_is_marked_and_its_engine_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str, code: str
) -> None:
    async with serving(tmp_path, monkeypatch) as served:
        answer = await served.push(give_passport(write_full_model(tmp_path / "full"), fake), "full")
        assert (answer.json()["placement"], answer.json()["state"]) == ("dedicated", "unproven"), answer.text
        refused = await served.complete("full", "x")
        assert (refused.status_code, problem_of(refused)["code"]) == (409, code)
        shown = (await served.client.get("/v1/adapters/full")).json()
        assert (shown["state"], shown["proven"]) == ("failed", "failed")
        digest = answer.json()["digest"]
        await until(lambda: served.gateway.fleet.dedicated_state(digest) == "stopped", "its engine leaves")


async def test_full_model_is_proven_at_its_engines_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as served:
        answer = await served.push(give_passport(write_full_model(tmp_path / "full")), "full")
        assert await served.text("full", "x") == f"{answer.json()['digest']}:x"
        proof = (await served.client.get("/v1/adapters/full")).json()["proof"]
        assert (proof["state"], proof["change"], proof["agreement"]["difference"]) == ("proven", None, 0.0)


async def test_pushing_a_failed_version_again_has_it_proven_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = late(monkeypatch)
    async with serving(tmp_path, monkeypatch) as served:
        directory = give_passport(write_adapter(tmp_path / "a"), "half")
        await served.push(directory, "wrong")
        may_start.set()
        assert (await served.complete("wrong", "x")).status_code == 409
        forced = await push(served, directory, "wrong", force=True)
        assert (forced.status_code, forced.json()["created"]) == (200, False)
        assert await served.text("wrong", "x")


def test_passport_of_these_tests_is_what_the_fake_reads(tmp_path: Path) -> None:
    directory = give_passport(write_adapter(tmp_path / "a"), "half")
    assert json.loads((directory / "loradock.json").read_text())["metrics"] == {"fake": "half"}
