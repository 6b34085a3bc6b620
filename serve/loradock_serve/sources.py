"""The parts that fetch checkpoints, made and joined: what opens an address, the fetches, the models named by one."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import get_token

from loradock_adapters.registry import Registry
from loradock_adapters.source_ref import HUB, SourceRef
from loradock_adapters.store import LocalStore
from loradock_serve.catalog import Catalog
from loradock_serve.config import ServeConfig, SourcesConfig
from loradock_serve.fleet import Fleet
from loradock_serve.hub_source import HubSource
from loradock_serve.lazy_models import LazyModels
from loradock_serve.object_source import ObjectSource
from loradock_serve.pointers import Pointers
from loradock_serve.publish import Publisher
from loradock_serve.source_jobs import SourceJobs
from loradock_serve.source_listing import Limits, Source
from loradock_serve.source_push import SourcePush

HUB_URL = "https://huggingface.co"


@dataclass(frozen=True)
class Sources:
    """See the top of the file."""

    jobs: SourceJobs
    push: SourcePush
    lazy: LazyModels


def make_sources(
    config: ServeConfig, store: LocalStore, registry: Registry, catalog: Catalog, publisher: Publisher, fleet: Fleet
) -> Sources:
    """Must run inside the event loop that will serve."""
    sources = config.sources
    jobs = SourceJobs(
        store,
        registry,
        publisher,
        Pointers(registry, catalog, fleet, publisher.turns).promote,
        opener(sources),
        Limits(config.max_upload_bytes, sources.max_bytes),
        timeout_s=sources.timeout_s,
        max_running=sources.max_running,
        max_waiting=sources.max_waiting,
    )
    return Sources(jobs, SourcePush(sources, jobs, publisher), LazyModels(sources, jobs, catalog))


def opener(config: SourcesConfig) -> Callable[[SourceRef, str | None], Source]:
    """What opens an address, with a token where somebody sent one."""
    # Read now and not where huggingface_hub does it: as it is imported, which may have been before.
    hub_url = (config.hub_url or os.environ.get("HF_ENDPOINT") or HUB_URL).rstrip("/")

    def open_source(ref: SourceRef, token: str | None) -> Source:
        if ref.scheme != HUB:
            return ObjectSource(ref)
        if token is None and config.server_token:
            token = get_token()
        return HubSource(ref, hub_url, token)

    return open_source
