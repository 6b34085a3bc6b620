"""What can go wrong in a comparison. A number that cannot be trusted is never printed: it is one of these instead."""


class BenchmarkError(Exception):
    """The comparison cannot go on; the message says what happened and where to look."""
