"""From what a request calls a model to the version that answers, and what `/v1/models` shows.

`base` and the last part of the base's id are the base; everything else is looked up in the registry, through a small
cache that every change of a name clears, also one that another gateway on the same registry made. Knows nothing of
engines but the states it is told.
"""

import asyncio
import difflib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from loradock_adapters.errors import InvalidNameError, NotFoundError, RegistryUnavailableError
from loradock_adapters.names import ModelRef, parse_ref
from loradock_adapters.registry import Registry, Version
from loradock_serve.engine_command import BASE_NAME
from loradock_serve.errors import ConflictError, ModelNotFoundError, ProofFailedError, UnfitError, WrongTaskError
from loradock_serve.proof import Proof, is_proven
from loradock_serve.rewrite import CHAT, CLASSIFY, COMPLETIONS, Behaviour
from loradock_serve.shares import pick

log = logging.getLogger("loradock.gateway")

MAX_CACHED = 4096
LOOKUPS = 4
LOOKUP_TIMEOUT_S = 10.0
KNOWN_TIMEOUT_S = 2.0
"""For a name of which is known what it meant before."""
LATE_S = 0.2
"""How long after its time an answer is waited for yet: it is there already where this process itself stood still."""
AWAY_S = 5.0
"""How long a database that did not answer is not asked again about such names."""
LOOK_EVERY_S = 0.001
"""Less than it takes to hear that a push is done and to send a request."""
NEAR_NAMES = 3
MAX_REF_CHARS = 200
"""No name with a digest behind it is longer; what is longer is like none."""


@dataclass(frozen=True)
class Resolved:
    """A model as a request named it."""

    public_name: str
    version: Version | None
    """None: the base itself."""
    behaviour: Behaviour
    split: "Split | None" = None
    """Who answers instead of `version`, the current one, while the name's traffic is split."""

    @property
    def is_adapter(self) -> bool:
        """Whether it runs on the base's engine as one of its adapters."""
        return self.version is not None and self.version.placement == "shared"

    @property
    def engine_name(self) -> str:
        """What the engine calls it."""
        return BASE_NAME if self.version is None else self.version.digest


@dataclass(frozen=True)
class Split:
    """How the traffic of a name is shared out."""

    weights: tuple[tuple[int, int], ...]
    """(number, weight) of each version."""
    versions: Mapping[int, Resolved]

    @classmethod
    def of(cls, shares: Sequence[tuple[Resolved, int]]) -> "Split | None":
        """None where nothing is split."""
        found = [(share.version.number, weight, share) for share, weight in shares if share.version is not None]
        if not found:
            return None
        return cls(tuple((n, weight) for n, weight, _ in found), {n: share for n, _, share in found})


