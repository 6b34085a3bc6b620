"""What a gateway keeps things in, as its configuration says: the registry, and the store of uploads.

Both are this machine's `data_dir` unless URLs name others, which several gateways share.
"""

import os
from collections.abc import Mapping

from loradock_adapters.blob_store import FsspecBlobs
from loradock_adapters.cached_store import CachedStore
from loradock_adapters.registry import Registry
from loradock_adapters.store import LocalStore
from loradock_serve.config import ServeConfig
from loradock_serve.directories import CachedDirectories, Directories, LocalDirectories

REGISTRY_URL = "LORADOCK_REGISTRY_URL"


def registry_url(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str:
    """The registry's URL, which may hold a password: from the environment, else the file, else a file in `data_dir`."""
    if url := environment.get(REGISTRY_URL, "").strip():
        return url
    if config.registry_url is not None:
        return config.registry_url.get_secret_value()
    return f"sqlite:///{config.data_dir / 'registry.sqlite'}"


def open_store(config: ServeConfig) -> LocalStore:
    """The store of uploads."""
    if config.blobs_url is None:
        return LocalStore(config.data_dir)
    return CachedStore(config.data_dir, FsspecBlobs(config.blobs_url))


def directories_of(store: LocalStore, registry: Registry) -> Directories:
    """The directories of what is in a store."""
    return CachedDirectories(store, registry.manifest) if isinstance(store, CachedStore) else LocalDirectories(store)
