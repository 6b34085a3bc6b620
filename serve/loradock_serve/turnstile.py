"""Turns on the engines: carries out what the admission policy decides, and owns its state.

    async with turnstiles.turn(target, ask) as turn:   # waits here
        …                                              # the request runs
        turn.usage = (prompt_tokens, output_tokens)

One `Turnstile` for each engine, through all of its starts: limits are those that the present start reports of itself,
and none where it reports none. Everything happens on one event loop and no event awaits anything, so there is no lock.

Who pins an adapter in the engine pins it here first: `await turnstiles.of(fleet.base).pin(digest)` returns when the
adapter has a slot that admission gives to nobody else, and `unpin(digest)` gives it back. A restart of the engine keeps
the pins made here, not what the engine had made of them.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from loradock_serve import metrics
from loradock_serve.admission import Admission
from loradock_serve.engine import AttachedEngine, Engine, EngineStart
from loradock_serve.errors import ConflictError, DeadlineError, QueueFullError
from loradock_serve.leases import Target
from loradock_serve.slots import UNLIMITED
from loradock_serve.tickets import Ask, Begin, Decision, Expire, Limits, PinHolds, Refuse, Rules, Ticket

log = logging.getLogger("loradock.admission")

TIMERS_DIFFER_S = 0.01
"""Whoever keeps a request's deadline outside may see it come so much earlier than the clock here."""


class Alarm(Protocol):
    """Something that will happen, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """All that the policy's effects need of the world."""

    def time(self) -> float:
        """Seconds."""
        ...

    def call_at(self, when: float, callback: Callable[[], None]) -> Alarm:
        """Have something happen."""
        ...


class LoopClock:
    """The world's time, on the running event loop (whose own time uvloop tells in whole milliseconds)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.time = time.monotonic

    def call_at(self, when: float, callback: Callable[[], None]) -> Alarm:
        return self._loop.call_later(max(0.0, when - self.time()), callback)


def limits_of(start: EngineStart) -> Limits:
    """What a start of an engine can do at once, as far as it says."""
    status = start.status.limits if start.status is not None else {}
    slots, seats = (status.get(key) for key in ("max_loras", "max_num_seqs"))
    # An engine without adapters reports 0 slots: it is asked for none.
    return Limits(*(limit if isinstance(limit, int) and limit > 0 else UNLIMITED for limit in (slots, seats)))


class Turnstile:
    """The queue of one engine."""

    def __init__(self, rules: Rules, clock: Clock, current: Callable[[], EngineStart | None]) -> None:
        """`current`: the start of the engine that is ready now."""
        self._current = current
        self._rules = rules
        self._clock = clock
        self._policy = Admission(rules, Limits())
        self._start_number = 0
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._pinning: dict[str, asyncio.Future[None]] = {}
        self._alarm: Alarm | None = None
        self._alarm_at = 0.0
        self.running = 0

    def time(self) -> float:
        """Now, by the clock that all times here are of."""
        return self._clock.time()

    @property
    def queued(self) -> int:
        """Requests that wait here."""
        return self._policy.queued

    @property
    def limits(self) -> Limits:
        """Those of the engine's present start."""
        return self._policy.limits

    @property
    def pins(self) -> tuple[str, ...]:
        """Digests of the pinned adapters."""
        return self._policy.pins

    def _look(self) -> None:
        """Is this another start of the engine than last time? It has other limits, perhaps, and nothing in it."""
        start = self._current()
        if start is None or start.number <= self._start_number:
            return
        self._start_number = start.number
        limits, pins = limits_of(start), self.pins
        self._do(self._policy.restart(limits, self._clock.time()))
        for digest in pins[len(self.pins) :]:
            log.warning("%s is not pinned any more: the engine has %d slots now", digest, limits.slots)

    async def wait(self, ticket: Ticket) -> None:
        """Returns when it is the request's turn; QueueFullError or DeadlineError where that never comes."""
        self._look()
        self._do(self._policy.arrive(ticket, self._clock.time()), ticket)
        if ticket.state == "queued":
            turn = self._waiting[ticket] = asyncio.get_running_loop().create_future()
            try:
                await turn
            except asyncio.CancelledError:
                metrics.NOT_ADMITTED.labels("deadline" if self._is_over(ticket) else "client_gone").inc()
                self.leave(ticket, None)
                raise
        self.running += 1
        metrics.QUEUE_SECONDS.observe(ticket.begun_at - ticket.arrived_at)

    def _is_over(self, ticket: Ticket) -> bool:
        deadline_at = ticket.ask.deadline_at
        return deadline_at is not None and deadline_at - self._clock.time() < TIMERS_DIFFER_S

    def leave(self, ticket: Ticket, usage: tuple[int, int] | None) -> None:
        """The request ended, or its client is gone."""
        self._waiting.pop(ticket, None)
        self._do(self._policy.finish(ticket, self._clock.time(), usage))

    async def pin(self, adapter: str) -> None:
        """Returns when the adapter has a slot that it keeps; ConflictError where that would leave none to the others.

        A caller that is cancelled takes the pin back.
        """
        self._look()
        if not self._policy.can_pin(adapter):
            slots, pinned = self._policy.limits.slots, len(self.pins)
            raise ConflictError(
                f"{pinned} of {slots} slots are pinned, and one must stay free for all others: unpin an adapter, or "
                "raise engine.max_loras"
            )
        holds = self._pinning.get(adapter)
        if holds is None:
            holds = self._pinning[adapter] = asyncio.get_running_loop().create_future()
            self._do(self._policy.pin(adapter, self._clock.time()))
        try:
            await asyncio.shield(holds)
        except asyncio.CancelledError:
            self.unpin(adapter)
            raise

    def unpin(self, adapter: str) -> None:
        """The slot is as any other from now on. Nothing happens where the adapter was not pinned."""
        if (holds := self._pinning.pop(adapter, None)) is not None:
            holds.cancel()
        self._do(self._policy.unpin(adapter, self._clock.time()))

    def _do(self, decisions: list[Decision], own: Ticket | None = None) -> None:
        """Carry out what was decided; `own` is nobody else's yet, and sees an error of its own raised."""
        own_error: QueueFullError | DeadlineError | None = None
        for decision in decisions:
            if isinstance(decision, PinHolds):
                if (holds := self._pinning.pop(decision.adapter, None)) is not None:
                    holds.set_result(None)
                continue
            error = self._error(decision)
            if decision.ticket is own:
                own_error = error
                continue
            turn = self._waiting.pop(decision.ticket, None)
            if turn is None or turn.done():  # cancelled a moment ago: its `wait` is about to leave
                continue
            if error is None:
                turn.set_result(None)
            else:
                turn.set_exception(error)
        self._set_alarm()
        if own_error is not None:
            raise own_error

    def _error(self, decision: Begin | Refuse | Expire) -> QueueFullError | DeadlineError | None:
        if isinstance(decision, Begin):
            return None
        if isinstance(decision, Expire):
            metrics.NOT_ADMITTED.labels("deadline").inc()
            waited_s = self._clock.time() - decision.ticket.arrived_at
            return DeadlineError(
                f"The request's time (`x-request-timeout`) was over after {waited_s:.1f} s in the queue; it did not "
                "reach the engine"
            )
        metrics.NOT_ADMITTED.labels(decision.reason).inc()
        whose, limit, key = "of yours", self._rules.max_queue_per_tenant, "max_queue_per_tenant"
        if decision.reason == "queue_full":
            whose, limit, key = "of everybody", self._rules.max_queue, "max_queue"
        return QueueFullError(
            f"{decision.waiting} requests {whose} wait already, and at most {limit} may (`admission.{key}`); try "
            f"again in {decision.retry_after_s} s",
            code=decision.reason,
            retry_after_s=decision.retry_after_s,
        )

    def _set_alarm(self) -> None:
        wake_at = self._policy.wake_at
        if wake_at is None or (self._alarm is not None and self._alarm_at <= wake_at):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = wake_at
        self._alarm = self._clock.call_at(wake_at, self._rings)

    def _rings(self) -> None:
        self._alarm = None
        self._do(self._policy.tick(max(self._clock.time(), self._alarm_at)))


