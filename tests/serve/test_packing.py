"""The packed forms on disk: made once, whole or not at all, bounded, and never needed."""

import asyncio
import os
from pathlib import Path

import pytest
import torch

from loradock_serve import packing
from loradock_serve.packed_file import SYNCED, VERSION, WEIGHTS, Recipe
from loradock_serve.packing import GONE, PARTIAL, PackedAdapters
from loradock_testing.three_layers import adapter_at, tensors

GIB = 1024**3
ONE, TWO, THREE = (f"sha256:{digit * 64}" for digit in "123")


def packs_at(root: Path, limit_bytes: int = GIB) -> PackedAdapters:
    return PackedAdapters(root, limit_bytes)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


async def test_packed_form_is_made_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = Recipe.write

    def counted(recipe: Recipe, directory: Path) -> None:
        written.append(directory)
        write(recipe, directory)

    monkeypatch.setattr(Recipe, "write", counted)
    source, root = adapter_at(tmp_path / "a"), tmp_path / "packed"
    packs = packs_at(root)

    found = await asyncio.gather(*(packs.directory_of(ONE, source, "bfloat16") for _ in range(4)))
    await packs.settle()
    later = await packs_at(root).directory_of(ONE, source, "bfloat16")
    other = await packs.directory_of(ONE, source, "float16")

    assert {*found, later} == {root / f"{'1' * 64}-bfloat16.{VERSION}"}
    assert other == root / f"{'1' * 64}-float16.{VERSION}"
    assert len(written) == 2
    assert names(root) == [f"{'1' * 64}-bfloat16.{VERSION}", f"{'1' * 64}-float16.{VERSION}"]


async def test_adapter_that_would_not_change_is_used_where_it_is(tmp_path: Path) -> None:
    source = adapter_at(tmp_path / "a", tensors(torch.bfloat16), lora_alpha=8)
    packs = packs_at(tmp_path / "packed")

    assert await packs.directory_of(ONE, source, "bfloat16") == source
    assert names(tmp_path / "packed") == []


async def test_no_room_or_another_format_packs_nothing(tmp_path: Path) -> None:
    source = adapter_at(tmp_path / "a")

    assert await packs_at(tmp_path / "packed", 0).directory_of(ONE, source, "bfloat16") is None
    assert await packs_at(tmp_path / "packed").directory_of(ONE, source, "float8") is None


@pytest.mark.parametrize("fault", ["kind", "config", "disk"])
async def test_adapter_that_cannot_be_packed_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    extra = {"base_model.model.score.weight": torch.ones(2, 2)} if fault == "kind" else {}
    source = adapter_at(tmp_path / "a", tensors() | extra)
    if fault == "config":
        (source / "adapter_config.json").write_text("{}")

    def full(_recipe: Recipe, directory: Path) -> None:
        (directory / WEIGHTS).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if fault == "disk":
        monkeypatch.setattr(Recipe, "write", full)

    assert await packs_at(tmp_path / "packed").directory_of(ONE, source, "bfloat16") is None
    assert names(tmp_path / "packed") == []


async def test_crash_half_way_leaves_nothing_that_counts(tmp_path: Path) -> None:
    root = tmp_path / "packed"
    living = f"{PARTIAL}{os.getppid()}-x"
    for name in (f"{PARTIAL}{os.getpid()}-x", f"{PARTIAL}4194305-x", f"{GONE}4194305-x", living):
        (root / name).mkdir(parents=True)
        (root / name / WEIGHTS).write_bytes(b"half")

    packs = packs_at(root)

    assert names(root) == [living]  # another gateway is at it
    assert (
        await packs.directory_of(ONE, adapter_at(tmp_path / "a"), "bfloat16") == root / f"{'1' * 64}-bfloat16.{VERSION}"
    )


async def test_damaged_packed_form_is_made_again(tmp_path: Path) -> None:
    source, root = adapter_at(tmp_path / "a"), tmp_path / "packed"
    packs = packs_at(root)
    made = await packs.directory_of(ONE, source, "bfloat16")
    assert made is not None
    await packs.settle()
    whole = (made / WEIGHTS).read_bytes()
    (made / WEIGHTS).write_bytes(whole[:-10])

    assert await packs_at(root).directory_of(ONE, source, "bfloat16") == made
    assert (made / WEIGHTS).read_bytes() == whole


async def test_form_that_may_not_be_on_the_disk_is_made_again_after_a_restart_and_a_synced_one_is_not(
    tmp_path: Path,
) -> None:
    source, root = adapter_at(tmp_path / "a"), tmp_path / "packed"
    packs = packs_at(root)
    made = await packs.directory_of(ONE, source, "bfloat16")
    assert made is not None
    await packs.settle()
    first = (made / WEIGHTS).stat().st_mtime_ns

    await packs_at(root).directory_of(ONE, source, "bfloat16")
    assert (made / WEIGHTS).stat().st_mtime_ns == first

    (made / SYNCED).unlink()
    await packs_at(root).directory_of(ONE, source, "bfloat16")
    assert (made / WEIGHTS).stat().st_mtime_ns != first


async def test_least_recently_used_goes_when_the_disk_is_full_and_stays_mapped(tmp_path: Path) -> None:
    source, root = adapter_at(tmp_path / "a"), tmp_path / "packed"
    probe = await packs_at(tmp_path / "probe").directory_of(ONE, source, "bfloat16")
    assert probe is not None
    packs = packs_at(root, 2 * packing._size_bytes(probe))
    first, second = [await packs.directory_of(digest, source, "bfloat16") for digest in (ONE, TWO)]
    assert first is not None
    assert second is not None
    size_bytes = (second / WEIGHTS).stat().st_size
    mapped = torch.from_file(str(second / WEIGHTS), shared=False, size=size_bytes, dtype=torch.uint8)
    await packs.settle()
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    await packs.directory_of(ONE, source, "bfloat16")  # used again

    await packs.directory_of(THREE, source, "bfloat16")

    assert names(root) == [f"{'1' * 64}-bfloat16.{VERSION}", f"{'3' * 64}-bfloat16.{VERSION}"]
    assert mapped.numpy().tobytes() == (first / WEIGHTS).read_bytes()
    assert await packs.directory_of(TWO, source, "bfloat16") == second  # and can be made again


async def test_packed_forms_leave_with_their_version(tmp_path: Path) -> None:
    source, root = adapter_at(tmp_path / "a"), tmp_path / "packed"
    packs = packs_at(root)
    for digest in (ONE, TWO):
        for dtype in ("bfloat16", "float32"):
            await packs.directory_of(digest, source, dtype)

    await packs.discard(ONE)
    await packs.discard(THREE)  # which was never packed

    assert names(root) == [f"{'2' * 64}-bfloat16.{VERSION}", f"{'2' * 64}-float32.{VERSION}"]
    assert await packs.directory_of(ONE, source, "bfloat16") == root / f"{'1' * 64}-bfloat16.{VERSION}"


async def test_caller_that_gives_up_does_not_stop_the_packing(tmp_path: Path) -> None:
    source, root = adapter_at(tmp_path / "a"), tmp_path / "packed"
    packs = packs_at(root)
    impatient = asyncio.create_task(packs.directory_of(ONE, source, "bfloat16"))
    await asyncio.sleep(0)
    impatient.cancel()

    assert await packs.directory_of(ONE, source, "bfloat16") == root / f"{'1' * 64}-bfloat16.{VERSION}"
    assert impatient.cancelled()
