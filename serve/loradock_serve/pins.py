"""Names whose adapter keeps its slot: `loradock pin`.

The registry remembers the names. Here each name's current version is held in a slot, on whichever start of the engine:
one task for each, which loads the adapter, has a slot kept for it (what requests may use shrinks first, and what is in
flight drains), and only then has the engine pin it. A name that moves to another version takes its pin along.
Does not know HTTP; how slots are kept is the business of whoever gives requests their turn (`SlotKeeper`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.errors import CorruptBlobError, StoreUnavailableError
from loradock_adapters.registry import Registry, Version
from loradock_serve.catalog import Catalog
from loradock_serve.engine import EngineStart
from loradock_serve.errors import ConflictError, EngineError, EngineUnavailableError, PinLimitError, UnfitError
from loradock_serve.fleet import Fleet

log = logging.getLogger("loradock.pins")

LOOK_EVERY_S = 1.0
"""How soon a restarted engine, or another gateway's change, is noticed."""
TRY_AGAIN_S = 1.0
LOAD_TIMEOUT_S = 3600.0

PinState = Literal["held", "waiting"]


class SlotKeeper(Protocol):
    """Whoever decides which requests go to the base's engine (`turnstile.py`)."""

    async def pin(self, adapter: str) -> None:
        """Returns once requests use no more slots than are left beside this adapter's; it stays so until `unpin`."""

    def unpin(self, adapter: str) -> None:
        """Requests may use the slot again, whether or not `pin` has returned."""


@dataclass
class _Hold:
    """One pinned version on its way into a slot, or there."""

    version: Version
    task: asyncio.Task[None] | None = None
    """Ends when it is held, or will not be."""
    asked: EngineStart | None = None
    asking: asyncio.Task[None] | None = None
    """The start that was asked to pin it, and the question, which goes on when this is let go of: an engine does not
    stop pinning because nobody waits for it."""
    start: EngineStart | None = None
    """The start of the engine that holds it; None until it does."""
    trouble: str | None = None
    """Why it is not held yet, as far as that is known."""

    @property
    def gave_up(self) -> bool:
        """The engine will not have it; whoever pins again has it tried again."""
        return self.start is None and self.task is not None and self.task.done()


