"""What a config asks for and the machine does not have is told before an engine starts; what it has passes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve.config import EngineConfig
from loradock_serve.core_list import parse_cores
from loradock_serve.engine_command import Machine
from loradock_serve.errors import ServeConfigError
from loradock_serve.machine_check import check_machine
from loradock_serve.sizing import Advice, LoraSizing

GIB = 1024**3
CPU = Machine("cpu", 16 * GIB, (0, 1, 4))
GPU = Machine("gpu", 80 * GIB, (0, 1, 2, 3), 64 * GIB)


def advice(slots: int = 64, slots_bytes: int = GIB) -> Advice:
    return Advice(LoraSizing(slots, slots, 64, slots_bytes // slots), slots_bytes, 0, {}, ())


def complaints(machine: Machine, advised: Advice | None = None, **engine: Any) -> list[str]:
    try:
        check_machine(EngineConfig.model_validate(engine), machine, advised)
    except ServeConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("machine", "engine", "is_refused"),
    [
        (GPU, {"dtype": "float32"}, True),
        (CPU, {"dtype": "float32"}, False),
        (GPU, {}, False),
        (GPU, {"dtype": "bfloat16", "lora_dtype": "float16"}, False),
        (GPU, {"dtype": "float32", "url": "http://elsewhere"}, False),
    ],
)
def test_float32_adapters_are_refused_on_a_gpu_alone(
    machine: Machine, engine: dict[str, Any], is_refused: bool
) -> None:
    found = complaints(machine, advice(), **engine)
    assert len(found) == is_refused
    assert all("engine.dtype" in line and "float32" in line and "say bfloat16" in line for line in found)
    assert complaints(machine, None, **engine) == [], "without adapters it is as good as any"


@pytest.mark.parametrize("cores", ["0", "0-1", "0,4", "1,0,4", "0|1", "auto", "nobind"])
def test_cores_that_are_there_pass(cores: str) -> None:
    assert complaints(CPU, cpu_cores=cores) == []


@pytest.mark.parametrize(
    ("cores", "missing"), [("0-99", "2-3,5-99"), ("2", "2"), ("0-1|2-3", "2-3"), ("5,0,7,6", "5-7")]
)
def test_cores_that_are_not_there_are_named_beside_those_that_are(cores: str, missing: str) -> None:
    (line,) = complaints(CPU, cpu_cores=cores)
    assert line.startswith(f"engine.cpu_cores: {cores} names core {missing}, ")
    assert "(it may use 0-1,4)" in line
    assert complaints(GPU, cpu_cores=cores) == [], "a setting of CPU builds"


@pytest.mark.parametrize(("gib", "is_refused"), [(1000.0, True), (16.0, True), (15.5, False), (0.5, False)])
def test_cache_larger_than_memory_is_refused(gib: float, is_refused: bool) -> None:
    found = complaints(CPU, kv_cache_gib=gib)
    assert len(found) == is_refused
    assert all(f"{gib:g} GiB" in line and "16.0 GiB" in line for line in found)


@pytest.mark.parametrize(("machine", "has"), [(CPU, "this machine has 16.0 GiB"), (GPU, "the GPU has 80.0 GiB")])
def test_slots_larger_than_their_memory_are_refused(machine: Machine, has: str) -> None:
    (line,) = complaints(machine, advice(100_000, 5000 * GIB))
    assert line.startswith("engine.max_loras: 100000 slots of rank 64 take 5000.0 GiB")
    assert has in line
    assert complaints(machine, advice(100, machine.memory_bytes - 1)) == []


def test_everything_is_told_at_once() -> None:
    found = complaints(CPU, advice(10, 17 * GIB), cpu_cores="9", kv_cache_gib=99.0)
    assert [line.partition(":")[0] for line in found] == ["engine.cpu_cores", "engine.kv_cache_gib", "engine.max_loras"]


def test_an_engine_that_something_else_runs_is_its_own_affair() -> None:
    engine = {"url": "http://elsewhere", "cpu_cores": "0-99", "kv_cache_gib": 1000.0}
    assert complaints(CPU, advice(10, 17 * GIB), **engine) == []


@given(st.sets(st.integers(0, 200), min_size=1), st.randoms(use_true_random=False))
def test_a_list_of_cores_names_what_it_was_made_of(cores: set[int], chance: Any) -> None:
    parts, left = [], sorted(cores)
    while left:
        run = [left.pop(0)]
        while left and left[0] == run[-1] + 1 and chance.random() < 0.8:
            run.append(left.pop(0))
        parts.append(str(run[0]) if len(run) == 1 and chance.random() < 0.5 else f"{run[0]}-{run[-1]}")
    chance.shuffle(parts)
    assert parse_cores(",".join(parts)) == sorted(cores)


@pytest.mark.parametrize("text", ["", "a", "0-", "-1", "3-1", "0,,1", "0 1", "0|", "1.5", "٣", "0-99999999999", "0\n"])
def test_what_is_no_list_of_cores_is_refused_with_the_config(text: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.cpu_cores"):
        EngineConfig(cpu_cores=text)
