"""The gateway: its parts made and joined, and the ASGI application on top of them.

`build_gateway(config, …)` is the only place that knows all parts. Starting and stopping follow the application's
lifespan.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from loradock_adapters.cached_store import CachedStore
from loradock_adapters.engine_rules import DEFAULT_MAX_LORA_RANK, EngineLimits
from loradock_adapters.registry import Registry
from loradock_adapters.store import LocalStore
from loradock_adapters.uploads import UploadLimits, Uploads
from loradock_serve import rewrite
from loradock_serve.adapter_gauges import AdapterGauges
from loradock_serve.adapters_routes import adapters_router
from loradock_serve.auth import Doorkeeper, behind_proxies
from loradock_serve.base import ServedBase, WeightsHash, find_base
from loradock_serve.base_routes import base_router
from loradock_serve.blobs_routes import blobs_router
from loradock_serve.cache_keeper import CacheKeeper
from loradock_serve.catalog import Catalog
from loradock_serve.collector import Collector
from loradock_serve.config import ServeConfig
from loradock_serve.data_dir import DirectoryUse, GatewayLock, prepare_data_dir
from loradock_serve.directories import CachedDirectories, Directories
from loradock_serve.engine import AttachedEngine
from loradock_serve.engine_command import Machine, this_machine
from loradock_serve.engine_factory import EngineFactory
from loradock_serve.fit import Fit
from loradock_serve.fleet import Fleet
from loradock_serve.gc_routes import gc_router
from loradock_serve.http_errors import add_handlers
from loradock_serve.machine_check import check_machine
from loradock_serve.models_routes import models_router
from loradock_serve.ops_routes import ops_router
from loradock_serve.packing import PackedAdapters
from loradock_serve.pins import Pins
from loradock_serve.pins_routes import pins_router
from loradock_serve.plan import make_plan
from loradock_serve.plan_routes import plan_router
from loradock_serve.pointers import Pointers
from loradock_serve.pointers_routes import pointers_router
from loradock_serve.prover import Prover
from loradock_serve.proxy import OpenAIProxy
from loradock_serve.publish import Publisher
from loradock_serve.residency import Residency
from loradock_serve.sizing import Advice, LoraSizing
from loradock_serve.socket_dir import SocketDir, remove_leftovers
from loradock_serve.sources import Sources, make_sources
from loradock_serve.states import States
from loradock_serve.stores import directories_of, open_store, registry_url
from loradock_serve.traffic_record import TrafficRecord
from loradock_serve.turnstile import Turnstiles
from loradock_serve.upload_sweeps import UploadSweeps
from loradock_serve.waiting_room import WaitingRoom
from loradock_serve.weights import StoredWeights

log = logging.getLogger("loradock.gateway")

OPENAI_PATHS = (rewrite.CHAT, rewrite.COMPLETIONS, rewrite.EMBEDDINGS, rewrite.RESPONSES, rewrite.CLASSIFY)


@dataclass(frozen=True)
class Gateway:
    """The joined parts; `app` is what uvicorn runs."""

    app: ASGIApp
    fleet: Fleet
    catalog: Catalog
    registry: Registry
    plan: Advice | None
    """What the base's engine is started with; None where it takes no adapters."""
    pins: Pins


def build_gateway(config: ServeConfig, admin_key: str | None, machine: Machine | None = None) -> Gateway:
    """Everything, not yet started. Raises ServeConfigError where the base cannot be found; starts no process.

    Must run inside the event loop that will serve.
    """
    machine = machine or this_machine()
    base = find_base(config.base, config.engine.vllm_arguments.get("revision"))
    prepare_data_dir(config.data_dir)
    with contextlib.ExitStack() as undo:
        lock = GatewayLock(config.data_dir) if config.engine.url is None else None
        if lock is not None:
            undo.callback(lock.release)
        gateway = _join(config, admin_key, machine, base, lock)
        undo.pop_all()
    return gateway


def _has_tower_lora(arguments: Mapping[str, Any]) -> bool:
    """Whether vLLM will apply adapters outside the language model: it silently does not where it has nothing else."""
    return bool(arguments.get("enable_tower_connector_lora")) and not arguments.get("language_model_only")


