"""The reference of the churn test is itself right: it agrees with PEFT, and contradicts another adapter's answers."""

from pathlib import Path

import pytest

from loradock_testing.churn_models import SHAPES, write_adapters
from loradock_testing.churn_truth import Truth, Verdict
from loradock_testing.tiny_models import Answer, make_llama, reference

PROMPTS = [list(range(20 + i, 60 + i + 9 * (i % 2))) for i in range(12)]
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("truth") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), base, range(len(SHAPES)))


@pytest.fixture(scope="module")
def answers(base: Path, adapters: list[Path]) -> dict[Path | None, list[Answer]]:
    """What PEFT answers, step by step."""
    return {path: reference(base, path, PROMPTS, MAX_TOKENS, ignore_eos=True) for path in (None, *adapters)}


def test_truth_of_every_shape_agrees_with_peft(base: Path, answers: dict[Path | None, list[Answer]]) -> None:
    truth = Truth(base)
    for path, given in answers.items():
        verdicts = truth.judge(path, PROMPTS, [answer.tokens for answer in given])
        assert not any(verdict.is_wrong for verdict in verdicts), path
        changed = [((answer.tokens[0] + 1) % 512, *answer.tokens[1:]) for answer in given]
        for answer, verdict in zip(given, truth.judge(path, PROMPTS, changed), strict=True):
            assert (verdict.differs_at, verdict.expected) == (0, answer.tokens[0])
            assert verdict.gap == pytest.approx(answer.gaps[0], abs=1e-4)


def test_truth_contradicts_answers_of_other_adapters(base: Path, answers: dict[Path | None, list[Answer]]) -> None:
    truth = Truth(base)
    models = list(answers)
    verdicts = [
        verdict
        for model, other in zip(models, [*models[1:], models[0]], strict=True)
        for verdict in truth.judge(model, PROMPTS, [answer.tokens for answer in answers[other]])
    ]
    assert len(verdicts) == len(models) * len(PROMPTS)
    assert sum(verdict.is_wrong for verdict in verdicts) >= 0.95 * len(verdicts)


def test_difference_is_wrong_only_beyond_a_near_tie() -> None:
    assert Verdict(2, 5, 2e-3).is_wrong
    assert not Verdict(2, 5, 5e-4).is_wrong
    assert Verdict(2, 5, 5e-4).is_near_tie
    assert not Verdict(None, None, 0.0).is_near_tie


def test_answers_of_every_two_adapters_differ(answers: dict[Path | None, list[Answer]]) -> None:
    alike = total = 0
    for one in answers:
        for other in answers:
            if str(one) < str(other):
                total += len(PROMPTS)
                alike += sum(a.tokens == b.tokens for a, b in zip(answers[one], answers[other], strict=True))
    assert alike <= 0.1 * total
