"""Files of rows for tests: the type of the `write_rows` fixture."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

WriteRows: TypeAlias = Callable[[str, Iterable[Mapping[str, Any]]], Path]
