"""A data_dir that cannot work is told before anything starts, and one gateway holds it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loradock_serve.app import build_gateway
from loradock_serve.config import ServeConfig
from loradock_serve.data_dir import GatewayLock, prepare_data_dir
from loradock_serve.errors import ServeConfigError
from loradock_testing.gateway import MACHINE, serving
from loradock_testing.tiny_checkpoints import write_base


def test_directory_is_made_with_its_parents_and_nothing_of_the_trial_stays(tmp_path: Path) -> None:
    prepare_data_dir(tmp_path / "a" / "b")
    assert [path for path in (tmp_path / "a" / "b").rglob("*") if not path.is_dir()] == []
    prepare_data_dir(tmp_path / "a" / "b")


@pytest.mark.parametrize("place", ["data", "data/below", "data-with-file-for-part"])
def test_file_in_the_way_is_told_with_what_to_do(tmp_path: Path, place: str) -> None:
    (tmp_path / "data").write_text("a file")
    (tmp_path / "data-with-file-for-part").mkdir()
    (tmp_path / "data-with-file-for-part" / "logs").write_text("a file")
    with pytest.raises(ServeConfigError, match=r"data_dir: .* cannot be used: (File exists|Not a dir).*`--data-dir`"):
        prepare_data_dir(tmp_path / place)


def test_directory_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Path, *_: object) -> None:  # tests may run as root, to whom nothing is forbidden
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(ServeConfigError, match=r"Permission denied: .*blobs.*chown -R"):
        prepare_data_dir(tmp_path)


def test_file_system_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ServeConfigError, match=r"no hard links .*Operation not permitted.*one local file system"):
        prepare_data_dir(tmp_path)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_second_gateway_that_starts_engines_is_refused_by_the_process_id_of_the_first(tmp_path: Path) -> None:
    first = GatewayLock(tmp_path)
    with pytest.raises(ServeConfigError, match=rf"in use by another gateway, process {os.getpid()}: stop that one"):
        GatewayLock(tmp_path)
    first.release()
    second = GatewayLock(tmp_path)
    assert (tmp_path / "gateway.lock").read_text() == f"{os.getpid()}\n"
    second.release()


def test_lock_of_a_process_that_died_is_free(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from loradock_serve.data_dir import GatewayLock; "
        "lock = GatewayLock(Path(sys.argv[1])); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    GatewayLock(tmp_path).release()


async def test_attached_gateway_shares_the_directory_and_another_that_starts_engines_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(write_base(tmp_path / "tiny-base"))
    other = ServeConfig.model_validate({"base": base, "data_dir": str(tmp_path / "data")})
    async with serving(tmp_path, monkeypatch), serving(tmp_path, monkeypatch, engine={"url": "unix:///nowhere"}):
        with pytest.raises(ServeConfigError, match="in use by another gateway"):
            build_gateway(other, None, MACHINE)
    async with serving(tmp_path, monkeypatch) as next_one:
        await next_one.until_ready()


async def test_gateway_that_cannot_begin_lets_go_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig.model_validate({"base": str(write_base(tmp_path / "b")), "data_dir": str(tmp_path / "data")})

    def fail(*_: object) -> None:
        raise ServeConfigError("no")

    monkeypatch.setattr("loradock_serve.app.engine_plan", fail)
    with pytest.raises(ServeConfigError, match="no"):
        build_gateway(config, None, MACHINE)
    GatewayLock(tmp_path / "data").release()
