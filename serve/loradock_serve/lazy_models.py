"""Models that requests name by their source: `"model": "hf://org/repo"`, where the operator allows the prefix.

    unknown prefix ▶ refused, no network        known version ▶ answers; a branch is looked at anew behind its back
    remembered miss ▶ refused, no network       else ▶ one fetch for all who ask, within the bucket of lookups

A source is registered under a name that is made from it and never changes, so a restart, or another gateway on the same
registry, finds it again. Knows nothing of HTTP.
"""

import hashlib
import logging
import math
import re
import time
from dataclasses import replace

from loradock_adapters.errors import LoradockError, RefusedError
from loradock_adapters.registry import Version
from loradock_adapters.source_ref import SourceRef, parse_source
from loradock_serve.catalog import Catalog, Resolved
from loradock_serve.config import SourcesConfig
from loradock_serve.errors import (
    ModelNotFoundError,
    SourceBusyError,
    SourceDeniedError,
    SourceNotFoundError,
    SourcePendingError,
    SourceTooLargeError,
)
from loradock_serve.lookup_limits import Bucket, Clock, Remembered
from loradock_serve.publish import Options
from loradock_serve.source_jobs import Job, Order, SourceJobs, check_allowed

log = logging.getLogger("loradock.sources")

MAX_MISSES = 10_000
MAX_KNOWN = 10_000
TROUBLE_TTL_S = 5.0
"""How long a source that did not answer is left alone."""
SLUG_CHARS = 64
PUBLISHER = "lazy"
"""Who publishes what a request named."""

Lasting = (RefusedError, SourceNotFoundError, SourceDeniedError, SourceTooLargeError)
"""What will be the same at the next request, and at the one after it."""


class LazyModels:
    """See the top of the file."""

    def __init__(
        self,
        config: SourcesConfig,
        jobs: SourceJobs,
        catalog: Catalog,
        clock: Clock = time.monotonic,
    ) -> None:
        self._config = config
        self._jobs = jobs
        self._catalog = catalog
        self._clock = clock
        self._bucket = Bucket(config.lazy_lookups_a_minute, clock)
        self._misses: Remembered[LoradockError] = Remembered(MAX_MISSES, clock)
        self._checked: Remembered[None] = Remembered(MAX_KNOWN, clock)
        """Names whose source was looked at lately."""
        self._registered: set[str] = set()
        """Names that the registry had when it was asked."""

    async def resolve(self, model: str) -> Resolved:
        """The version behind an address, fetched first where it is not here yet.

        Raises InvalidSourceError, SourceError, or RefusedError with the gate's reasons. SourcePendingError where it
        takes longer than a request waits.
        """
        ref = parse_source(model)
        check_allowed(ref, self._config.lazy, "sources.lazy")
        self._refuse_miss(ref)
        name = name_of(ref)
        if (known := await self._known(name, ref)) is not None:
            self._look_anew(name, ref)
            return replace(known, public_name=model)
        self._refuse_miss(ref)  # somebody else may have met it meanwhile
        await self._bring(self._job(name, ref), ref)
        self._note_registered(name)
        self._checked.put(name, None, self._config.lazy_recheck_s)
        await self._catalog.know(name)
        return replace(self._catalog.resolve(name), public_name=model)

    def _refuse_miss(self, ref: SourceRef) -> None:
        if (miss := self._misses.get(str(ref))) is not None:
            raise _still(*miss)

    async def _known(self, name: str, ref: SourceRef) -> Resolved | None:
        """The name's version where it is of this source and this base. Publishers may have put anything under the name,
        and what was fetched for another base is judged anew."""
        if name not in self._registered and not await self._is_registered(name) and name not in self._registered:
            return None  # the last: somebody else may have fetched it while this one asked
        try:
            await self._catalog.know(name)
            resolved = self._catalog.resolve(name)
        except ModelNotFoundError:
            self._registered.discard(name)  # removed since
            return None
        version = resolved.version
        good = version is not None and version.placement != "rejected" and _is_of(version, ref)
        return resolved if good else None

    async def _is_registered(self, name: str) -> bool:
        if not await self._catalog.has(name):
            return False
        self._note_registered(name)
        return True

    def _note_registered(self, name: str) -> None:
        if len(self._registered) >= MAX_KNOWN:
            self._registered.clear()
        self._registered.add(name)

    def _job(self, name: str, ref: SourceRef) -> Job:
        """The fetch that is under way, or a new one where the bucket has room for it."""
        order = self._order(name, ref)
        if (job := self._jobs.running(order)) is not None:
            return job
        if wait_s := self._bucket.take():
            raise SourceBusyError(
                f"Requests made this server look for {self._config.lazy_lookups_a_minute} unknown sources in a minute, "
                "as many as `sources.lazy_lookups_a_minute` allows",
                retry_after_s=math.ceil(wait_s),
            )
        job = self._jobs.ensure(order)
        job.task.add_done_callback(lambda _task: self._note(job, ref))
        return job

    def _order(self, name: str, ref: SourceRef) -> Order:
        return Order(name, ref, self._config.lazy, Options(publisher=PUBLISHER), lazy=True)

    def _note(self, job: Job, ref: SourceRef) -> None:
        """Remembers a fetch that failed, so that the next requests cost nothing."""
        if job.task.cancelled() or (error := job.task.exception()) is None:
            return
        if isinstance(error, LoradockError):
            lasting = isinstance(error, Lasting)
            self._misses.put(str(ref), error, self._config.miss_ttl_s if lasting else TROUBLE_TTL_S)

    async def _bring(self, job: Job, ref: SourceRef) -> None:
        wait_s = self._config.lazy_wait_s
        if await job.wait(wait_s) is None:
            done, total = job.watch.done_bytes, job.watch.total_bytes
            raise SourcePendingError(
                f"{ref} is being fetched, {done} of {total} bytes so far; a request waits {wait_s:g} s for it "
                "(`sources.lazy_wait_s`), and one of your next tries will find it here"
            )

    def _look_anew(self, name: str, ref: SourceRef) -> None:
        """Has a branch looked at once in a while. What is there now answers meanwhile, and stays if this fails."""
        if ref.is_fixed or self._checked.get(name) is not None or self._bucket.take():
            return
        self._checked.put(name, None, self._config.lazy_recheck_s)
        try:
            job = self._jobs.ensure(self._order(name, ref))
        except SourceBusyError:
            log.info("%s is not looked at anew now: too many fetches", ref)
            return
        job.task.add_done_callback(lambda task: task.cancelled() or task.exception())


def name_of(ref: SourceRef) -> str:
    """The name that a source is registered under: for people its words, for uniqueness a part of its hash."""
    text = str(ref)
    slug = re.sub(r"[^a-z0-9._]+", "-", f"{'-'.join(ref.parts)}-{ref.revision or ''}".lower()).strip("-.")
    return f"{ref.scheme}--{slug[:SLUG_CHARS]}--{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _is_of(version: Version, ref: SourceRef) -> bool:
    return version.source is not None and version.source.rpartition("@")[0] == ref.address


def _still(error: LoradockError, left_s: float) -> LoradockError:
    """A remembered error as it is raised once more: with the time that is left of it."""
    if hasattr(error, "retry_after_s"):
        error.retry_after_s = max(1, math.ceil(left_s))
    return error.with_traceback(None)
