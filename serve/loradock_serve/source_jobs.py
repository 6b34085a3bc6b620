"""Fetches that are under way: one for each thing that was asked for, however many ask, and so many at a time.

    look (one request to the source) ▶ may it? is it here already? ▶ its files into the store ▶ publish, as an upload

A fetch belongs to nobody: who started it may hang up, and who asks for the same meanwhile waits for the same one. Knows
nothing of HTTP requests, nor of what a source is.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from loradock_adapters.errors import LoradockError, MissingBlobsError, NotFoundError, RefusedError
from loradock_adapters.manifest import Manifest
from loradock_adapters.registry import Registry
from loradock_adapters.source_ref import SourceRef, is_allowed
from loradock_adapters.store import LocalStore
from loradock_serve.errors import GatewayError, SourceBusyError, SourceNotAllowedError
from loradock_serve.http_errors import UNFORESEEN, explained
from loradock_serve.publish import Options, Published, Publisher
from loradock_serve.source_fetch import Fetcher, Watch
from loradock_serve.source_listing import Limits, Listing, Source, choose

log = logging.getLogger("loradock.sources")

MAX_REMEMBERED = 256
"""Ended fetches whose outcome can still be asked for, and refused commits."""

Result = TypeVar("Result")
Opener = Callable[[SourceRef, str | None], Source]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be fetched, and as what it is to be published."""

    name: str
    ref: SourceRef
    allowed: Sequence[str]
    """The prefixes of which it has to be one, also under the name that the source itself has for it."""
    options: Options
    token: str | None = None
    lazy: bool = False
    """Asked for by a request: a commit that was refused once is refused again without being fetched, and the name
    points at what lies at the source now, also where that is an older version of it."""

    def __repr__(self) -> str:
        return f"Order({self.name!r}, {str(self.ref)!r})"  # not the token: this may end up in a log


class Job:
    """One fetch, from its first request to what became of it."""

    def __init__(self, order: Order, timeout_s: float) -> None:
        self.order = order
        self.id = secrets.token_hex(16)
        self.watch = Watch(timeout_s)
        self.task: asyncio.Task[Published]

    async def wait(self, seconds: float) -> Published | None:
        """What became of it, or its error; None where it goes on for longer. It goes on without its waiters, too."""
        done, _ = await asyncio.wait({self.task}, timeout=seconds)
        return self.outcome() if done else None

    def outcome(self) -> Published:
        """Of a job that ended."""
        error = self.task.exception()
        if error is not None:
            raise error.with_traceback(None)  # several are told: each raise would make its traceback longer
        return self.task.result()


