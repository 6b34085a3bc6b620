"""What an engine's answers to probe prompts prove about a version: that it changes something, and the right thing.

Three lists of log-probabilities are compared, all of them for the token that comes next: the trainer's (from the
passport, where there is one), the engine's with the version, and the engine's own base's. Pure. Does not know how the
answers were got (prover.py), nor what becomes of a version that fails.

How much of a difference is rounding depends on the types in which both sides calculated, and is measured where it can
be: the passport also says what the trainer's base answered, and how far the engine's base is from that is how far two
right answers are apart on these two machines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Self

from loradock_adapters.probe import Probe, ProbeToken
from loradock_adapters.problems import Problem

State = Literal["proven", "unproven", "failed"]
STATES: tuple[State, ...] = ("proven", "unproven", "failed")
Answer = Sequence[tuple[int, float | None]]
"""The likeliest next tokens and their log-probabilities, the likeliest first; None is what is no number."""


@dataclass(frozen=True)
class Tolerance:
    """Differences of log-probabilities, in nats, that are rounding. Measured: docs/decisions.md."""

    least: float
    """Never less than this is allowed."""
    most: float
    """Never more, however far the two bases are apart; and what is allowed where the passport says nothing of its
    base."""
    noise: float
    """Two answers that are no further apart may be one answer twice: measure again."""


TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(0.005, 0.05, 1e-4),
    "float16": Tolerance(0.05, 0.2, 0.02),
    "bfloat16": Tolerance(0.25, 0.5, 0.1),
    "quantised": Tolerance(0.3, 1.5, 0.1),
}
"""By the coarsest type on either side, the finest first."""
_ROUNDING_SPREADS = 3.0
"""The adapter's answers may be so many times further apart than the bases'."""


@dataclass(frozen=True)
class Gap:
    """The largest difference between two answers to the same prompts."""

    size: float
    prompt: int = 0
    """Counted from 1; the position is always that after the prompt's last token."""
    position: int = 0
    token: int = 0
    expected: float = 0.0
    found: float = 0.0
    beyond: bool = False
    """The token is not among the likeliest that the engine names: `found` is a bound from above."""

    def told(self, ours: str, theirs: str) -> str:
        """In words, with both numbers."""
        most = "at most " if self.beyond else ""
        return (
            f"after prompt {self.prompt} (position {self.position}), token {self.token} has a log-probability of "
            f"{self.expected:.4f} {theirs} and {most}{self.found:.4f} {ours}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "difference": round(self.size, 6),
            "prompt": self.prompt,
            "position": self.position,
            "token": self.token,
            "expected": round(self.expected, 6),
            "found": round(self.found, 6),
        }


@dataclass(frozen=True)
class Proof:
    """What is known of a version by an engine's answers; kept in the registry."""

    state: State
    reason: Problem | None = None
    """Why it failed, or is not proven."""
    forced: bool = False
    """Published although it failed, because the publisher said so: it is not tried again."""
    change: float | None = None
    """The largest difference from the base's answers, in nats; None where nobody compared."""
    agreement: Gap | None = None
    """The largest difference from the trainer's answers; None where there are none."""
    tolerance: float | None = None
    at: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be shown."""
        return self.state == "unproven" and not self.forced

    def to_json(self) -> dict[str, Any]:
        """As the registry keeps it, and as answers show it."""
        return {
            "state": self.state,
            "reason": self.reason.to_json() if self.reason is not None else None,
            "forced": self.forced,
            "change": self.change,
            "agreement": self.agreement.to_json() if self.agreement is not None else None,
            "tolerance": self.tolerance,
            "at": self.at,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | None) -> Self | None:
        """Its state and reason; None where nobody has ever asked for one (a version of an older server)."""
        if document is None:
            return None
        state = document.get("state")
        reason = document.get("reason")
        return cls(
            state if state in ("proven", "failed") else "unproven",
            Problem.from_json(reason) if reason is not None else None,
            forced=document.get("forced") is True,
        )


def is_proven(document: Mapping[str, Any] | None) -> bool:
    """As `Proof.from_json(document).state`, and cheaper: it is asked with every request."""
    return document is not None and document.get("state") == "proven"


def proof_state(document: Mapping[str, Any] | None) -> State:
    """The state in a registry's row; what nobody ever asked about is unproven."""
    proof = Proof.from_json(document)
    return proof.state if proof is not None else "unproven"


def unproven(why: str = "") -> Proof:
    """Not shown yet; it will be when an engine first has it."""
    return Proof("unproven", Problem("proof_pending", why) if why else None)


def forced(proof: Proof) -> Proof:
    """As its publisher wants it: not proven, but served."""
    return replace(proof, state="unproven", forced=True)


def coarsest(*types: str | None) -> str:
    """The type among these that rounds most; what is not known rounds as bfloat16 does."""
    order = list(TOLERANCES)
    return max((kind if kind in order else "bfloat16" for kind in types if kind is not None), key=order.index)


