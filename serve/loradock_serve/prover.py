"""Has engines answer probe prompts, and keeps what that proves (`proof.py` judges it).

A shared adapter is proven before it is published, or at its first load where the engine was down then; what has an
engine of its own is proven when that engine first runs. Each question takes its turn as any request does, behind all of
these: a proof waits for a seat and a slot like everybody, takes none from whoever uses it, and where its time is over
the version stays unproven until it is loaded next. The base's own answers are asked for once per start and prompt.
Knows nothing of names or pointers.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.errors import CheckpointError
from loradock_adapters.passport import read_passport
from loradock_adapters.probe import Probe, fixed_prompts
from loradock_adapters.registry import Registry, Version
from loradock_adapters.touched import touched_tokens
from loradock_serve import metrics
from loradock_serve.asks import MAX_PRIORITY
from loradock_serve.catalog import is_classifier
from loradock_serve.engine import EngineStart
from loradock_serve.engine_client import EngineClient
from loradock_serve.errors import EngineError, EngineRefusedError, GatewayError, ProofFailedError
from loradock_serve.fleet import Fleet
from loradock_serve.leases import Target
from loradock_serve.proof import (
    TOLERANCES,
    Answer,
    Compared,
    Proof,
    change,
    coarsest,
    compare,
    failed,
    forced,
    is_proven,
    not_finite,
    nothing_changed,
    proven,
    unproven,
)
from loradock_serve.tickets import Ask
from loradock_serve.turnstile import Turnstiles

log = logging.getLogger("loradock.proof")

TIMEOUT_S = 30.0
"""A proof that has not come by then is given up, until the version is loaded next."""
TENANT = "(proof)"
REPEATS = 3
"""Rounds in which base and adapter answer side by side where their answers may be the same."""
MAX_CACHED = 64
Prompts = Sequence[Sequence[int]]
_FORCEABLE = frozenset({"changes_nothing", "proof_mismatch", "proof_other_base"})
"""What may be published all the same. An answer that is no number may not."""


class Files(Protocol):
    """Where the files of versions are."""

    def version_dir(self, digest: str) -> Path:
        """The directory of a version."""


class Prover:
    """See the top of the file."""

    def __init__(
        self, fleet: Fleet, turnstiles: Turnstiles, registry: Registry, files: Files, vocabulary: int | None
    ) -> None:
        """`vocabulary`: how many tokens the served base knows; None where that is not known."""
        self._fleet = fleet
        self._turnstiles = turnstiles
        self._registry = registry
        self._files = files
        self._vocabulary = vocabulary
        self._base_answers: OrderedDict[tuple[int, tuple[tuple[int, ...], ...]], list[Answer]] = OrderedDict()
        self._running: dict[str, asyncio.Task[Proof]] = {}
        self._given_up: dict[str, tuple[int, int]] = {}
        """Digest -> the engine and start on which nothing could be shown: they are not asked for it at each request."""

    async def before_publishing(
        self, start: EngineStart, digest: str, directory: Path, probe: Probe | None, *, force: bool
    ) -> Proof:
        """The proof of a shared adapter that the base's engine has loaded. A failed one is for the caller to refuse."""
        target = Target(start.client, digest, self._fleet.base, start.number)
        proof = await self._bounded(self._shared(target, directory, probe))
        if force and proof.state == "failed" and proof.reason is not None and proof.reason.code in _FORCEABLE:
            proof = forced(proof)
        metrics.PROOFS.labels("refused" if proof.state == "failed" else proof.state).inc()
        return proof

    async def at_first_use(self, version: Version, target: Target) -> None:
        """Proves a version that is still to be proven, on the engine that has it now; ProofFailedError where it fails.

        Requests that come meanwhile wait for the same proof.
        """
        if is_proven(version.proof):
            return
        proof = Proof.from_json(version.proof)
        if proof is None or not proof.is_open:
            return
        place = (id(target.engine), target.start_number)
        if self._given_up.get(version.digest) == place:
            return
        task = self._running.get(version.digest)
        if task is None:
            task = asyncio.create_task(self._prove_and_keep(version, target), name=f"proof of {version.ref}")
            self._running[version.digest] = task
            task.add_done_callback(lambda _done: self._running.pop(version.digest, None))
        proof = await asyncio.shield(task)
        if proof.state == "failed" and proof.reason is not None:
            raise ProofFailedError(f"{version.name!r} version {version.number}", proof.reason)
        if proof.state == "unproven":
            if len(self._given_up) >= MAX_CACHED:
                self._given_up.clear()
            self._given_up[version.digest] = place

    async def _prove_and_keep(self, version: Version, target: Target) -> Proof:
        directory = self._files.version_dir(version.digest)
        try:
            passport = await asyncio.to_thread(read_passport, directory)
        except CheckpointError as error:
            return unproven(str(error))
        probe = passport.probe if passport is not None else None
        if is_classifier(version):  # what is asked for are next tokens, and its engine has none
            return unproven("a classification head is proven by its trainer alone")
        own = version.placement == "dedicated"
        proof = await self._bounded(self._own(target, probe) if own else self._shared(target, directory, probe))
        metrics.PROOFS.labels(proof.state).inc()
        if proof.state != "unproven":
            try:
                await asyncio.to_thread(self._registry.set_proof, version.digest, proof.to_json())
            except SQLAlchemyError as error:  # away for a moment: no reason to answer nobody
                log.warning("what was proven of %s could not be kept: %s", version.ref, error)
                return proof if proof.state == "failed" else unproven("the registry could not keep it")
            log.log(
                logging.INFO if proof.state == "proven" else logging.ERROR,
                "%s is %s%s",
                version.ref,
                proof.state,
                f": {proof.reason}" if proof.reason is not None else "",
            )
        return proof

    async def _bounded(self, work: Awaitable[Proof]) -> Proof:
        """A proof, or why there is none yet: an engine that is away, busy, or cannot say proves nothing."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await work
        except TimeoutError:
            return unproven(f"no turn on the engine within {TIMEOUT_S:.0f} s")
        except (EngineError, GatewayError) as error:
            return unproven(str(error))

    async def _shared(self, target: Target, directory: Path, probe: Probe | None) -> Proof:
        client, adapter = target.client, target.engine_model
        status = await self._status(target)
        probe = self._usable(probe, status.longest)
        prompts = await self._prompts(directory, probe)
        base = await self._base(target, prompts)
        answers = await self._ask(target, client, adapter, prompts)
        if (problem := not_finite(answers)) is not None:
            return failed(problem)
        noise = TOLERANCES[status.kind].noise
        difference = change(base, answers)
        if difference <= noise:
            difference, noise = await self._side_by_side(target, prompts, base)
            if difference <= noise:
                return failed(nothing_changed(difference, noise), difference)
        compared = None if probe is None else compare(probe, answers, base, status.kind)
        return _of(difference, compared)

    async def _own(self, target: Target, probe: Probe | None) -> Proof:
        """On an engine of its own: its answers are numbers, and the trainer's where there is a passport."""
        status = await self._status(target)
        probe = self._usable(probe, status.longest)
        prompts: Prompts = [prompt.prompt_token_ids for prompt in probe.prompts] if probe is not None else [[0, 1, 2]]
        answers = await self._ask(target, target.client, None, prompts)
        if (problem := not_finite(answers)) is not None:
            return failed(problem)
        return _of(None, None if probe is None else compare(probe, answers, None, status.kind))

    async def _side_by_side(self, target: Target, prompts: Prompts, first: list[Answer]) -> tuple[float, float]:
        """The smallest difference between base and adapter over some rounds in which both are in the engine at once,
        and the largest between two answers of the base, doubled: what is no more than that is one and the same model.
        """
        difference, noise = float("inf"), 0.0
        for _ in range(REPEATS):
            base, answers = await asyncio.gather(
                self._ask(target, target.client, None, prompts),
                self._ask(target, target.client, target.engine_model, prompts),
            )
            noise = max(noise, change(first, base))
            difference = min(difference, change(base, answers))
        return difference, 2 * noise

    def _usable(self, probe: Probe | None, longest: int) -> Probe | None:
        """The prompts that fit into the engine's context; None where there are none."""
        if probe is None:
            return None
        fitting = tuple(prompt for prompt in probe.prompts if len(prompt.prompt_token_ids) < longest)
        return probe.model_copy(update={"prompts": fitting}) if fitting else None

    async def _prompts(self, directory: Path, probe: Probe | None) -> Prompts:
        if probe is not None:
            return [prompt.prompt_token_ids for prompt in probe.prompts]
        if self._vocabulary is None:
            raise EngineRefusedError("how many tokens the base knows is not known, so there is nothing to ask it")
        touched = await asyncio.to_thread(touched_tokens, directory)
        return fixed_prompts(self._vocabulary, [token for token in touched or () if token < self._vocabulary])

    async def _base(self, target: Target, prompts: Prompts) -> list[Answer]:
        """What the base alone says, from memory where this start has said it before."""
        key = (target.start_number, tuple(tuple(prompt) for prompt in prompts))
        answers = self._base_answers.get(key)
        if answers is None:
            answers = await self._ask(target, target.client, None, prompts)
            self._base_answers[key] = answers
            while len(self._base_answers) > MAX_CACHED:
                self._base_answers.popitem(last=False)
        else:
            self._base_answers.move_to_end(key)
        return answers

    async def _ask(self, target: Target, client: EngineClient, adapter: str | None, prompts: Prompts) -> list[Answer]:
        turnstile = self._turnstiles.of(target.engine)
        tokens = sum(map(len, prompts))
        until = turnstile.time() + TIMEOUT_S
        ask = Ask(TENANT, adapter, tokens, len(prompts), MAX_PRIORITY, until)
        async with self._turnstiles.turn(target, ask) as turn:
            answers: list[Answer] = list(await client.probe(adapter, prompts))
            turn.usage = (tokens, len(prompts))
        if len(answers) != len(prompts):
            raise EngineError(f"the engine answered {len(answers)} of {len(prompts)} probe prompts")
        return answers

    async def _status(self, target: Target) -> "_EngineFacts":
        current = target.engine.current
        status = current.status if current is not None and current.number == target.start_number else None
        if status is None:
            raise EngineRefusedError("the engine does not say how it calculates")
        limits = status.limits
        types = [limits.get(key) for key in ("dtype", "lora_dtype")]
        kind = "quantised" if limits.get("quantised") else coarsest(*(t for t in types if isinstance(t, str)))
        longest = limits.get("max_model_len")
        return _EngineFacts(kind, longest if isinstance(longest, int) else 2**31)


class _EngineFacts:
    """What a proof needs to know of an engine."""

    def __init__(self, kind: str, longest: int) -> None:
        self.kind = kind
        """The coarsest type that it calculates in."""
        self.longest = longest
        """Tokens of its context."""


def _of(difference: float | None, compared: Compared | None) -> Proof:
    if compared is not None and compared.problem is not None:
        return failed(compared.problem, difference, compared)
    return proven(difference, compared)
