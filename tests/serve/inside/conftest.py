"""One world of models and one engine with our plug-ins for all tests of this folder: a start takes half a minute."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradock_testing.isolation import BASE, MAX_LORA_RANK, SLOTS, World, make_world
from loradock_testing.vllm_server import STOCK, VllmServer, vllm_server

with warnings.catch_warnings():
    # Importing vLLM compiles TorchScript classes of torch itself, which torch has deprecated. Once it is imported, the
    # modules here may be strict again.
    warnings.simplefilter("ignore", DeprecationWarning)
    import vllm.lora.model_manager  # noqa: F401

LORA_FLAGS = (
    *("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", "12", "--max-lora-rank", str(MAX_LORA_RANK)),
    *("--served-model-name", BASE, "--max-num-seqs", "64", "--block-size", "32"),
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def engine(world: World) -> Iterator[VllmServer]:
    flags = (*LORA_FLAGS, "--worker-extension-cls", "loradock_serve.inside.worker.LoradockWorker")
    with vllm_server(world.base_dir, *flags) as server:
        yield server


@pytest.fixture(scope="session")
def stock_engine(world: World) -> Iterator[VllmServer]:
    runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with vllm_server(world.base_dir, *LORA_FLAGS, plugins=STOCK, environment=runtime) as server:
        yield server


@pytest.fixture
def adapter_dir(world: World) -> Path:
    return world.adapters["a1"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch computes with two threads, whatever the machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
