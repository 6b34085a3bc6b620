"""What a run took: counters that begin anew, counters that are not there, and figures that are never guessed."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from loradock_train.cost import NvmlCounter, RaplCounter, SpendMeter, Spent, clock, cost_of, gpu_counter, told


def zone(root: Path, folder: str, name: str, energy_uj: int, most_uj: int = 1_000_000_000) -> Path:
    directory = root / folder
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "energy_uj").write_text(f"{energy_uj}\n")
    (directory / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return directory


def test_rapl_adds_packages_and_memory_and_counts_nothing_twice(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    core, platform = zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)
    counter = RaplCounter(tmp_path)
    assert counter() == 0.0
    for directory in (first, second, memory, core, platform):
        (directory / "energy_uj").write_text("9000000")
    assert counter() == pytest.approx(4 + 9 + 8.9999)


def test_rapl_that_begins_anew_goes_on(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    counter = RaplCounter(tmp_path)
    counter()
    (package / "energy_uj").write_text("20000000")
    assert counter() == pytest.approx(30.0)


def test_rapl_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (package / "energy_uj").unlink()
    (package / "energy_uj").mkdir()  # an OSError on reading, as root gets none from permissions
    assert RaplCounter(tmp_path)() is None
    assert RaplCounter(tmp_path / "nowhere")() is None


class FakeNvml:
    """Speaks NVML's C interface, for GPUs with these counters in millijoules."""

    def __init__(self, counters: dict[str, int]) -> None:
        self.counters, self.uuids = counters, list(counters)

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's name
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        if uuid.decode() not in self.uuids:
            return 6
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = self.uuids.index(uuid.decode()) + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, value: Any) -> int:  # noqa: N802
        energy = self.counters[self.uuids[(handle.value or 0) - 1]]
        ctypes.cast(value, ctypes.POINTER(ctypes.c_ulonglong))[0] = max(energy, 0)
        return 3 if energy < 0 else 0


def test_nvml_counts_all_gpus_from_the_first_look_on() -> None:
    nvml = FakeNvml({"GPU-a": 10_000_000, "GPU-b": 500})
    counter = NvmlCounter(["GPU-a", "GPU-b"], nvml)
    assert counter() == 0.0
    nvml.counters |= {"GPU-a": 10_007_000, "GPU-b": 1_500}
    assert counter() == pytest.approx(8.0)


def test_nvml_without_a_counter_or_such_a_gpu_is_unknown() -> None:
    assert NvmlCounter(["GPU-old"], FakeNvml({"GPU-old": -1}))() is None
    assert NvmlCounter(["GPU-other"], FakeNvml({"GPU-a": 1}))() is None


def test_gpu_counter_on_a_machine_without_a_gpu_is_unknown() -> None:
    class NoCuda:
        def is_available(self) -> bool:
            return False

    assert gpu_counter(NoCuda())() is None


def test_meter_adds_what_earlier_processes_spent() -> None:
    joules = iter([0.0, 12.0])
    meter = SpendMeter(Spent(100.0, None, 30.0), gpu=lambda: None, cpu=lambda: next(joules))
    spent = meter.so_far()
    assert (spent.gpu_joules, spent.cpu_joules) == (None, 42.0)
    assert 100.0 < spent.seconds < 160.0


GIVEN: dict[str, Any] = {"price_per_hour": 1.64, "power_watts": 150.0}


def test_cost_of_an_hour_is_the_price_and_measured_energy_goes_before_the_estimate() -> None:
    cost = cost_of(Spent(3600.0, 720_000.0, 36_000.0), has_gpu=True, **GIVEN)
    assert (cost["price"], cost["energy_wh"], cost["energy_source"]) == (1.64, 210.0, "nvml+rapl")
    assert (cost["gpu_wh"], cost["cpu_wh"]) == (200.0, 10.0)


def test_estimate_stands_in_where_the_device_that_trained_was_not_measured() -> None:
    cost = cost_of(Spent(7200.0, None, 36_000.0), has_gpu=True, **GIVEN)
    assert (cost["energy_wh"], cost["energy_source"], cost["cpu_wh"]) == (300.0, "power_watts", 10.0)
    on_cpu = cost_of(Spent(7200.0, None, 36_000.0), has_gpu=False, **GIVEN)
    assert (on_cpu["energy_wh"], on_cpu["energy_source"]) == (10.0, "rapl")


def test_unknown_is_null_and_told_so() -> None:
    cost = cost_of(Spent(10.0, None, None), has_gpu=False, price_per_hour=None, power_watts=None)
    assert (cost["price"], cost["energy_wh"], cost["energy_source"]) == (None, None, None)
    line = told({"cost": cost, "train_seconds": 6.0, "peak_memory_bytes": 512e6, "checkpoint_bytes": 1_250_000})
    assert line == (
        "took 10.0 s (6.0 s of them training), peak memory 512 MB, checkpoint 1.25 MB, "
        "energy not measured (power_watts would estimate it)"
    )


def test_known_figures_stand_in_the_line_with_their_source() -> None:
    cost = cost_of(Spent(1800.0, None, None), has_gpu=False, **GIVEN)
    line = told({"cost": cost, "train_seconds": 1500.0, "peak_memory_bytes": 1e9, "checkpoint_bytes": 1e6})
    assert line.endswith("energy 75 Wh (power_watts), cost 0.82 at 1.64 an hour")
    assert line.startswith("took 30:00 min (25:00 min of them training), peak memory 1,000 MB")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1:01 min"), (3600, "1:00:00 h"), (3725, "1:02:05 h")],
)
def test_clock_says_seconds_minutes_or_hours(seconds: float, text: str) -> None:
    assert clock(seconds) == text
