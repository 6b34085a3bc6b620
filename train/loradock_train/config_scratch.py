"""The sections for runs that take long: sample texts on the way, and the results that the recipe promises.

Knows keys, units, defaults and bounds; samples.py writes, results.py compares.
"""

from typing import Annotated

from pydantic import Field

from loradock_train.config_sections import Names, Section


class SampleOptions(Section):
    """What the model says while it is trained, written to samples.jsonl and shown."""

    prompts: Annotated[Names, Field(min_length=1)]
    """Texts that the model continues, greedily."""

    every_steps: int = Field(default=500, ge=1)
    """Optimiser steps between two rounds; one more at the end. Default 500, minimum 1."""

    max_tokens: int = Field(default=48, ge=1)
    """Tokens of a continuation. Default 48, minimum 1."""


class Expected(Section):
    """Results that were published for this recipe, printed beside the run's own at its end."""

    loss: float = Field(gt=0)
    """Final loss, nats per token."""

    perplexity: float = Field(gt=1)
    """exp(loss), as published."""

    hours: float | None = Field(default=None, gt=0)
    """Of training. Default unknown."""

    hardware: str | None = None
    """On which the hours were taken. Default unknown."""

    data: str | None = None
    """On which it was trained. Default unknown."""
