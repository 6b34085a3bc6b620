"""How much memory this process takes at most from a moment on, and how much the device has for it.

On a GPU what torch has allocated there; else resident memory, which holds Python and its libraries as well: so only its
growth is counted. Linux.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


@dataclass(frozen=True)
class PeakMeter:
    """Begun by `start`."""

    base_bytes: int

    @classmethod
    def start(cls) -> "PeakMeter":
        """From now on."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return cls(0)
        _give_back()
        # "5" sets the high-water mark to what is resident now; where it may not be written, the mark stays.
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return cls(_status_bytes("VmHWM"))
        return cls(_status_bytes("VmRSS"))

    def growth_bytes(self) -> int:
        """The most that was taken since the start, above what was taken then."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return max(0, _status_bytes("VmHWM") - self.base_bytes)


def peak_bytes() -> int:
    """The most that was resident. `ru_maxrss` says the same, but begins at what its parent process had."""
    return _status_bytes("VmHWM")


def available_bytes() -> int | None:
    """What this process can still take on its device; None where nobody says."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    found = [_field_bytes("/proc/meminfo", "MemAvailable")]
    limit, used = _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USES)
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    known = [number for number in found if number is not None]
    return min(known) if known else None


def _give_back() -> None:
    """Freed memory that the C library keeps goes back to the system, so that taking it again is seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def _status_bytes(field: str) -> int:
    return _field_bytes("/proc/self/status", field) or 0


def _field_bytes(path: str, field: str) -> int | None:
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def _first_number(paths: tuple[str, ...]) -> int | None:
    """Of the first of these files that is there; None where it says `max`."""
    for path in paths:
        if Path(path).is_file():
            text = Path(path).read_text(encoding="ascii").strip()
            return int(text) if text.isdigit() else None
    return None
