"""The section of the similarity score: how far a run's answers are from the true ones, by meaning.

Knows keys, units, defaults and bounds; similarity.py scores.
"""

from pydantic import Field

from loradock_train.config_sections import Paths, Section


class SimilarityOptions(Section):
    """Score generated answers against the true ones before and after training: 1 - cosine of their mean hidden states,
    0 is best, 2 is worst."""

    path: Paths | None = None
    """Rows that are asked, in the format of the training data. Default: those of valid_path."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Tokens of an answer at most, generated greedily. Default 512, minimum 1."""

    max_rows: int | None = Field(default=None, ge=1)
    """Rows that are asked, evenly spaced over all of them. Default: all."""

    embedder: str | None = None
    """One fixed model, path or hub id, that judges a second time, so that the scores of different runs compare.
    Default none: each model judges itself alone."""
