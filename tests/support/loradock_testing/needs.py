"""What tests want of the machine beside Python: where it is missing they are skipped, and in CI they fail."""

import os

import pytest

NEED = "LORADOCK_TESTS_NEED"
"""Names, with commas between them, what must not be missing where these tests run; CI sets it to all there is."""
POSTGRESQL, NAMESPACES = "postgresql", "namespaces"


def missing(what: str, reason: str) -> None:
    """Skips the test, or fails it where it was said that this is there."""
    if what in os.environ.get(NEED, "").split(","):
        pytest.fail(f"{reason} ({NEED} says that it is there)")
    pytest.skip(reason)