def _join(
    config: ServeConfig, admin_key: str | None, machine: Machine, base: ServedBase, lock: GatewayLock | None
) -> Gateway:
    store = open_store(config)
    registry = Registry(registry_url(config))
    advice = engine_plan(config, base, machine, registry)
    lora = advice.sizing if advice is not None else None
    limits = EngineLimits(
        lora.max_lora_rank if lora else DEFAULT_MAX_LORA_RANK,
        enable_lora=lora is not None,
        tower_lora=_has_tower_lora(config.engine.vllm_arguments),
    )
    catalog = Catalog(registry, base.name, base.behaviour, _fit(config, registry, base, limits))
    remove_leftovers()
    socket_dir = SocketDir()
    directories = directories_of(store, registry)
    weights = StoredWeights(directories, lambda: base.source, config.data_dir / "merged")
    engines = EngineFactory(config, machine, base, lora, socket_dir.path)
    packs = PackedAdapters(config.data_dir / "packed", int(config.engine.packed_adapters_gib * 1024**3))
    fleet = Fleet(engines.base(), engines.dedicated, weights, config.engine, config.dedicated, packs)
    told = config.uploads
    uploads = Uploads(store, UploadLimits(told.max_unpublished_bytes, told.max_unpublished_files, told.keep_s))
    turnstiles = Turnstiles(config.admission)
    prover = Prover(fleet, turnstiles, registry, store, base.facts.vocab_size)
    fleet.on_use = prover.at_first_use
    publisher = Publisher(
        store,
        uploads,
        registry,
        catalog,
        fleet,
        base.facts,
        limits,
        base.identity,
        prover,
        WeightsHash(base.model),
        base.directory,
    )
    use = DirectoryUse(config.data_dir)
    residency = Residency(fleet, store.has_version)
    pins = Pins(registry, catalog, fleet, lambda: _slots(fleet, lora), turnstiles.of(fleet.base))
    care = _Care(
        residency,
        pins,
        TrafficRecord(fleet.ledger, registry),
        lambda: make_plan(config, base, machine, registry),
        advice if config.engine.url is None else None,
        turnstiles,
        uploads,
        UploadSweeps(uploads, registry, config.uploads.keep_s),
        _collector(config, store, registry, uploads, publisher, fleet, (weights, packs), use),
        use,
        _cache_keeper(config, store, directories, fleet, residency, pins, use),
    )
    sources = make_sources(config, store, registry, catalog, publisher, fleet)
    app = _application(config, store, registry, catalog, fleet, publisher, care, sources, socket_dir, lock)
    return Gateway(Doorkeeper(app, admin_key), fleet, catalog, registry, advice, care.pins)


def _collector(
    config: ServeConfig,
    store: LocalStore,
    registry: Registry,
    uploads: Uploads,
    publisher: Publisher,
    fleet: Fleet,
    made: tuple[StoredWeights, PackedAdapters],
    use: DirectoryUse,
) -> Collector:
    """Who frees what no name has any more; `made` has the copies that can be made again."""
    weights, packs = made

    def copies() -> dict[str, list[Path]]:
        return _joined(weights.merged(), packs.packed())

    return Collector(store, registry, uploads, fleet, copies, publisher.turns, config.uploads.keep_s, use.alone)


