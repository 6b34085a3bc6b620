"""Facts about the pinned vLLM, as data."""