def gap(expected: Sequence[Sequence[tuple[int, float]]], answers: Sequence[Answer], lengths: Sequence[int]) -> Gap:
    """The largest difference of the expected tokens' log-probabilities; `lengths` of the prompts, to say where."""
    worst = Gap(-1.0)
    for number, (tokens, answer) in enumerate(zip(expected, answers, strict=True)):
        known = {token: value for token, value in answer if value is not None}
        floor = min(known.values(), default=0.0)
        for token, value in tokens:
            found = known.get(token, floor)
            size = abs(found - value) if token in known else max(0.0, value - floor)
            if size > worst.size:
                worst = Gap(size, number + 1, lengths[number], token, value, found, token not in known)
    return worst


def change(base: Sequence[Answer], answers: Sequence[Answer]) -> float:
    """How far two lists of answers by one engine are apart, whichever of the two names a token."""
    lengths = [0] * len(base)
    return max(gap(_numbers(one), other, lengths).size for one, other in ((base, answers), (answers, base)))


def _numbers(answers: Sequence[Answer]) -> list[list[tuple[int, float]]]:
    return [[(token, value) for token, value in answer if value is not None] for answer in answers]


def not_finite(answers: Sequence[Answer]) -> Problem | None:
    """The refusal of a model whose answers are no numbers."""
    for number, answer in enumerate(answers, 1):
        if not answer or any(value is None for _, value in answer):
            return Problem(
                "proof_not_finite",
                "the engine's answer to a probe prompt is NaN or infinite",
                f"probe prompt {number}",
                "the weights overflow in the engine's dtype: serve in float32 or bfloat16, or train anew with a lower "
                "learning rate",
            )
    return None


def nothing_changed(difference: float, noise: float) -> Problem:
    """The refusal of an adapter that the base's answers cannot be told from."""
    return Problem(
        "changes_nothing",
        "this adapter changes nothing: with it the engine answers the probe prompts as the base does (largest "
        f"difference {difference:.2g} nats, at most {noise:.2g} is rounding)",
        "",
        "look whether training moved anything (learning rate, steps, target_modules); publish it anyway with force",
    )


@dataclass(frozen=True)
class Compared:
    """The engine's answers held against the trainer's."""

    worst: Gap
    tolerance: float
    problem: Problem | None


def compare(probe: Probe, answers: Sequence[Answer], base: Sequence[Answer] | None, engine_types: str) -> Compared:
    """Whether the engine answers as the trainer did. `answers` and `base` are to the probe's prompts, in its order.

    `engine_types`: the coarsest type that the engine calculates in.
    """
    kind = coarsest(probe.computed_in or probe.dtype, engine_types)
    limits = TOLERANCES[kind]
    lengths = [len(prompt.prompt_token_ids) for prompt in probe.prompts]
    worst = gap([_pairs(prompt.top) for prompt in probe.prompts], answers, lengths)
    tolerance = limits.most
    if base is not None and all(prompt.base_top for prompt in probe.prompts):
        apart = gap([_pairs(prompt.base_top) for prompt in probe.prompts], base, lengths)
        if apart.size > limits.most:
            return Compared(worst, limits.most, _other_base(apart, limits.most, kind))
        tolerance = min(limits.most, max(limits.least, _ROUNDING_SPREADS * apart.size))
    if worst.size <= tolerance:
        return Compared(worst, tolerance, None)
    return Compared(worst, tolerance, _mismatch(worst, tolerance, kind))


def _pairs(tokens: Sequence[ProbeToken]) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) for token in tokens]


def _mismatch(worst: Gap, tolerance: float, kind: str) -> Problem:
    return Problem(
        "proof_mismatch",
        f"the engine does not answer as the trainer did: {worst.told('here', 'by the passport')}; they are "
        f"{worst.size:.4f} apart, and at most {tolerance:.4f} is rounding ({kind})",
        f"loradock.json: probe.prompts.{worst.prompt - 1}",
        "these are not the weights or settings that the passport was written for (lora_alpha, r, use_rslora, a file of "
        "another run): publish the checkpoint as the trainer wrote it, or without loradock.json",
    )


def _other_base(apart: Gap, limit: float, kind: str) -> Problem:
    return Problem(
        "proof_other_base",
        f"the served base is not the one that this was trained on: {apart.told('by this base', 'by the trained one')}; "
        f"they are {apart.size:.4f} apart, and at most {limit:.4f} is rounding ({kind})",
        f"loradock.json: probe.prompts.{apart.prompt - 1}.base_top",
        "serve the base that it was trained on, or train it anew on this one",
    )


def proven(difference: float | None, compared: Compared | None) -> Proof:
    """The proof of a version that passed."""
    return Proof("proven", change=_rounded(difference), at=_now(), **_of(compared))


def failed(problem: Problem, difference: float | None = None, compared: Compared | None = None) -> Proof:
    """The proof of one that did not."""
    return Proof("failed", problem, change=_rounded(difference), at=_now(), **_of(compared))


def _of(compared: Compared | None) -> dict[str, Any]:
    return {} if compared is None else {"agreement": compared.worst, "tolerance": compared.tolerance}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
