"""A real engine's answers to probe prompts: they are transformers', good adapters pass, and spoilt ones do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loradock_adapters.problems import Problem
from loradock_serve.proof import TOLERANCES, Answer, change, compare, gap, not_finite
from loradock_testing.isolation import World
from loradock_testing.proof_figures import SPOILT, Figured, good_adapters, prompts_of, spoilt
from loradock_testing.tiny_models import make_llama
from loradock_testing.vllm_server import VllmServer

pytestmark = pytest.mark.engine

GOOD = 100
SPOILT_OF_EACH = 10


@pytest.fixture(scope="module")
def good(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Figured]:
    return list(good_adapters(tmp_path_factory.mktemp("good"), world.base_dir, GOOD))


@pytest.fixture(scope="module")
def base(engine: VllmServer, world: World) -> list[Answer]:
    return ask(engine, prompts_of(world.base_dir))


def ask(engine: VllmServer, prompts: list[list[int]], name: str | None = None) -> list[Answer]:
    answer = engine.request("POST", "/loradock/probe", json={"name": name, "prompts": prompts})
    assert answer.status_code == 200, answer.text
    return [[(token, value) for token, value in ranked] for ranked in answer.json()["answers"]]


def with_adapter(engine: VllmServer, directory: Path, prompts: list[list[int]]) -> list[Answer]:
    name = f"probe-{directory.name}"
    loaded = engine.request("POST", "/loradock/adapters/load", json={"name": name, "path": str(directory)})
    assert loaded.status_code == 200, loaded.text
    try:
        return ask(engine, prompts, name)
    finally:
        engine.request("POST", "/loradock/adapters/unload", json={"name": name})


def refusal(engine: VllmServer, figured: Figured, base: list[Answer]) -> Problem | str | None:
    """Why the adapter would be refused; None where it would not."""
    answers = with_adapter(engine, figured.directory, [list(p.prompt_token_ids) for p in figured.probe.prompts])
    if change(base, answers) <= TOLERANCES["float32"].noise:
        return "changes_nothing"
    return not_finite(answers) or compare(figured.probe, answers, base, "float32").problem


def test_base_answers_probe_prompts_as_transformers_does(
    engine: VllmServer, good: list[Figured], base: list[Answer]
) -> None:
    prompts = good[0].probe.prompts
    expected = [[(token.id, token.logprob) for token in prompt.base_top] for prompt in prompts]
    worst = gap(expected, base, [len(prompt.prompt_token_ids) for prompt in prompts])
    assert worst.size < 1e-4
    assert {len(answer) for answer in base} == {20}
    assert base == ask(engine, prompts_of_probe(good[0])), "the same question, the same answer"


def prompts_of_probe(figured: Figured) -> list[list[int]]:
    return [list(prompt.prompt_token_ids) for prompt in figured.probe.prompts]


def test_none_of_a_hundred_good_adapters_is_refused(
    engine: VllmServer, good: list[Figured], base: list[Answer]
) -> None:
    refused = {figured.directory.name: found for figured in good if (found := refusal(engine, figured, base))}
    assert (len(good), refused) == (GOOD, {})


@pytest.mark.parametrize("kind", SPOILT)
def test_every_spoilt_adapter_is_refused(
    engine: VllmServer, good: list[Figured], base: list[Answer], tmp_path: Path, kind: str
) -> None:
    code = "changes_nothing" if kind == "unapplied" else "proof_mismatch"
    for figured in good[:SPOILT_OF_EACH]:
        copy = spoilt(figured, SPOILT[kind], tmp_path / figured.directory.name)
        found = refusal(engine, copy, base)
        assert (found.code if isinstance(found, Problem) else found) == code, figured.directory.name


@pytest.fixture(scope="module")
def of_another_base(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Figured]:
    root = tmp_path_factory.mktemp("other")
    return list(good_adapters(root / "adapters", world.base_dir, 5, trained_on=make_llama(root / "base", seed=77)))


def test_adapter_trained_on_another_base_of_the_same_shape_is_refused(
    engine: VllmServer, of_another_base: list[Figured], base: list[Answer]
) -> None:
    for figured in of_another_base:
        found = refusal(engine, figured, base)
        assert isinstance(found, Problem)
        assert found.code == "proof_other_base"


def test_answer_that_is_no_number_is_told_as_none(engine: VllmServer, good: list[Figured], tmp_path: Path) -> None:
    def overflow(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in load_file(path).items()}
        save_file(tensors, path)

    copy = spoilt(good[0], overflow, tmp_path / "overflow")
    answers = with_adapter(engine, copy.directory, prompts_of_probe(copy))
    assert not_finite(answers) is not None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompts": [[1] * 300]}, 400),
        ({"prompts": [[10**6]]}, 400),
        ({"prompts": [[1]], "name": "absent"}, 404),
    ],
)
def test_prompt_or_adapter_that_is_none_is_refused(engine: VllmServer, body: dict[str, Any], status: int) -> None:
    answer = engine.request("POST", "/loradock/probe", json=body)
    assert answer.status_code == status, answer.text
    assert engine.request("GET", "/health").status_code == 200
