"""From uploaded blobs to a version that answers: gate, proof by the engine, registry; the pointer moves last.

A refused or broken upload is visible nowhere: the version's directory goes again, and no name has changed. One
publish of a name at a time. Knows nothing of HTTP requests.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loradock_adapters.base import BaseModel
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.checkpoint import Checkpoint, read_checkpoint
from loradock_adapters.engine_rules import EngineLimits
from loradock_adapters.errors import DigestMismatchError, RefusedError
from loradock_adapters.findings import Findings
from loradock_adapters.gate import Verdict, judge
from loradock_adapters.manifest import Manifest
from loradock_adapters.names import check_name
from loradock_adapters.problems import Problem
from loradock_adapters.registry import Details, Registry, Version
from loradock_adapters.store import LocalStore
from loradock_adapters.uploads import Uploads
from loradock_serve.auth import ANONYMOUS
from loradock_serve.catalog import Catalog, reasons_json, split_json
from loradock_serve.errors import BadRequestError, EngineRefusedError, EngineUnavailableError
from loradock_serve.fleet import Fleet
from loradock_serve.metrics import PUBLISHES
from loradock_serve.proof import Proof, unproven
from loradock_serve.prover import Prover
from loradock_serve.repairs import Mended, mend
from loradock_serve.turns import Turns

log = logging.getLogger("loradock.publish")

PUBLISHERS = 8
"""Publishes whose files are looked at, or sent to the store, at the same moment; more wait."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Published:
    """What became of a publish."""

    version: Version
    proof: Proof
    """What an engine has shown about it."""
    current_number: int
    """The version that the name points at: another one where these bytes were there already, or traffic is split."""
    split: Mapping[int, int]
    """The weights of the name's split; empty where it has none."""

    def to_json(self) -> dict[str, Any]:
        """As the HTTP API answers it."""
        version = self.version
        return {
            "name": version.name,
            "version": version.number,
            "digest": version.digest,
            "kind": version.kind,
            "placement": version.placement,
            "reasons": reasons_json(version.reasons),
            "repairs": reasons_json(version.repairs),
            "created": version.created,
            "source": version.source,
            "current_version": self.current_number,
            "split": split_json(self.split),
            "state": "ready" if self.proof.state == "proven" else "unproven",
            "proof": self.proof.to_json(),
        }


@dataclass(frozen=True)
class Options:
    """What a publish can be told beside its files."""

    force: bool = False
    """Publish what the gate would refuse only because it is of no use."""
    publisher: str = ANONYMOUS
    """Who publishes."""
    source: str | None = None
    """Where this server fetched the files from, with the commit."""

    @classmethod
    def of(cls, document: Mapping[str, Any], publisher: str) -> "Options":
        """The options in a publish's document. Raises BadRequestError."""
        if unknown := sorted(document.keys() - {"files", "force"}):
            raise BadRequestError(f"A publish has no such option: {', '.join(map(ascii, unknown[:5]))}", param="files")
        force = document.get("force", False)
        if not isinstance(force, bool):
            raise BadRequestError("`force` is true or false", param="force")
        return cls(force, publisher)