class Catalog:
    """Names to versions. Reads come from the event loop; changes go through `changed()`."""

    def __init__(
        self,
        registry: Registry,
        base_name: str,
        base_behaviour: Behaviour,
        fit: Callable[[Version], Version] = lambda version: version,
    ) -> None:
        """`fit` gives a version as this server can serve it today (`fit.py`)."""
        self.base_name = base_name
        self._registry = registry
        self._base = base_behaviour
        self.fit = fit
        self._cache: dict[str, Resolved] = {}
        self._misses: dict[str, list[str]] = {}
        self._last_known: dict[str, Resolved] = {}
        """What names meant before the last changes, for while the database is away."""
        self._away_until_s = 0.0
        self._lookups: dict[tuple[str, int], asyncio.Task[Resolved]] = {}
        """Under way: a model, and `_changes` before the lookup began. Who comes after a change joins none of these: it
        may have read what was there before."""
        self._threads = ThreadPoolExecutor(LOOKUPS, "loradock-names")
        self._searching = threading.Lock()
        self._generation = -1
        self._changes = 0
        """That this catalog knows of, its own server's and others'. The registry's generation would not do: of an own
        change it may tell late (PostgreSQL's notices), or not at all for a while."""
        self._looked_at_s = -math.inf
        self._created = int(time.time())
        self.on_change: Callable[[], None] = lambda: None
        """Called whenever a name points elsewhere."""

    @property
    def base_names(self) -> tuple[str, ...]:
        """Every name that the base answers under."""
        return (self.base_name, BASE_NAME) if self.base_name != BASE_NAME else (BASE_NAME,)

    def changed(self, *names: str) -> None:
        """Names point elsewhere now. Those that this server changed itself are given: what they meant before is no
        guess any more, whatever becomes of the database."""
        self._last_known |= self._cache
        if names:
            self._last_known = {
                model: known for model, known in self._last_known.items() if model.partition("@")[0] not in names
            }
        for model in list(self._last_known)[: max(0, len(self._last_known) - MAX_CACHED)]:
            del self._last_known[model]
        self._cache.clear()
        self._misses.clear()
        self._changes += 1
        self.on_change()

    async def know(self, model: str) -> None:
        """Have the registry asked what `model` is, in a thread, so that `resolve` need not wait for a database.

        Raises ModelNotFoundError; RegistryUnavailableError or what the database raised, for a name that was never
        asked for before: what others mean was seen, and that counts until the database is back.
        """
        self._look_for_changes()
        if model in self._cache or model in self.base_names or self._guess(model) is not None:
            return
        changes = self._changes
        task = self._lookups.get((model, changes))
        if task is None:
            task = self._lookups[model, changes] = asyncio.create_task(self._look_up_in_thread(model))
            task.add_done_callback(lambda done: self._looked_up(model, changes, done))
        was_known = model in self._last_known
        timeout_s = KNOWN_TIMEOUT_S if was_known else LOOKUP_TIMEOUT_S
        try:
            resolved = await _within(timeout_s, task)
        except (SQLAlchemyError, TimeoutError) as error:
            was_here = time.monotonic() >= self._away_until_s
            self._away_until_s = time.monotonic() + AWAY_S
            if self._guess(model) is not None:
                if was_here:  # once, and not for each request that waited for the same
                    told = "the registry does not say what %r is (%s): names mean what they last did, for %g s"
                    log.warning(told, model, type(error).__name__, AWAY_S)
                return
            if isinstance(error, SQLAlchemyError):
                raise
            if was_known and model not in self._last_known:  # this server moved it meanwhile: it counts as a new one
                await self.know(model)
                return
            raise RegistryUnavailableError(
                f"The registry's database has not said within {timeout_s:g} s what {model!r} is", retry_after_s=5
            ) from error
        self._look_for_changes()
        if self._changes == changes:
            self._remember(model, resolved)

    async def find(self, model: str) -> Resolved:
        """`know`, then `resolve`. For what is known already nobody looks for changes by others more often than every
        `LOOK_EVERY_S`: each look is a few system calls."""
        if (now_s := time.monotonic()) - self._looked_at_s > LOOK_EVERY_S:
            self._looked_at_s = now_s
            self._look_for_changes()
        if (known := self._cache.get(model) or self._guess(model)) is not None:
            return known
        await self.know(model)
        return self.resolve(model)

    async def has(self, name: str) -> bool:
        """Whether there is such a name, by one look into the registry: `know` would search near names where not."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._registry.resolve, ModelRef(name))
        except NotFoundError:
            return False
        return True

    def resolve(self, model: str) -> Resolved:
        """The version behind `model`; ModelNotFoundError with near names where there is none."""
        self._look_for_changes()
        if (known := self._cache.get(model) or self._guess(model)) is not None:
            return known
        resolved = Resolved(model, None, Behaviour()) if model in self.base_names else self._look_up(model)
        self._remember(model, resolved)
        return resolved

    def _look_for_changes(self) -> None:
        if (generation := self._registry.generation()) != self._generation:
            self.changed()
            self._generation = generation

    def _remember(self, model: str, resolved: Resolved) -> None:
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[model] = resolved

    def _guess(self, model: str) -> Resolved | None:
        """What a name meant when it was seen last, shortly after the database did not answer; else None."""
        return self._last_known.get(model) if time.monotonic() < self._away_until_s else None

    async def _look_up_in_thread(self, model: str) -> Resolved:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, model)

    def _looked_up(self, model: str, changes: int, done: asyncio.Task[Resolved]) -> None:
        del self._lookups[model, changes]
        if not done.cancelled() and isinstance(done.exception(), ModelNotFoundError):
            self._last_known.pop(model, None)

    def route(self, resolved: Resolved, caller: Callable[[], str | None]) -> Resolved:
        """What a request is answered by: while the name's traffic is split, the version that is its caller's.

        `caller` is only asked then; who has none gets any version, each time anew.
        """
        if resolved.split is None or resolved.version is None:
            return resolved
        who = caller()
        who = f"caller {who}" if who is not None else f"nobody {random.getrandbits(64)}"
        return resolved.split.versions[pick(resolved.version.name, resolved.split.weights, who)]

    def resolve_to_answer(self, model: str) -> Resolved:
        """As `resolve`, where the version is to answer; UnfitError where it cannot on this server."""
        resolved = self.resolve(model)
        refuse_unfit(resolved.version)
        return resolved

    def _look_up(self, model: str) -> Resolved:
        try:
            ref = parse_ref(model)
            if ref.pin is not None:
                return self._resolved(model, self._registry.resolve(ref))
            route = self._registry.route(ref.name)
        except (InvalidNameError, NotFoundError):
            raise ModelNotFoundError(model, self._near(model)) from None
        shares = [(self._resolved(model, version), weight) for version, weight in route.shares]
        return replace(self._resolved(model, route.current), split=Split.of(shares))

    def _resolved(self, model: str, version: Version) -> Resolved:
        version = self.fit(version)
        return Resolved(model, version, self._behaviour(version))

    def _near(self, model: str) -> list[str]:
        if len(model) > MAX_REF_CHARS:
            return []
        near = self._misses.get(model)
        # Among thousands of names a search takes a tenth of a second, and clients repeat their mistakes. One at a time:
        # who comes meanwhile is told of none, so that a flood of unknown names takes no thread from the known ones.
        if near is None and self._searching.acquire(blocking=False):
            try:
                names = [*self.base_names, *(version.name for version in self._registry.models())]
                near = difflib.get_close_matches(model, names, n=NEAR_NAMES, cutoff=0.5)
            finally:
                self._searching.release()
            if len(self._misses) >= MAX_CACHED:
                self._misses.clear()
            self._misses[model] = near
        return near or []

    def _behaviour(self, version: Version) -> Behaviour:
        if version.placement == "dedicated":
            return Behaviour()  # its own engine reads its own template and generation config
        # What equals the base's needs no saying; the engine then does as it does for the base.
        template = version.chat_template if version.chat_template != self._base.chat_template else None
        stops = tuple(token for token in version.stop_token_ids if token not in self._base.stop_token_ids)
        return Behaviour(template, stops)

    def check_free(self, name: str) -> None:
        """ConflictError where `name` belongs to the base."""
        if name in self.base_names:
            raise ConflictError(f"{name!r} is the base's own name on this server; choose another")

    def current(self) -> list[Version]:
        """Every name's current version, as this server can serve it. Asks the registry."""
        return [self.fit(version) for version in self._registry.models()]

    def cards(
        self, current: Sequence[Version], base_state: str, state_of: Callable[[Version], str]
    ) -> list[dict[str, Any]]:
        """All entries of `/v1/models`, the base first."""
        return [
            self.base_card(base_state),
            *(version_card(version, version.name, state_of(version)) for version in current),
        ]

    def base_card(self, state: str) -> dict[str, Any]:
        """The base's entry."""
        about: dict[str, Any] = {"kind": "base", "placement": "shared", "version": None, "digest": None, "state": state}
        about["aliases"] = [name for name in self.base_names if name != self.base_name]
        return _card(self.base_name, self._created, about)