class SourceJobs:
    """See the top of the file."""

    def __init__(
        self,
        store: LocalStore,
        registry: Registry,
        publisher: Publisher,
        promote: Callable[[str, str], Awaitable[object]],
        opener: Opener,
        limits: Limits,
        *,
        timeout_s: float,
        max_running: int,
        max_waiting: int,
    ) -> None:
        self._store = store
        self._registry = registry
        self._publisher = publisher
        self._promote = promote
        self._opener = opener
        self._limits = limits
        self._timeout_s = timeout_s
        self._max_jobs = max_running + max_waiting
        self._room = asyncio.Semaphore(max_running)
        # Its own threads: a source that answers slowly must not take those that everything else needs.
        self._threads = ThreadPoolExecutor(max_running, thread_name_prefix="source")
        self._running: dict[bytes, Job] = {}
        self._by_id: OrderedDict[str, Job] = OrderedDict()
        self._refusals: OrderedDict[str, RefusedError] = OrderedDict()

    def running(self, order: Order) -> Job | None:
        """The fetch of just this that is under way."""
        return self._running.get(_key(order))

    def ended_or_running(self, job_id: str, name: str, ref: SourceRef) -> Job | None:
        """A fetch by its id, where it is one of this name and address; ended ones are known for a while."""
        job = self._by_id.get(job_id)
        return job if job is not None and (job.order.name, job.order.ref) == (name, ref) else None

    def ensure(self, order: Order) -> Job:
        """The fetch of this that is under way, or a new one. Raises SourceBusyError, SourceNotAllowedError."""
        if (job := self.running(order)) is not None:
            return job
        check_allowed(order.ref, order.allowed)
        if len(self._running) >= self._max_jobs:
            raise SourceBusyError(
                f"{len(self._running)} sources are being fetched or wait for it already, as many as this server takes "
                "(`sources.max_running`, `sources.max_waiting`)",
                retry_after_s=10,
            )
        job = Job(order, self._timeout_s)
        key = _key(order)
        job.task = asyncio.create_task(self._run(job))
        # Not at its own end: whoever comes between that and what is noted of it would begin the same once more.
        job.task.add_done_callback(lambda _task: self._running.pop(key, None))
        self._running[key] = self._by_id[job.id] = job
        if len(self._by_id) > MAX_REMEMBERED + self._max_jobs:
            oldest = next(job_id for job_id, known in self._by_id.items() if known.task.done())
            del self._by_id[oldest]
        # Nobody may be left to ask for its outcome, and that is no fault.
        job.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return job

    async def stop(self) -> None:
        """Ends all fetches; their threads look up at their next piece."""
        jobs = list(self._running.values())
        for job in jobs:
            job.watch.end()
            job.task.cancel()
        await asyncio.gather(*(job.task for job in jobs), return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, job: Job) -> Published:
        began = time.monotonic()
        order = job.order
        try:
            async with self._room:
                published = await self._fetch_and_publish(job)
            seconds = time.monotonic() - began
            log.info("%s from %s: %d bytes in %.1f s", order.name, order.ref, job.watch.done_bytes, seconds)
            return published
        except LoradockError as error:
            log.warning("%s from %s: %s", order.name, order.ref, error.code)
            raise
        except OSError as error:
            log.error("%s from %s: %s", order.name, order.ref, type(error).__name__, exc_info=error)
            raise explained(error) or GatewayError(UNFORESEEN) from error
        finally:
            job.watch.end()

    async def _fetch_and_publish(self, job: Job) -> Published:
        order = job.order
        source = self._opener(order.ref, order.token)
        listing = await self._in_thread(source.look)
        if listing.called != order.ref:
            check_allowed(listing.called, order.allowed)
        if order.lazy and (refusal := self._refusals.get(listing.source)) is not None:
            raise RefusedError(refusal.problems)
        try:
            if (known := await asyncio.to_thread(self._known, order.name, listing)) is not None:
                return await self._publish(order, listing, known)
        except MissingBlobsError:
            log.info("%s: the registry has %s, and the store lacks its files", order.name, listing.source)
        try:
            fetch = functools.partial(self._fetch, job, source, listing)
            try:
                return await self._publish(order, listing, await self._in_thread(fetch))
            except MissingBlobsError:  # a file that was here already was collected meanwhile
                return await self._publish(order, listing, await self._in_thread(fetch))
        except RefusedError as refusal:
            if order.lazy:
                self._refusals[listing.source] = refusal
                if len(self._refusals) > MAX_REMEMBERED:
                    self._refusals.popitem(last=False)
            raise

    def _fetch(self, job: Job, source: Source, listing: Listing) -> Manifest:
        files = choose(listing.files, self._limits)
        return Fetcher(self._store, source, job.watch).fetch(listing, files)

    def _known(self, name: str, listing: Listing) -> Manifest | None:
        """The files of the name's version that is of this very commit."""
        with contextlib.suppress(NotFoundError):
            for version in self._registry.versions(name):
                if version.source == listing.source:
                    return self._registry.manifest(version)
        return None

    async def _publish(self, order: Order, listing: Listing, manifest: Manifest) -> Published:
        options = replace(order.options, source=listing.source)
        published = await self._publisher.publish_manifest(order.name, manifest, options)
        if order.lazy and published.current_number != published.version.number:
            await self._promote(order.name, str(published.version.number))
        return published

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def check_allowed(ref: SourceRef, prefixes: Sequence[str], key: str = "sources.push") -> None:
    """Raises SourceNotAllowedError that names the key to set."""
    if not is_allowed(ref, prefixes):
        allowed = ", ".join(prefixes) if prefixes else "none"
        raise SourceNotAllowedError(
            f"{ref} is not among the sources that this server fetches from ({allowed}); its operator can allow the "
            f"prefix with `{key}`"
        )


def _key(order: Order) -> bytes:
    """Who asks for the same with another token waits for a fetch of their own: it may see other things."""
    what = (order.name, str(order.ref), order.token, order.options)
    return hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