class Turn:
    """One request's turn on an engine: entering waits for it, leaving gives it back."""

    def __init__(self, turnstile: Turnstile, target: Target, ask: Ask, arrived_at: float | None) -> None:
        self._turnstile = turnstile
        self._target = target
        self.arrived_at = turnstile.time() if arrived_at is None else arrived_at
        """The time when the request came to the queue first."""
        self._ticket = Ticket(ask, self.arrived_at, returns=arrived_at is not None)
        self.usage: tuple[int, int] | None = None
        """Prompt and output tokens by the engine's own figures, once they are known."""

    @property
    def waited_s(self) -> float:
        """How long the request was in the queue."""
        return self._ticket.begun_at - self.arrived_at

    @property
    def is_current(self) -> bool:
        """Whether the target still is the engine's present start: it may have ended while the request waited."""
        start = self._target.engine.current
        return start is not None and start.number == self._target.start_number

    async def __aenter__(self) -> Self:
        await self._turnstile.wait(self._ticket)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turnstile.running -= 1
        self._turnstile.leave(self._ticket, self.usage)


class Turnstiles:
    """The turnstiles of all engines, each made when it is first asked for, and gone with its engine."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._all: weakref.WeakKeyDictionary[Engine | AttachedEngine, Turnstile] = weakref.WeakKeyDictionary()

    def of(self, engine: Engine | AttachedEngine) -> Turnstile:
        """The turnstile of an engine."""
        turnstile = self._all.get(engine)
        if turnstile is None:
            known = weakref.ref(engine)  # a turnstile must not keep its engine: it is forgotten with it
            turnstile = self._all[engine] = Turnstile(self._rules, LoopClock(), lambda: _current(known()))
        return turnstile

    def turn(self, target: Target, ask: Ask, arrived_at: float | None = None) -> Turn:
        """A turn on a target, to be entered; `arrived_at` of a request whose engine ended while it waited."""
        return Turn(self.of(target.engine), target, ask, arrived_at)

    def observe(self, base: Engine | AttachedEngine) -> None:
        """Set the gauges."""
        for engine, gauge in ((True, "base"), (False, "dedicated")):
            ours = [turnstile for other, turnstile in self._all.items() if (other is base) is engine]
            metrics.QUEUED.labels(gauge).set(sum(turnstile.queued for turnstile in ours))
            metrics.ADMITTED.labels(gauge).set(sum(turnstile.running for turnstile in ours))


def _current(engine: Engine | AttachedEngine | None) -> EngineStart | None:
    return engine.current if engine is not None else None