class Publisher:
    """See the top of the file."""

    def __init__(
        self,
        store: LocalStore,
        uploads: Uploads,
        registry: Registry,
        catalog: Catalog,
        fleet: Fleet,
        base: BaseModel,
        limits: EngineLimits,
        identity: BaseIdentity,
        prover: Prover,
        weights_hash: Callable[[], str | None] = lambda: None,
        base_dir: Path | None = None,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._registry = registry
        self._catalog = catalog
        self._fleet = fleet
        self._base = base
        self._limits = limits
        self._identity = identity
        self._prover = prover
        self._weights_hash = weights_hash
        self._base_dir = base_dir
        # Of its own: gigabytes are read here, and a store that does not answer is waited for.
        self._threads = ThreadPoolExecutor(PUBLISHERS, "loradock-publish")
        self.turns = Turns()
        """One change of a name at a time: for whoever moves names besides publishing."""

    async def publish(self, name: str, document: Mapping[str, Any], publisher: str = ANONYMOUS) -> Published:
        """Publish the manifest in `document` as the next version of `name`.

        Raises InvalidNameError, ConflictError, ManifestError, MissingBlobsError, or RefusedError with the gate's
        problems.
        """
        self.check_name(name)
        options = Options.of(document, publisher)
        return await self.publish_manifest(name, Manifest.from_json(document), options)

    def describe_base(self) -> dict[str, Any]:
        """What the gate goes by here, as the HTTP API answers it."""
        told = {"name": self._identity.name, "identity": self._identity.to_json(), "limits": self._limits.to_json()}
        return told | self._base.to_json()

    def check_name(self, name: str) -> None:
        """Raises InvalidNameError or ConflictError where nothing can be published under `name`."""
        check_name(name)
        self._catalog.check_free(name)

    async def publish_manifest(self, name: str, manifest: Manifest, options: Options) -> Published:
        """Publish files that are in the store. Raises as `publish`."""
        self.check_name(name)
        # A name's versions in the order of their arrival; and nobody discards a directory that another one judges.
        async with self.turns.of(name), self.turns.of(manifest.digest):
            try:
                with self._uploads.publishing(manifest.blobs):
                    published = await self._publish(name, manifest, options)
            except (RefusedError, DigestMismatchError):
                await asyncio.to_thread(self._uploads.refused, options.publisher, manifest, self._registry.blobs)
                raise
            # What a repair replaced is in no version: it expires as what nobody published.
            kept = await asyncio.to_thread(self._registry.manifest, published.version)
            await asyncio.to_thread(self._uploads.published, kept.blobs)
            return published

    async def _publish(self, name: str, manifest: Manifest, options: Options) -> Published:
        version: Version | None = None
        directory = await self._in_thread(self._store.materialise, manifest)
        try:
            judge_files = partial(self._judge, options.force)
            parts = (self._store, manifest, directory, self._base, self._base_dir, judge_files)
            mended = await self._in_thread(mend, *parts)
            if mended.manifest.digest == manifest.digest:
                version, proof = await self._publish_mended(name, mended, options)
            else:  # a repaired upload needs no repair, so nobody who holds its turn waits for another's
                with self._uploads.publishing(mended.manifest.blobs):
                    async with self.turns.of(mended.manifest.digest):
                        version, proof = await self._publish_mended(name, mended, options)
        except RefusedError:
            PUBLISHES.labels("rejected").inc()
            raise
        finally:
            if version is None or version.digest != manifest.digest:
                await self._forget_unless_used(manifest.digest)
        self._catalog.changed(name)
        PUBLISHES.labels(version.placement).inc()
        if version.created:
            log.info("published %s@%d (%s, %s)", name, version.number, version.placement, version.digest)
        route = await asyncio.to_thread(self._registry.route, name)
        weights = {share.number: weight for share, weight in route.shares}
        return Published(version, proof, route.current.number, weights)

    async def _publish_mended(self, name: str, mended: Mended, options: Options) -> tuple[Version, Proof]:
        """What is left of a publish once nothing more is changed about its files."""
        manifest = mended.manifest
        version: Version | None = None
        directory = await self._in_thread(self._store.materialise, manifest)
        try:
            checkpoint, verdict = await self._in_thread(self._judge, options.force, directory, mended.findings)
            proof = await self._prove(manifest.digest, checkpoint, verdict, options)
            details = replace(Details.of(checkpoint), repairs=mended.repairs, proof=proof.to_json())
            details = replace(details, publisher=options.publisher, source=options.source)
            await self._in_thread(self._store.secure, manifest)  # before anybody, here or elsewhere, can name it
            register = partial(self._registry.publish, name, manifest, verdict, details, self._identity)
            version = await _to_its_end(asyncio.to_thread(register))
            return version, proof
        finally:
            if version is None:
                await self._forget_unless_used(manifest.digest)

    async def _forget_unless_used(self, digest: str) -> None:
        if digest not in await asyncio.to_thread(self._registry.digests):
            # Requests of a name that was removed may still run on it: then a collection frees it later.
            in_use = self._fleet.use_of(digest) is not None
            await self._fleet.forget(digest)
            if not in_use:
                await asyncio.to_thread(self._store.discard_version, digest)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _judge(self, force: bool, directory: Path, found: Findings) -> tuple[Checkpoint, Verdict]:
        checkpoint = read_checkpoint(directory)
        base = self._base
        if checkpoint.passport is not None and checkpoint.passport.base.weights_sha256 is not None:
            base = replace(base, weights_sha256=self._weights_hash())
        verdict = judge(checkpoint, base, self._limits, force=force, found=found)
        if verdict.placement == "rejected":
            raise RefusedError(verdict.reasons)
        return checkpoint, verdict

    async def _prove(self, digest: str, checkpoint: Checkpoint, verdict: Verdict, options: Options) -> Proof:
        """Have the base's engine load a shared adapter, and answer with it, before anyone can name it.

        An engine that is down proves nothing and hinders nothing: the version is then `unproven` until its first
        request.
        """
        start = self._fleet.base.current
        if verdict.placement != "shared" or start is None:
            return unproven("its engine has not run yet")
        self._fleet.refuse_without_plugin(start)
        try:
            await self._fleet.load(start, digest, checkpoint.directory)
        except EngineRefusedError as error:
            raise RefusedError([Problem("engine_refused", str(error), "engine")]) from error
        except EngineUnavailableError as error:
            log.warning("%s is published unproven: %s", digest, error)
            return unproven(str(error))
        passport = checkpoint.passport
        probe = passport.probe if passport is not None else None
        proof = await self._prover.before_publishing(start, digest, checkpoint.directory, probe, force=options.force)
        if proof.state == "failed" and proof.reason is not None:
            raise RefusedError([proof.reason, *verdict.reasons])
        return proof


async def _to_its_end(work: Coroutine[Any, Any, Result]) -> Result:
    """What a thread does goes on when its waiter is cancelled: only its end tells whether the version is there."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
