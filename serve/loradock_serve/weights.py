"""Where engines read weights from: the store's own directories, or a merge of base and adapter made once.

An adapter that cannot be hot-swapped (DoRA, `modules_to_save`, `bias`, over-rank) becomes full weights in a subprocess
(`merge.py`) that has a limit on its memory and takes torch with it when it ends. Knows nothing of engines.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from loradock_adapters.registry import Version
from loradock_serve import launcher
from loradock_serve.directories import Directories
from loradock_serve.errors import EngineStartError
from loradock_serve.process import explain_status

log = logging.getLogger("loradock.weights")

PARTIAL = ".partial"
MERGE = (sys.executable, "-m", "loradock_serve.merge")
SECRETS = {"LORADOCK_ADMIN_KEY", "LORADOCK_REGISTRY_URL", "PGPASSWORD"}
"""Kept from the merge, which runs third parties' code and has no use for them."""
MERGE_LOG_TAIL_BYTES = 2000


class StoredWeights:
    """The `Weights` of a fleet."""

    def __init__(self, directories: Directories, base: Callable[[], str], merged_root: Path) -> None:
        self._directories = directories
        self._base = base
        self._root = merged_root
        self._merges: dict[str, asyncio.Task[Path]] = {}

    async def adapter_dir(self, version: Version) -> Path:
        """The adapter's directory in the store."""
        return await self._directories.get(version)

    async def full_weights_dir(self, version: Version) -> Path:
        """The store's directory of a full model; for an adapter the merge, made now if need be (EngineStartError)."""
        if version.kind == "full":
            return await self._directories.get(version)
        # A data directory may be served with another base one day, or with this one trained anew.
        target = (
            self._root / f"{version.digest.removeprefix('sha256:')}-{await asyncio.to_thread(_identity, self._base())}"
        )
        if target.is_dir():  # only ever renamed into place whole
            return target
        task = self._merges.get(version.digest)
        if task is None:
            task = asyncio.create_task(self._merge(version, target))
            self._merges[version.digest] = task
            task.add_done_callback(lambda _task: self._merges.pop(version.digest, None))
        return await asyncio.shield(task)

    def merged(self) -> dict[str, list[Path]]:
        """The merges that are on the disk, by the version's digest."""
        found: dict[str, list[Path]] = {}
        for path in self._root.glob("*-*") if self._root.is_dir() else ():
            if path.suffix != PARTIAL and path.is_dir():
                found.setdefault(f"sha256:{path.name.partition('-')[0]}", []).append(path)
        return found

    async def _merge(self, version: Version, target: Path) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(_drop_left_overs, target)
        partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
        adapter = await self._directories.get(version)
        log.info("merging %s into the base, for an engine of its own", version.name)
        try:
            status, output = await _run((*MERGE, self._base(), str(adapter), str(partial)))
            tail = output[-MERGE_LOG_TAIL_BYTES:].decode(errors="replace")
            if status != 0:
                summary = f"{version.name!r} cannot be merged into the base: status {explain_status(status)}"
                raise EngineStartError(f"{summary}:\n{tail}", summary=summary)
            log.info("%s: %s", version.name, tail.strip().replace("\n", "; "))
            if not target.is_dir():  # else another gateway on this data_dir was quicker
                partial.replace(target)
            return target
        finally:  # what came of one that failed may be what fills the disk
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)


def _drop_left_overs(target: Path) -> None:
    """Earlier attempts of this process, or of one that is gone; what another gateway writes now is its own."""
    for partial in target.parent.glob(f"{target.name}.*{PARTIAL}"):
        pid = partial.name.removesuffix(PARTIAL).rpartition(".")[2]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            shutil.rmtree(partial, ignore_errors=True)


async def _run(command: Sequence[str]) -> tuple[int, bytes]:
    """A command's status and output. It ends, with every process of its own, when this task or this gateway does.

    Below the launcher, as engines are: `PR_SET_PDEATHSIG` would spare what the merge itself starts, and miss a gateway
    that dies before it is set.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", launcher.__file__, *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key not in SECRETS},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        output = await process.stdout.read()  # not communicate(): it closes stdin, which tells of the gateway's end
        return await process.wait(), output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _identity(base: str) -> str:
    """16 hex digits for a base: its id, and for a directory also what its files look like from outside."""
    seen = [base]
    if Path(base).is_dir():
        for path in sorted(Path(base).iterdir()):
            status = path.stat()
            seen.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
