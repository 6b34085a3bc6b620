"""What runs below a process, and with which command and environment: read from /proc."""

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, nearest first, without itself."""
    found, level = [], [pid]
    while level:
        level = [child for parent in level for child in _children(parent)]
        found += level
    return found


def command_of(pid: int) -> list[str]:
    """The words of its command line; empty where the process is gone."""
    return _words(pid, "cmdline")


def environment_of(pid: int) -> dict[str, str]:
    """The environment that it was started with."""
    pairs = (word.partition("=") for word in _words(pid, "environ"))
    return {name: value for name, _, value in pairs}


def _words(pid: int, file: str) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.removesuffix("\0").split("\0") if text else []


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