def _joined(*parts: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    """Several maps of lists as one."""
    return {key: [path for part in parts for path in part.get(key, [])] for part in parts for key in part}


def _slots(fleet: Fleet, lora: LoraSizing | None) -> int | None:
    """Slots of the base's engine: as it says itself, else as it is started with; None where neither is known."""
    status = fleet.base.current.status if fleet.base.current is not None else None
    told = status.limits.get("max_loras") if status is not None else None
    if isinstance(told, int):
        return told
    return lora.max_loras if lora is not None and not isinstance(fleet.base, AttachedEngine) else None


@dataclass(frozen=True)
class _Care:
    """What looks after adapters besides answering requests."""

    residency: Residency
    pins: Pins
    traffic: TrafficRecord
    plan: Callable[[], Advice | None]
    running: Advice | None
    """What our own engine was started with; None where something else starts it."""
    turnstiles: Turnstiles
    uploads: Uploads
    sweeps: UploadSweeps
    collector: Collector
    use: DirectoryUse
    keeper: CacheKeeper | None


def _cache_keeper(
    config: ServeConfig,
    store: LocalStore,
    directories: Directories,
    fleet: Fleet,
    residency: Residency,
    pins: Pins,
    use: DirectoryUse,
) -> CacheKeeper | None:
    """Who keeps the copies of uploads within their budget; None where the store is no cache."""
    if not (isinstance(store, CachedStore) and isinstance(directories, CachedDirectories)):
        return None
    limit_bytes = int(config.blobs_cache_gib * 1024**3)
    return CacheKeeper(store, directories, fleet, residency, lambda: pins.digests, use.alone, limit_bytes)


def _fit(config: ServeConfig, registry: Registry, base: ServedBase, limits: EngineLimits) -> Fit:
    """What fits this server; and a warning where the data_dir holds adapters that do not, being another base's."""
    attached = config.engine.url is not None
    if not attached and (claimed := registry.claim(base.identity)):
        log.info("%d version(s) without a recorded base are taken for %s", claimed, base.identity)
    for other, count in registry.bases().items():
        if not other.is_same(base.identity):
            log.warning(
                "data_dir holds %d adapter version(s) published for the base %s, and this server's is %s: requests for "
                "them are answered 409 until they are pushed again, or that base is served",
                count,
                other,
                base.identity,
            )
    return Fit(base.identity, None if attached and config.engine.max_lora_rank is None else limits)


def engine_plan(config: ServeConfig, base: ServedBase, machine: Machine, registry: Registry) -> Advice | None:
    """Slots for the base's engine; None where vLLM cannot put adapters on its architecture.

    Raises ServeConfigError where the config asks for what the machine does not have.
    """
    advice = make_plan(config, base, machine, registry)
    check_machine(config.engine, machine, advice)
    if advice is None:
        log.warning(
            "%s: vLLM puts no adapters on %s; all pushed models get engines of their own",
            base.name,
            base.facts.architectures,
        )
    return advice


def _application(
    config: ServeConfig,
    store: LocalStore,
    registry: Registry,
    catalog: Catalog,
    fleet: Fleet,
    publisher: Publisher,
    care: _Care,
    sources: Sources,
    socket_dir: SocketDir,
    lock: GatewayLock | None,
) -> ASGIApp:
    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        fleet.start()
        care.pins.start()
        care.traffic.start()
        care.sweeps.start()
        if care.keeper is not None:
            care.keeper.start()
        try:
            yield
        finally:
            await sources.jobs.stop()
            if care.keeper is not None:
                await care.keeper.stop()
            await care.sweeps.stop()
            await care.pins.stop()
            await fleet.stop()
            await care.traffic.stop()
            registry.close()
            care.use.release()
            socket_dir.release()
            if lock is not None:
                lock.release()

    app = FastAPI(title="Loradock", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    proxy = _proxy(config, catalog, fleet, care.turnstiles, sources)
    for path in OPENAI_PATHS:  # the router sees what is no POST, and refuses it
        app.router.routes.append(Route(path, endpoint=proxy, methods=["POST"]))
    states = States(fleet, care.residency, care.pins)
    pointers = Pointers(registry, catalog, fleet, publisher.turns)
    app.include_router(models_router(catalog, pointers, states))
    app.include_router(blobs_router(store, care.uploads, config))
    app.include_router(adapters_router(registry, catalog, publisher, states, care.pins, sources.push))
    app.include_router(gc_router(care.collector))
    app.include_router(pointers_router(catalog, pointers, states))
    app.include_router(pins_router(care.pins, states))
    app.include_router(base_router(publisher.describe_base))
    app.include_router(plan_router(care.plan, care.running, care.traffic.write))
    app.include_router(ops_router(fleet, AdapterGauges(registry, catalog, care.residency), care.turnstiles))

    add_handlers(app)
    return _OpenAIFirst(proxy, behind_proxies(app))


def _proxy(
    config: ServeConfig, catalog: Catalog, fleet: Fleet, turnstiles: Turnstiles, sources: Sources
) -> OpenAIProxy:
    return OpenAIProxy(
        catalog,
        fleet,
        turnstiles,
        sources.lazy,
        WaitingRoom(config.admission.max_queue, int(config.admission.max_queue_gib * 1024**3)),
        max_body_bytes=config.max_body_bytes,
        timeout_s=config.request_timeout_s,
        max_n=config.admission.max_n,
    )


class _OpenAIFirst:
    """The OpenAI routes, and `app` for all others: on the way through a router a request spends more than in its
    proxy."""

    def __init__(self, proxy: ASGIApp, app: ASGIApp) -> None:
        self._proxy = proxy
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """ASGI."""
        hot = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in OPENAI_PATHS
        return (self._proxy if hot else self._app)(scope, receive, send)
