"""An engine and its life: started on demand, watched, restarted, stopped. One task owns the state.

    stopped ──ensure_ready──▶ starting ──healthy, corrected──▶ ready ──stop──▶ stopping ──▶ stopped
                                 │                               │
                                 └── failed ◀── exit or no answer ┘   (the base restarts by itself, with growing pauses)

Callers never check and then act: they `ensure_ready()` and get the client of the start that is ready. Those who wait
while an engine that does not restart by itself breaks learn of it at once; whoever asks after that gets a new start.
Knows nothing of models or adapters; that a new start has loaded nothing shows in `EngineStart.number`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loradock_serve.engine_client import EngineClient, EngineStatus
from loradock_serve.engine_command import EngineCommand
from loradock_serve.errors import EngineError, EngineStartError, EngineUnavailableError
from loradock_serve.process import EngineProcess, explain_status

log = logging.getLogger("loradock.engine")

State = Literal["stopped", "starting", "ready", "stopping", "failed"]
READY_POLL_S = 0.25
HEALTH_POLL_S = 1.0
END_SEEN_WITHIN_S = 0.5
"""A dead engine's connections break before its end is known, which tells why it died."""
# A busy API process can miss probes; a dead engine says so, or its process ends, long before this.
MISSED_PROBES = 24
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STABLE_AFTER_S = 120.0


@dataclass(frozen=True, eq=False)
class EngineStart:
    """One start of an engine that became ready."""

    number: int
    client: EngineClient
    status: EngineStatus | None
    """None for an attached engine without our plug-in."""


@dataclass(frozen=True)
class EnginePlan:
    """How to run an engine: everything but the socket, which is fresh at every start."""

    label: str
    """For logs and messages: "the base's engine", or "the engine of 'NAME'"."""
    make_command: Callable[[Path], EngineCommand]
    socket_dir: Path
    log_path: Path
    start_timeout_s: float
    needs_corrected_lora: bool
    """Whether the engine must report the corrected LoRA wrapper before it counts as ready."""
    restarts: bool
    """Whether it starts again by itself after a crash, as the base does."""

    @property
    def subject(self) -> str:
        """The label at the beginning of a sentence."""
        return self.label[:1].upper() + self.label[1:]


