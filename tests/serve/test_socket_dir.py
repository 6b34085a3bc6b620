"""Directories of engines' sockets: one gateway's own while it lives, and nobody's after it."""

import signal
import subprocess
import sys
from pathlib import Path

from loradock_serve.socket_dir import PREFIX, SocketDir, remove_leftovers

GATEWAY = """
import socket, sys, time
from pathlib import Path
from loradock_serve.socket_dir import SocketDir
place = SocketDir(Path(sys.argv[1]))
socket.socket(socket.AF_UNIX).bind(str(place.path / "1-1.sock"))
(place.path / "1-1").mkdir()
print(place.path, flush=True)
time.sleep(600)
"""


def test_directory_of_a_killed_gateway_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GATEWAY, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        path = Path(gateway.stdout.readline().strip())
        assert remove_leftovers(tmp_path) == []
        assert {part.name for part in path.iterdir()} == {"1-1.sock", "1-1"}
        gateway.send_signal(signal.SIGKILL)
        gateway.wait()
    assert remove_leftovers(tmp_path) == [path]
    assert not path.exists()


def test_own_directory_is_ours_alone_and_goes_with_us(tmp_path: Path) -> None:
    ours = SocketDir(tmp_path)
    assert ours.path.stat().st_mode & 0o777 == 0o700
    (ours.path / "left").touch()
    assert remove_leftovers(tmp_path) == []
    ours.release()
    ours.release()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_leftover_of_ours_is_left_alone(tmp_path: Path) -> None:
    older, elsewhere = tmp_path / "loradock-abcdefgh", tmp_path / "elsewhere"
    for place in (older, elsewhere):
        place.mkdir()
        (place / "kept").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").touch()
    assert remove_leftovers(tmp_path) == []
    assert (older / "kept").exists()
    assert (elsewhere / "kept").exists()
