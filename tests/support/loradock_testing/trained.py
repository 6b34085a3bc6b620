"""What the end-to-end tests train and ask: names only, so that fixtures and tests agree."""

import random
from dataclasses import dataclass
from pathlib import Path

from loradock_testing.tiny_models import LINEAR_MODULES

WORDS = ("import return yield class self lambda while raise assert global print async await with else").split(" ")
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
