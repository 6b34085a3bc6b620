"""Merge an adapter into its base, for an engine of its own: `python -m loradock_serve.merge BASE ADAPTER OUT`.

Tensor by tensor where that is all there is to it (merge_plan.py and merge_stream.py of loradock_adapters): a few
hundred MB of memory, whatever the base's size. Else with PEFT, which holds the base once, in the checkpoint's own
format. A process of its own, with a limit on its memory, which is gone afterwards. `OUT` is complete or the status is
not 0.
"""

import contextlib
import resource
import sys
from pathlib import Path

from loradock_adapters.base import find_base
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.errors import LoradockError, NotFoundError
from loradock_adapters.merge_files import copy_files, has_tokenizer, write_template_and_stops
from loradock_adapters.merge_plan import MergePlan, NotPlainError, plan_merge

_GIB = 1 << 30


def merge(base: str, adapter: Path, out: Path) -> None:
    """Write full weights and a tokenizer to `out`."""
    checkpoint = read_checkpoint(adapter)
    out.mkdir(parents=True)
    try:
        base_dir = find_base(base)
        plan = plan_merge(base_dir, checkpoint)
    except (NotPlainError, LoradockError, OSError) as reason:
        _say(f"merging with PEFT, the base in memory: {reason}")
        _merge_with_peft(base, adapter, out)
    else:
        _merge_streamed(plan, out)
        copy_files(base_dir, out)
    if has_tokenizer(checkpoint):
        copy_files(adapter, out)
    write_template_and_stops(checkpoint, out)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    _say(f"merged; at most {peak_mib} MiB were in memory")


def _merge_streamed(plan: MergePlan, out: Path) -> None:
    from loradock_adapters.merge_stream import BLOCK_BYTES, write_merged

    _bound_memory(2 * _GIB + 8 * plan.largest_factor_bytes + 16 * BLOCK_BYTES)
    _say(f"merging tensor by tensor: {len(plan.changes)} are changed")
    write_merged(plan, out)


def _merge_with_peft(base: str, adapter: Path, out: Path) -> None:
    from loradock_adapters.merge_peft import merge_with_peft

    if (weights := _weights(base, adapter)) is not None:  # else they come from the Hub, at a size that nobody knows yet
        _bound_memory(6 * _GIB + 4 * sum(path.stat().st_size for path in weights))
    merge_with_peft(base, adapter, out)


def _weights(base: str, adapter: Path) -> list[Path] | None:
    with contextlib.suppress(NotFoundError):
        return [path for folder in (find_base(base), adapter) for path in folder.glob("*.safetensors")]
    return None


def _bound_memory(limit_bytes: int) -> None:
    """Beyond this, allocating fails here, before the host runs out. Files that are mapped do not count."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    merge(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
