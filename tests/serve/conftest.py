"""A gateway on a fake engine: a fresh one for each test that breaks things, one for a whole file of others."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from loradock_serve import engine as engine_module
from loradock_testing.gateway import Served, serving


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A gateway for this test alone."""
    async with serving(tmp_path, monkeypatch) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One gateway for all tests of a file, which have to run in the module's event loop and use names of their own.

    Its base engine restarts at once after a crash.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 0.02)
        monkeypatch.setattr(engine_module, "READY_POLL_S", 0.05)
        async with serving(tmp_path_factory.mktemp("shared"), monkeypatch) as running:
            await running.until_ready()
            yield running
