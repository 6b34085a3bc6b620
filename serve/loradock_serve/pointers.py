"""Where names point: promoting, rolling back, tagging, splitting traffic, and removing versions or names.

Every move is one transaction of the registry; a request follows the name once, when it comes, and stays with the
version that it found. One change of a name at a time, publishes included. Knows nothing of HTTP requests.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from loradock_adapters.names import ModelRef, check_name, check_tag, parse_pin
from loradock_adapters.registry import Registry, Version
from loradock_serve.catalog import Catalog, refuse_unfit
from loradock_serve.errors import ConflictError
from loradock_serve.fleet import Fleet
from loradock_serve.turns import Turns

log = logging.getLogger("loradock.publish")


@dataclass(frozen=True)
class Moved:
    """What a move of a pointer did."""

    version: Version
    """The one that it points at now."""
    before: int | None
    """The number that it pointed at before; None where there was no such pointer."""
    ended_split: Mapping[int, int]
    """The weights of a split that the move ended; empty where there was none."""


class Pointers:
    """See the top of the file. `turns` is shared with whoever publishes."""

    def __init__(self, registry: Registry, catalog: Catalog, fleet: Fleet, turns: Turns) -> None:
        self._registry = registry
        self._catalog = catalog
        self._fleet = fleet
        self._turns = turns

    async def promote(self, name: str, pin: str) -> Moved:
        """Point a name at one of its versions: a number, a tag or a digest. Ends its split. NotFoundError."""
        async with self._turns.of(check_name(name)):
            version = await self._version(parse_pin(name, pin))
            return await self._point(version)

    async def roll_back(self, name: str, number: int | None) -> Moved:
        """Point a name at one of its versions, by default the one published before the current one. Ends its split.

        Raises NotFoundError; ConflictError where no version is older.
        """
        async with self._turns.of(check_name(name)):
            if number is not None:
                return await self._point(await self._version(ModelRef(name, version=number)))
            versions = await asyncio.to_thread(self._registry.versions, name)
            current = next(version for version in versions if version.current)
            older = [version for version in versions if version.number < current.number]
            if not older:
                raise ConflictError(f"{current.ref} is the oldest version of {name} that is left: nothing is before it")
            return await self._point(older[0])

    async def tag(self, name: str, tag: str, pin: str | None) -> Moved:
        """Put a tag on one of a name's versions, the current one where none is pinned. NotFoundError."""
        check_tag(tag)
        async with self._turns.of(check_name(name)):
            version = await self._version(ModelRef(name) if pin is None else parse_pin(name, pin))
            before = await asyncio.to_thread(self._registry.tags.set, name, tag, version.number)
            self._catalog.changed(name)
        log.info("%s@%s is version %d now", name, tag, version.number)
        return Moved(version, before, {})

    async def untag(self, name: str, tag: str) -> bool:
        """Forget a tag; False if there was none. NotFoundError for a name that is not there."""
        check_tag(tag)
        async with self._turns.of(check_name(name)):
            await self._version(ModelRef(name))
            had_it = await asyncio.to_thread(self._registry.tags.remove, name, tag)
            self._catalog.changed(name)
        return had_it

    async def split(self, name: str, weights: Mapping[int, int]) -> Mapping[int, int]:
        """Share out the traffic that follows a name; returns how it was. NotFoundError, UsageError, UnfitError."""
        async with self._turns.of(check_name(name)):
            for number in weights:
                version = await self._version(ModelRef(name, version=number))
                refuse_unfit(self._catalog.fit(version))
            before = await asyncio.to_thread(self._registry.splits.set, name, weights)
            self._catalog.changed(name)
        log.info("traffic of %s: %s", name, shown(weights))
        return before

    async def end_split(self, name: str) -> Moved:
        """Send all that follows a name to its current version again. NotFoundError."""
        async with self._turns.of(check_name(name)):
            current = await self._version(ModelRef(name))
            ended = await asyncio.to_thread(self._registry.splits.remove, name)
            self._catalog.changed(name)
        if ended:
            log.info("traffic of %s: all to version %d", name, current.number)
        return Moved(current, current.number, ended)

    async def remove(self, name: str) -> list[Version]:
        """Forget a name and all its versions; engines let go of what no other name uses. NotFoundError."""
        async with self._turns.of(check_name(name)):
            removed = await asyncio.to_thread(self._registry.delete, name)
            await self._let_go(removed)
        log.info("removed %s", name)
        return removed

    async def remove_version(self, name: str, pin: str) -> Version:
        """Forget one version of a name, that nothing points at. NotFoundError, InUseError."""
        async with self._turns.of(check_name(name)):
            version = await self._version(parse_pin(name, pin))
            removed = await asyncio.to_thread(self._registry.delete_version, name, version.number)
            await self._let_go([removed])
        log.info("removed %s", removed.ref)
        return removed

    async def _version(self, ref: ModelRef) -> Version:
        return await asyncio.to_thread(self._registry.resolve, ref)

    async def _point(self, version: Version) -> Moved:
        name = version.name
        before = await self._version(ModelRef(name))
        ended = await asyncio.to_thread(self._registry.splits.of, name)
        version = await asyncio.to_thread(self._registry.set_current, name, version.number)
        self._catalog.changed(name)
        log.info("%s points at version %d now%s", name, version.number, ", and is split no more" if ended else "")
        return Moved(version, before.number, ended)

    async def _let_go(self, removed: list[Version]) -> None:
        self._catalog.changed(*{version.name for version in removed})
        used = await asyncio.to_thread(self._registry.digests)
        for digest in {version.digest for version in removed} - used:
            await self._fleet.forget(digest)


def shown(weights: Mapping[int, int]) -> str:
    """Weights as the command line takes them."""
    return " ".join(f"{number}={weight}" for number, weight in sorted(weights.items()))