class Pins:
    """See the top of the file. One owner of what is pinned; everything runs on one event loop."""

    def __init__(
        self,
        registry: Registry,
        catalog: Catalog,
        fleet: Fleet,
        slots: Callable[[], int | None],
        keeper: SlotKeeper,
    ) -> None:
        """`slots`: how many the base's engine has, None where that is not known."""
        self._registry = registry
        self._catalog = catalog
        self._fleet = fleet
        self._slots = slots
        self._keeper = keeper
        self._names: dict[str, Version] = {}
        self._holds: dict[str, _Hold] = {}
        self._releases: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()
        self._generation = -1
        self._seen_slots: int | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to hold what is pinned."""
        self._catalog.on_change = self._news.set
        self._task = asyncio.create_task(self._watch(), name="pins")

    async def stop(self) -> None:
        """Let go of nothing in the engine: it ends too."""
        tasks = [task for task in (self._task, *(hold.task for hold in self._holds.values())) if task is not None]
        tasks += [hold.asking for hold in self._holds.values() if hold.asking is not None]
        tasks += self._releases.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def digests(self) -> set[str]:
        """Of the pinned names' present versions."""
        return {version.digest for version in self._names.values()}

    def state_of(self, name: str) -> tuple[PinState | None, str | None]:
        """Whether a name's adapter is held in a slot, or waits for one and, where that is known, why."""
        version = self._names.get(name)
        if version is None:
            return None, None
        hold = self._holds.get(version.digest)
        if hold is None:
            return "waiting", _why_not(version) or "there are more pins than slots to keep"
        return ("held", None) if hold.start is not None else ("waiting", hold.trouble)

    async def pin(self, name: str, wait_s: float) -> Version:
        """Pin a name, and wait so long until its adapter is in its slot. Pinning it twice is pinning it once.

        Raises:
            ModelNotFoundError: There is no such name; with near ones.
            ConflictError: It is the base, or has an engine of its own.
            UnfitError: It was pushed for another base.
            PinLimitError: One slot must stay free for all others.
        """
        await self._catalog.know(name)
        version = self._catalog.resolve_to_answer(name).version
        if version is None:
            raise ConflictError(f"{name!r} is the base of this server: it is always in memory and needs no pin")
        if version.placement == "dedicated":
            raise ConflictError(f"{name!r} has an engine of its own: only adapters that share the base's have slots")
        async with self._turn:
            await self._check_room(name)
            await asyncio.to_thread(self._registry.pin, name)
            if (hold := self._holds.get(version.digest)) is not None and hold.gave_up:
                del self._holds[version.digest]
            await self._read()
        hold = self._holds.get(version.digest)
        if hold is not None and hold.task is not None:
            await asyncio.wait([hold.task], timeout=wait_s)
        return version

    async def unpin(self, name: str) -> bool:
        """Let a name's adapter leave its slot when another needs it; False if it was not pinned.

        Raises:
            ModelNotFoundError: There is no such name; with near ones.
        """
        await self._catalog.know(name)
        self._catalog.resolve(name)
        async with self._turn:
            was_pinned = await asyncio.to_thread(self._registry.unpin, name)
            await self._read()
        return was_pinned

    async def _check_room(self, name: str) -> None:
        slots = self._slots()
        if slots is None:
            raise ConflictError("How many slots the attached engine has is not known, so nothing can be pinned there")
        pinned = [version.name for version in await asyncio.to_thread(self._registry.pins)]
        if name not in pinned and len(pinned) >= slots - 1:
            raise PinLimitError(slots, pinned)

    async def _watch(self) -> None:
        while True:
            self._news.clear()
            try:
                async with self._turn:
                    await self._read()
            except SQLAlchemyError as error:  # away for a moment, perhaps
                log.warning("what is pinned could not be read: %s", error)
                self._generation = -1  # look again in any case
            await self._changed()

    async def _changed(self) -> None:
        """Returns when pins may have to be looked at: a name moved, here or elsewhere, or the engine started anew."""
        while not self._news.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):  # Python 3.11's wait_for may swallow the end of this task
                    await self._news.wait()
            current = self._fleet.base.current
            anew = any(hold.start is not None and hold.start is not current for hold in self._holds.values())
            if anew or self._slots() != self._seen_slots or self._registry.generation() != self._generation:
                return

    async def _read(self) -> None:
        """Look what is pinned, hold what is not held, and let go of what is held and pinned no more."""
        self._generation, self._seen_slots = self._registry.generation(), self._slots()
        pinned = await asyncio.to_thread(self._registry.pins)
        self._names = {version.name: self._catalog.fit(version) for version in pinned}
        current = self._fleet.base.current
        wanted = self._wanted()
        for digest, hold in list(self._holds.items()):
            if digest not in wanted or (hold.start is not None and hold.start is not current):
                self._let_go(digest, hold, at_all=digest not in wanted)
        for digest, version in wanted.items():
            if digest not in self._holds:
                hold = self._holds[digest] = _Hold(version)
                hold.task = asyncio.create_task(self._hold(hold), name=f"pin of {version.name}")
                hold.task.add_done_callback(_tell)

    def _wanted(self) -> dict[str, Version]:
        """Digest -> version, as many as leave a slot free: the names that were pinned first."""
        able = {version.digest: version for version in self._names.values() if _why_not(version) is None}
        slots = self._slots()
        return dict(list(able.items())[: max(0, slots - 1)]) if slots is not None else {}

    async def _hold(self, hold: _Hold) -> None:
        """Into a slot, however long that takes."""
        version = hold.version
        while True:
            try:
                start = await self._fleet.keep_loaded(version, LOAD_TIMEOUT_S)
                hold.trouble = "requests in flight use all slots; one of them has to end first"
                await self._keeper.pin(version.digest)
                hold.trouble = None
                if (release := self._releases.get(version.digest)) is not None:
                    await asyncio.wait([release])  # of an earlier pin: it must not undo this one
                hold.asked, hold.asking = start, asyncio.create_task(start.client.pin_adapter(version.digest))
                hold.asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # it was heard
                await asyncio.shield(hold.asking)
            except (EngineUnavailableError, StoreUnavailableError) as error:
                hold.trouble = str(error)
                await asyncio.sleep(TRY_AGAIN_S)
            except SQLAlchemyError as error:
                hold.trouble = "the registry's database does not answer"
                log.warning("%s waits for the registry: %s", version.ref, error)
                await asyncio.sleep(TRY_AGAIN_S)
            except (EngineError, ConflictError, CorruptBlobError) as error:
                hold.trouble, hold.asked = str(error), None
                log.warning("%s cannot be pinned: %s", version.ref, error)
                self._keeper.unpin(version.digest)  # a slot that it does not get is not kept from all others
                return
            else:
                hold.start = start
                log.info("%s is pinned to a slot", version.ref)
                return

    def _let_go(self, digest: str, hold: _Hold, *, at_all: bool) -> None:
        """`at_all`: it is pinned no more; else its engine is gone, and a new one has to take it."""
        del self._holds[digest]
        if hold.task is not None:
            hold.task.cancel()
        if not at_all:
            return
        self._keeper.unpin(digest)
        if hold.asked is not None and hold.asked is self._fleet.base.current:
            # One at a time for a digest: whoever pins it again asks the engine after this.
            release = self._releases[digest] = asyncio.create_task(self._release(hold.asked, hold))
            release.add_done_callback(lambda _done: self._releases.pop(digest, None))

    async def _release(self, start: EngineStart, hold: _Hold) -> None:
        if hold.asking is not None:
            await asyncio.wait([hold.asking])
        # An engine that is gone, or has unloaded the adapter, holds no pin any more.
        with contextlib.suppress(EngineError):
            await start.client.unpin_adapter(hold.version.digest)
            log.info("%s is pinned no more", hold.version.ref)


def _tell(task: asyncio.Task[None]) -> None:
    """What nobody thought of must not end a pin in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=error)


def _why_not(version: Version) -> str | None:
    """Why a pinned name's present version cannot have a slot."""
    if version.placement == "shared":
        return None
    if version.placement == "dedicated":
        return f"version {version.number} has an engine of its own"
    return str(UnfitError(f"version {version.number}", version.reasons[0]))
