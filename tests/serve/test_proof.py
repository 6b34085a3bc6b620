"""What answers to probe prompts prove: tolerances, where the worst difference is, and what each refusal says."""

import pytest

from loradock_adapters.probe import Probe, ProbePrompt, ProbeToken, fixed_prompts
from loradock_adapters.problems import Problem
from loradock_serve import proof
from loradock_serve.proof import STATES, Proof, change, coarsest, compare, gap, is_proven, not_finite, proof_state

BASE = [[(1, -0.5), (2, -1.5), (3, -2.5)], [(7, -0.1), (8, -3.0)]]
"""What the base answers to two prompts."""
TRAINED = [[(4, -0.2), (1, -2.0)], [(9, -0.3), (7, -1.9)]]


def tokens(pairs: list[tuple[int, float]]) -> tuple[ProbeToken, ...]:
    return tuple(ProbeToken(id=token, logprob=value) for token, value in pairs)


def probe(dtype: str = "float32", *, with_base: bool = True) -> Probe:
    prompts = tuple(
        ProbePrompt(prompt_token_ids=ids, top=tokens(top), base_top=tokens(base) if with_base else ())
        for ids, top, base in zip(((5, 6, 7), (8, 9)), TRAINED, BASE, strict=True)
    )
    return Probe(dtype=dtype, prompts=prompts)


def moved(answers: list[list[tuple[int, float]]], by: float) -> list[list[tuple[int, float | None]]]:
    return [[(token, value + by) for token, value in answer] for answer in answers]


def test_same_answers_agree_and_differ_by_nothing() -> None:
    found = compare(probe(), TRAINED, BASE, "float32")
    assert found.problem is None
    assert found.worst.size == 0.0
    assert change(BASE, BASE) == 0.0


def test_difference_from_the_trainer_is_refused_with_both_numbers_and_its_place() -> None:
    answers = [TRAINED[0], [(9, -0.3), (7, -1.4)]]
    found = compare(probe(), answers, BASE, "float32")
    assert found.problem is not None
    assert found.problem.code == "proof_mismatch"
    assert found.problem.where == "loradock.json: probe.prompts.1"
    assert "prompt 2 (position 2), token 7 has a log-probability of -1.9000" in found.problem.message
    assert "-1.4000 here" in found.problem.message
    assert "0.5000 apart, and at most 0.0050 is rounding (float32)" in found.problem.message


def test_token_that_the_engine_does_not_name_counts_as_at_most_its_last() -> None:
    worst = gap([[(4, -0.2)]], [[(1, -0.5), (2, -3.0)]], [2])
    assert worst.size == pytest.approx(2.8)
    assert worst.beyond
    assert gap([[(4, -9.0)]], [[(1, -0.5), (2, -3.0)]], [2]).size == 0.0
    assert "at most -3.0000" in worst.told("here", "there")


def test_tolerance_follows_how_far_the_two_bases_are_apart_within_its_limits() -> None:
    assert compare(probe(), TRAINED, BASE, "float32").tolerance == 0.005
    assert compare(probe(), TRAINED, moved(BASE, 0.01), "float32").tolerance == pytest.approx(0.03)
    assert compare(probe(), TRAINED, moved(BASE, 0.045), "float32").tolerance == 0.05
    assert compare(probe("bfloat16"), TRAINED, BASE, "float32").tolerance == 0.25
    assert compare(probe(with_base=False), TRAINED, BASE, "bfloat16").tolerance == 0.5


def test_base_that_answers_otherwise_is_named_as_another_base() -> None:
    found = compare(probe(), TRAINED, moved(BASE, -1.0), "float32")
    assert found.problem is not None
    assert found.problem.code == "proof_other_base"
    assert "-0.5000 by the trained one and -1.5000 by this base" in found.problem.message


def test_coarsest_type_of_both_sides_counts_and_an_unknown_one_is_bf16() -> None:
    assert coarsest("float32", "float16") == "float16"
    assert coarsest("float32", None) == "float32"
    assert coarsest("float32", "float8_e4m3fn") == "bfloat16"
    assert coarsest("bfloat16", "quantised") == "quantised"


def test_change_sees_a_token_that_only_one_of_two_answers_names() -> None:
    assert change([[(1, -0.5), (2, -1.0)]], [[(1, -0.5), (3, -0.8)]]) == pytest.approx(0.2)


@pytest.mark.parametrize("answers", [[[(1, None)]], [[]]])
def test_answer_that_is_no_number_or_nothing_is_refused(answers: list[list[tuple[int, float | None]]]) -> None:
    problem = not_finite(answers)
    assert problem is not None
    assert (problem.code, problem.where) == ("proof_not_finite", "probe prompt 1")
    assert not_finite(BASE) is None


def test_state_survives_the_registry_and_strange_rows_are_unproven() -> None:
    failed = proof.failed(Problem("proof_mismatch", "no", "x", "do"), 0.25)
    assert Proof.from_json(failed.to_json()) == Proof("failed", Problem("proof_mismatch", "no", "x", "do"))
    kept = proof.forced(failed)
    assert (kept.state, kept.is_open) == ("unproven", False)
    assert Proof.from_json(kept.to_json()) == Proof("unproven", failed.reason, forced=True)
    assert proof_state({"state": "of a newer server"}) == proof_state(None) == "unproven"
    assert Proof.from_json(None) is None


def test_fixed_prompts_are_the_same_each_time_and_within_the_vocabulary() -> None:
    prompts = fixed_prompts(64)
    assert prompts == fixed_prompts(64)
    assert {len(prompt) for prompt in prompts} == {12}
    assert all(0 <= token < 64 for prompt in prompts for token in prompt)
    assert len({token for prompt in fixed_prompts(32_000) for token in prompt}) > 40
    assert {token for prompt in fixed_prompts(64, [3, 5]) for token in prompt} == {3, 5}


@pytest.mark.parametrize("state", [*STATES, "later", None])
def test_proven_by_the_short_look_is_proven_by_the_long_one(state: str | None) -> None:
    document = {"state": state} if state is not None else None
    found = Proof.from_json(document)
    assert is_proven(document) is (found is not None and found.state == "proven")
