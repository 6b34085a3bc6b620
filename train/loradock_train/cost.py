"""What a run took: time, energy and money, for run.json and the line at its end.

Energy is read from counters that the hardware keeps: NVML's for GPUs, RAPL's for CPUs (Linux shows it below
/sys/class/powercap, mostly to root alone). They count what the whole device drew, others' work on it included. Where a
counter is not there, `power_watts` of the config stands in; where that is not given either, the figure is null. Knows
nothing of training.
"""

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

POWERCAP = Path("/sys/class/powercap")
SAMPLE_EVERY_S = 30.0
"""RAPL's counters begin anew after 65 to 262 kJ: minutes, on a large CPU."""
JOULES_PER_WH = 3600.0


@dataclass(frozen=True)
class Spent:
    """Of one process, or of all that worked on a run one after the other. None: not known."""

    seconds: float = 0.0
    gpu_joules: float | None = 0.0
    cpu_joules: float | None = 0.0

    def plus(self, later: Self) -> "Spent":
        """Both together; what either does not know, nobody knows."""
        return Spent(
            self.seconds + later.seconds,
            _sum(self.gpu_joules, later.gpu_joules),
            _sum(self.cpu_joules, later.cpu_joules),
        )


UNKNOWN = Spent(0.0, None, None)
"""What a save tells that was written before this was kept."""


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


class SpendMeter:
    """Counts from the moment it is made. A thread of its own looks at the counters, as long as the meter lives."""

    def __init__(
        self,
        earlier: Spent | None = None,
        *,
        gpu: Callable[[], float | None] | None = None,
        cpu: Callable[[], float | None] | None = None,
    ) -> None:
        """earlier: what processes before this one spent on the run. gpu, cpu: joules since the first call."""
        self._earlier = earlier if earlier is not None else Spent()
        self._gpu, self._cpu = gpu if gpu is not None else gpu_counter(), cpu if cpu is not None else RaplCounter()
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self.so_far()
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        threading.Thread(target=_watch, args=(weakref.ref(self), stop), daemon=True, name="energy").start()

    def so_far(self) -> Spent:
        with self._lock:
            now = Spent(time.monotonic() - self._started_s, self._gpu(), self._cpu())
        return self._earlier.plus(now)


def _watch(meter: "weakref.ref[SpendMeter]", stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_EVERY_S):
        alive = meter()
        if alive is None:
            return
        alive.so_far()
        del alive


# ---- counters -------------------------------------------------------------------------------------------------------


class RaplCounter:
    """Joules that the CPU packages and their memory drew since the first call; None where the system does not tell."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [zone for zone in sorted(root.glob("*-rapl:*")) if _counts(zone)]
        self._last: dict[Path, int] = {}
        self._joules = 0.0

    def __call__(self) -> float | None:
        if not self._zones:
            return None
        try:
            for zone in self._zones:
                now = int((zone / "energy_uj").read_text())
                passed = now - self._last.get(zone, now)
                if passed < 0:  # it began anew
                    passed += int((zone / "max_energy_range_uj").read_text())
                self._last[zone] = now
                self._joules += passed / 1e6
        except (OSError, ValueError):  # for root alone, on most systems
            self._zones = []
            return None
        return self._joules


def _counts(zone: Path) -> bool:
    """Packages and memory; cores are part of a package, and `psys` has everything once more."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def gpu_counter(cuda: Any = None) -> Callable[[], float | None]:
    """Joules that this process's GPUs drew since the first call: None where there are none, or none that tell."""
    import torch

    cuda = cuda if cuda is not None else torch.cuda
    if not cuda.is_available():
        return lambda: None
    try:
        uuids = [f"GPU-{cuda.get_device_properties(index).uuid}" for index in range(cuda.device_count())]
        return NvmlCounter(uuids, ctypes.CDLL("libnvidia-ml.so.1"))
    except (OSError, AttributeError):  # no such library, or a build of torch whose devices have no uuid
        return lambda: None


class NvmlCounter:
    """Joules of the named GPUs since the first call, by NVML's own counters (Volta and newer have them)."""

    def __init__(self, uuids: Sequence[str], nvml: Any) -> None:
        self._nvml = nvml
        self._handles: list[ctypes.c_void_p] = []
        self._first: float | None = None
        if nvml.nvmlInit_v2() != 0:
            return
        for uuid in uuids:
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
                self._handles = []
                return
            self._handles.append(handle)

    def __call__(self) -> float | None:
        total = 0.0
        for handle in self._handles:
            millijoules = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
                return None
            total += millijoules.value / 1000.0
        if not self._handles:
            return None
        self._first = total if self._first is None else self._first
        return total - self._first


# ---- what is told ---------------------------------------------------------------------------------------------------


def cost_of(
    spent: Spent, *, has_gpu: bool, price_per_hour: float | None, power_watts: float | None
) -> dict[str, float | str | None]:
    """The `cost` of run.json. Energy is the measured one where the device that trained was measured, else
    `power_watts` for as long as the run took, else null."""
    measured = [("nvml", spent.gpu_joules), ("rapl", spent.cpu_joules)] if has_gpu else [("rapl", spent.cpu_joules)]
    known = [(name, joules) for name, joules in measured if joules is not None]
    energy_wh: float | None = None
    source: str | None = None
    if measured[0][1] is not None:
        energy_wh, source = sum(joules for _, joules in known) / JOULES_PER_WH, "+".join(name for name, _ in known)
    elif power_watts is not None:
        energy_wh, source = power_watts * spent.seconds / 3600.0, "power_watts"
    return {
        "seconds": round(spent.seconds, 2),
        "price_per_hour": price_per_hour,
        "price": None if price_per_hour is None else price_per_hour * spent.seconds / 3600.0,
        "energy_wh": energy_wh,
        "energy_source": source,
        "gpu_wh": None if spent.gpu_joules is None or not has_gpu else spent.gpu_joules / JOULES_PER_WH,
        "cpu_wh": None if spent.cpu_joules is None else spent.cpu_joules / JOULES_PER_WH,
        "power_watts": power_watts,
    }


def told(summary: Mapping[str, Any]) -> str:
    """One line for the end of a run. `summary` is that of run.json."""
    cost = summary["cost"]
    parts = [
        f"took {clock(cost['seconds'])} ({clock(summary['train_seconds'])} of them training)",
        f"peak memory {summary['peak_memory_bytes'] / 1e6:,.0f} MB",
        f"checkpoint {summary['checkpoint_bytes'] / 1e6:,.2f} MB",
    ]
    if cost["energy_wh"] is None:
        parts.append("energy not measured (power_watts would estimate it)")
    else:
        parts.append(f"energy {cost['energy_wh']:.3g} Wh ({cost['energy_source']})")
    if cost["price"] is not None:
        parts.append(f"cost {cost['price']:.4g} at {cost['price_per_hour']:g} an hour")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """12.3 s, 4:05 (minutes) or 3:04:05 (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes = f"{whole // 60 % 60}:{whole % 60:02d}"
    return f"{minutes} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
