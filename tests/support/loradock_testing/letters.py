"""A tokenizer that a person can read: one token a letter, its id the letter's code. Expectations are written by hand.

Special tokens: 1 begin, 2 end of text, 3 <|im_start|>, 4 <|im_end|>. Chats go through a real Jinja template.
"""

import re
from typing import Any

from jinja2 import Environment

BEGIN, END, TURN_START, TURN_END = 1, 2, 3, 4
SPECIAL = {"<|im_start|>": TURN_START, "<|im_end|>": TURN_END}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}:{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a:{% endif %}"
)


class Letters:
    """One token a letter."""

    eos_token_id: int | None = END

    def __init__(self, adds_begin: bool = True, adds_end: bool = False, chat_template: str | None = CHATML) -> None:
        self.adds_begin, self.adds_end, self.chat_template = adds_begin, adds_end, chat_template

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids: list[int] = []
        for piece in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
            ids.extend([SPECIAL[piece]] if piece in SPECIAL else map(ord, piece))
        if add_special_tokens:
            ids = [BEGIN] * self.adds_begin + ids + [END] * self.adds_end
        return {"input_ids": ids}

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        return Environment().from_string(self.chat_template or "").render(messages=conversation, **options)

    def get_added_vocab(self) -> dict[str, int]:
        return dict(SPECIAL)


class Merging(Letters):
    """Reads `ab` as one token (200): a merge that can cross the border of prompt and answer."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = super().__call__(text.replace("ab", "\xc8"), add_special_tokens=add_special_tokens)
        return ids


def ids(text: str) -> list[int]:
    """Letters to ids, without special tokens."""
    return [ord(letter) for letter in text]