class Engine:
    """See the top of the file."""

    def __init__(self, plan: EnginePlan) -> None:
        self.plan = plan
        self.state: State = "stopped"
        self.failure: EngineError | None = None
        """Why it is not ready; None while it is, or has not failed yet."""
        self.starts = 0
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[EngineStart] = asyncio.get_running_loop().create_future()
        self._stop_wanted = asyncio.Event()
        self._suspected = asyncio.Event()
        self._looked = asyncio.Event()
        """Set when the engine has been looked at since it was suspected."""

    @property
    def current(self) -> EngineStart | None:
        """The start that is ready now."""
        return self._ready.result() if self.state == "ready" else None

    @property
    def pid(self) -> int | None:
        """The process group of the engine while one runs."""
        return self._process.pid if self._process is not None else None

    _process: EngineProcess | None = None

    @property
    def runs(self) -> bool:
        """Whether it holds memory, or is about to: starting, ready or stopping."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin to start, unless it is running or on its way."""
        if not self.runs:
            self._stop_wanted.clear()
            self._suspected.clear()
            self._renew_ready()
            self.state = "starting"
            self._task = asyncio.create_task(self._live(), name=self.plan.label)

    async def ensure_ready(self, timeout_s: float) -> EngineStart:
        """The ready start, waiting up to `timeout_s` for it; starts the engine where it does not run.

        Raises EngineStartError when this start fails, EngineUnavailableError when the time is over.
        """
        if self.state == "ready":
            return self._ready.result()
        try:
            async with asyncio.timeout(timeout_s):
                while self.state in ("stopping", "failed") and self.runs and self._task is not None:
                    await asyncio.wait([self._task])  # its end is near, and what comes after it is a new start
                self.start()
                return await asyncio.shield(self._ready)
        except TimeoutError:
            reason = f": {self.failure}" if self.failure is not None else ""
            raise EngineUnavailableError(
                f"{self.plan.subject} is not ready after {timeout_s:.0f} s{reason}", retry_after_s=10
            ) from None

    def suspect(self) -> None:
        """A request saw the engine fail: look at its health now rather than at the next probe."""
        self._looked.clear()
        self._suspected.set()

    async def examine(self, timeout_s: float) -> None:
        """As `suspect`, and wait for what the look finds, though not longer than `timeout_s`.

        Whoever asks for a dead engine after that waits for its next start rather than meet it once more.
        """
        self.suspect()
        if self.state == "ready":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._looked.wait(), timeout_s)

    async def stop(self) -> None:
        """Stop the engine and wait until nothing of it is left."""
        if self._task is None or not self.runs:
            return
        self._stop_wanted.set()
        self._suspected.set()
        if self.state != "stopping":
            self._fail_waiters(EngineUnavailableError(f"{self.plan.subject} is being stopped"))
            self._leave_ready("stopping")  # from here on nobody is given this start
        await asyncio.wait([self._task])

    def _renew_ready(self) -> None:
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()

    def _leave_ready(self, state: State) -> None:
        self.state = state
        self._renew_ready()
        self._looked.set()

    async def _live(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            await self._one_start()
            if self._stop_wanted.is_set():
                break
            if not self.plan.restarts:
                return
            if time.monotonic() - began > STABLE_AFTER_S:
                pause_s = FIRST_PAUSE_S
            log.warning("%s starts again in %.0f s", self.plan.label, pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_wanted.wait(), pause_s)
            if self._stop_wanted.is_set():
                break
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self.state = "stopped"

    async def _one_start(self) -> None:
        """From process start to process end, however it comes."""
        self.starts += 1
        socket = self.plan.socket_dir / f"{self.starts}-{time.monotonic_ns() % 10**9}.sock"
        try:
            self._process = process = await EngineProcess.start(self.plan.make_command(socket), self.plan.log_path)
        except OSError as error:  # no memory for a process, no place for its log
            summary = f"{self.plan.subject} cannot be started"
            self._broke(EngineStartError(f"{summary}: {error}", summary=summary))
            return
        client = EngineClient(f"unix://{socket}")
        ended = asyncio.create_task(process.wait())
        try:
            status = await self._until_ready(client, process, ended)
            if not self._stop_wanted.is_set():
                self.state, self.failure = "ready", None
                self._ready.set_result(EngineStart(self.starts, client, status))
                log.info("%s is ready (start %d)", self.plan.label, self.starts)
                await self._until_broken(client, process, ended)
        except EngineError as error:
            self._broke(error)
        finally:
            # First the process: its end is what breaks off the answers in flight, which a closed client would let hang.
            await (process.stop() if self._stop_wanted.is_set() else process.kill())
            await ended
            await client.close()
            self._process = None

    def _broke(self, error: EngineError) -> None:
        """The engine is of no use any more. Waiters of one that restarts wait on; those of another learn why not."""
        if self._stop_wanted.is_set():
            return
        self.failure = error
        log.error("%s", error)
        if self.plan.restarts:
            self._leave_ready("starting")
        else:
            self._fail_waiters(error)
            self._leave_ready("failed")

    async def _until_ready(
        self, client: EngineClient, process: EngineProcess, ended: asyncio.Task[int]
    ) -> EngineStatus | None:
        deadline = time.monotonic() + self.plan.start_timeout_s
        while True:
            if ended.done():
                summary = self._end(ended)
                raise EngineStartError(_with_tail(summary, process), summary=summary)
            if time.monotonic() > deadline:
                summary = f"{self.plan.subject} was not ready within {self.plan.start_timeout_s:.0f} s"
                raise EngineStartError(f"{summary}; its log is {process.log_path}", summary=summary)
            if self._stop_wanted.is_set():
                raise EngineUnavailableError(f"{self.plan.subject} is being stopped")
            if process.socket.exists() and await client.is_healthy():
                break
            await asyncio.wait([ended], timeout=READY_POLL_S)
        status = await client.status()
        if self.plan.needs_corrected_lora and (status is None or not status.corrected):
            wrapper = status.lora_wrapper if status is not None else "no plug-in at all"
            message = (
                f"{self.plan.subject} runs without Loradock's corrected LoRA wrapper ({wrapper}) and would "
                "answer with the wrong weights; is `loradock` installed in the engine's environment?"
            )
            raise EngineStartError(message, summary=message)
        return status

    async def _until_broken(self, client: EngineClient, process: EngineProcess, ended: asyncio.Task[int]) -> None:
        """Watch a ready engine; returns when it is to stop, raises EngineError when it broke."""
        missed = 0
        while not self._stop_wanted.is_set():
            wake = asyncio.create_task(self._suspected.wait())
            await asyncio.wait({wake, ended}, timeout=HEALTH_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            wake.cancel()
            self._suspected.clear()
            if ended.done():
                summary = self._end(ended)
                raise EngineError(_with_tail(summary, process), summary=summary)
            if self._stop_wanted.is_set():
                return
            healthy = await client.is_healthy()
            if healthy:
                self._looked.set()
            missed = 0 if healthy else missed + 1
            if healthy is False or missed > MISSED_PROBES:
                await asyncio.wait([ended], timeout=END_SEEN_WITHIN_S)
                summary = self._end(ended) if ended.done() else f"{self.plan.subject} is dead: its health check fails"
                raise EngineError(_with_tail(summary, process), summary=summary)

    def _end(self, ended: asyncio.Task[int]) -> str:
        return f"{self.plan.subject} ended with status {explain_status(ended.result())}"

    def _fail_waiters(self, error: EngineError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # seen: there may be no waiter at all


def _with_tail(summary: str, process: EngineProcess) -> str:
    """What happened, where the whole log is (`….1` once the engine has started again), and its last lines."""
    return f"{summary}; its log is {process.log_path}, which ends:\n{process.log_tail()}"


class AttachedEngine:
    """An engine that something else runs (`engine: {url: …}`): reached, watched, never started or stopped."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.state: State = "starting"
        self.failure: EngineError | None = None
        """Why it was not reached; None while it is."""
        self.starts = 0
        self.pid: int | None = None
        self._client = EngineClient(url)
        self._current: EngineStart | None = None
        self._lock = asyncio.Lock()

    @property
    def current(self) -> EngineStart | None:
        """What is known of the engine since it last answered."""
        return self._current

    def start(self) -> None:
        """Nothing to start: the first request, or health check, looks."""

    async def ensure_ready(self, timeout_s: float) -> EngineStart:
        """The engine's client once it answers; EngineUnavailableError after `timeout_s`."""
        if self._current is not None:
            return self._current
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                while self._current is None:
                    if await self._client.is_healthy():
                        status = await self._client.status()
                        self.starts += 1
                        self._current = EngineStart(self.starts, self._client, status)
                        self.state, self.failure = "ready", None
                        self._say_what_it_serves()
                    else:
                        await asyncio.sleep(READY_POLL_S)
                return self._current
        except TimeoutError:
            self.failure = EngineUnavailableError(
                f"The engine at {self.url} does not answer", retry_after_s=10, summary="The engine does not answer"
            )
            raise self.failure from None

    def _say_what_it_serves(self) -> None:
        status = self._current.status if self._current else None
        if status is None:
            log.warning("the engine at %s runs without Loradock's plug-in: it serves the base only", self.url)
        elif not status.corrected:
            log.warning("the engine at %s runs vLLM's own CPU LoRA wrapper: it serves the base only", self.url)

    def suspect(self) -> None:
        """A request saw it fail: whatever runs it may have restarted it, so ask again who it is."""
        self._current = None
        self.state = "starting"

    async def examine(self, timeout_s: float) -> None:
        """As `suspect`: whoever comes next finds out."""
        self.suspect()

    async def stop(self) -> None:
        """Let go of it."""
        await self._client.close()
        self.state = "stopped"
