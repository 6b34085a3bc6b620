"""Sub-commands of `loradock` that this package contributes, one module each; nothing heavy at import time."""