async def _within(timeout_s: float, task: asyncio.Task[Resolved]) -> Resolved:
    """What the task returns or raises, else TimeoutError. It goes on in any case."""
    if not (await asyncio.wait([task], timeout=timeout_s))[0]:
        await asyncio.wait([task], timeout=LATE_S)
    if not task.done():
        raise TimeoutError
    return task.result()


def refuse_unfit(version: Version | None) -> None:
    """UnfitError where this server cannot serve the version, ProofFailedError where it does not answer as it must."""
    if version is None:
        return
    if version.placement == "rejected":
        raise UnfitError(f"{version.name!r} version {version.number}", version.reasons[0])
    if is_proven(version.proof):
        return
    proof = Proof.from_json(version.proof)
    if proof is not None and proof.state == "failed" and proof.reason is not None:
        raise ProofFailedError(f"{version.name!r} version {version.number}", proof.reason)


def is_classifier(version: Version) -> bool:
    """Whether it has a classification head: its engine answers `/classify`, and writes no text."""
    return any(reason.code == "classification_head" for reason in version.reasons)


def refuse_wrong_task(version: Version | None, name: str, path: str) -> None:
    """WrongTaskError where it is known that no engine of this model has the path: none need be started to say so."""
    if version is None:
        return
    if is_classifier(version) and path != CLASSIFY:
        raise WrongTaskError(
            f"{name!r} is a classifier: it writes no text and has no {path}; ask POST {CLASSIFY} "
            '{"model": …, "input": "a text, or a list of texts"}'
        )
    if path == CLASSIFY and version.kind == "lora":
        raise WrongTaskError(
            f"{name!r} writes text and has no classes: ask POST {CHAT} or {COMPLETIONS} (a classifier is trained with "
            "task.kind sequence_classification)"
        )


def version_card(version: Version, name: str, state: str) -> dict[str, Any]:
    """One entry of `/v1/models`."""
    about = {
        "kind": version.kind,
        "placement": version.placement,
        "version": version.number,
        "digest": version.digest,
        "source": version.source,
        "state": state,
    }
    return _card(name, int(version.created_at.timestamp()), about)


def _card(name: str, created: int, about: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "loradock", "loradock": about}


def reasons_json(reasons: Sequence[Any]) -> list[dict[str, str]]:
    """A verdict's reasons as they stand in answers."""
    return [reason.to_json() for reason in reasons]


def split_json(split: Mapping[int, int]) -> dict[str, int] | None:
    """A split's weights as they stand in answers; null where there is none."""
    return {str(number): weight for number, weight in sorted(split.items())} or None
