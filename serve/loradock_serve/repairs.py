"""The repair of an upload on its way to a version: from the uploaded files to those that will be served.

The upload keeps its own digest, the repaired files have another; only the latter becomes a version. The same upload on
the same base is repaired to the same bytes, so that pushing it again finds the version that it made. Blocks: call it in
a thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loradock_adapters.base import BaseModel
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.findings import Findings
from loradock_adapters.manifest import Manifest, manifest_of
from loradock_adapters.problems import Problem
from loradock_adapters.repair import plan_repair, write_repaired
from loradock_adapters.store import LocalStore


@dataclass(frozen=True, slots=True)
class Mended:
    """What is to be judged in an upload's place."""

    manifest: Manifest
    """The upload's own where nothing was repaired."""
    repairs: tuple[Problem, ...]
    findings: Findings
    """What the repair has to say to the gate."""


def mend(
    store: LocalStore,
    manifest: Manifest,
    directory: Path,
    base: BaseModel,
    base_dir: Path | None,
    judge: Callable[[Path, Findings], object],
) -> Mended:
    """Repairs an upload whose files lie in `directory`; the new files go into the store as blobs once they are judged.

    What the base's weights in `base_dir` say is compared with. `judge` raises for files that nothing may be kept of.
    """
    repair = plan_repair(read_checkpoint(directory), base, base_dir)
    if not repair:
        return Mended(manifest, (), repair.findings)
    with store.scratch() as scratch:
        write_repaired(repair, scratch)
        judge(scratch, repair.findings)
        mended = manifest_of(scratch)
        for entry in mended.files:
            store.put_file(scratch / entry.path, entry)
    return Mended(mended, (*repair.done, _origin(manifest)), repair.findings)


def _origin(upload: Manifest) -> Problem:
    """Among the repairs the upload's own digest, by which its publisher may look for it."""
    return Problem("uploaded_as", f"the upload itself was {upload.digest}", upload.digest)
