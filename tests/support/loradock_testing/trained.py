"""What the end-to-end tests train and ask: names only, so that fixtures and tests agree."""

import keyword
import random
from dataclasses import dataclass
from pathlib import Path

from loradock_testing.tiny_models import LINEAR_MODULES

WORDS = [word for word in keyword.kwlist if len(word) > 3]
PROMPTS = [" ".join(random.Random(i).sample(WORDS, 4)) for i in range(20)]
WHOLE_LIST = [*LINEAR_MODULES, "embed_tokens", "lm_head"]
"""What the LoRA-vs-full template targets."""


@dataclass(frozen=True)
class Trained:
    """The base, and the run directories of what was trained on it."""

    base: Path
    linear: Path
    whole_list: Path
    full: Path
