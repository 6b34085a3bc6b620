"""Models that see: their processor, rows with images as token ids, and the batches that carry the pixels.

A chat is rendered by the processor's chat template, and each image's place in it becomes the tokens that the processor
makes of that image: what the engine does at serving. That the two agree is tried on the first row with an image.
Pixels are made when a batch is put together, so that a run holds no more of them than a batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import AutoProcessor, PreTrainedTokenizerBase

from loradock_train.chat import as_served
from loradock_train.config import TrainConfig
from loradock_train.dataset import Collator
from loradock_train.encode import IGNORED, Encoder, Example
from loradock_train.errors import DataError, ModelError, Problem
from loradock_train.images import for_template, is_image, load_image, parts_of, read_bytes
from loradock_train.model import sees
from loradock_train.proof import MAX_PROMPT_TOKENS
from loradock_train.rows import Format, Row, Rows

TEXT_KEYS = frozenset({"input_ids", "attention_mask"})


def make_processor(config: TrainConfig, architecture: Any, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor of a model that sees; None of one that does not. Raises ModelError, DataError."""
    if not sees(architecture):
        if rows.has_images:
            first = next(row for row in rows.rows if row.images)
            kind = getattr(architecture, "model_type", None) or (config.model or {}).get("model_type")
            raise DataError(
                f"the rows show images, and a {kind} model sees none (idefics3 and smolvlm do):",
                [Problem(first.where, "the first row with an image")],
            )
        return None
    try:
        processor = cast(Any, AutoProcessor).from_pretrained(config.model_id, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"model_id {config.model_id}: its processor cannot be loaded: {told}") from error
    if not hasattr(processor, "image_processor") or getattr(processor, "image_token_id", None) is None:
        raise ModelError(
            f"model_id {config.model_id}: {type(processor).__name__} marks images in a way that is not trained here; "
            "Idefics3 and SmolVLM are"
        )
    processor.tokenizer = tokenizer  # one vocabulary, one template
    processor.chat_template = tokenizer.chat_template
    return processor


def make_encoder(config: TrainConfig, tokenizer: Any, processor: Any) -> Encoder:
    """How this run turns rows into tokens."""
    if processor is None:
        return Encoder(tokenizer, config.append_eos, config.prompt_template)
    return VisionEncoder(tokenizer, config.append_eos, config.prompt_template, processor)


@dataclass(frozen=True)
class VisionEncoder(Encoder):
    """Chats whose messages may show images."""

    processor: Any = None
    _expansions: dict[str, list[int]] = field(default_factory=dict, compare=False, repr=False)
    """By the image's hash: many rows may show one."""

    def expansion(self, source: str) -> list[int]:
        """The tokens that stand for an image."""
        key = hashlib.sha256(read_bytes(source)).hexdigest()
        if key not in self._expansions:
            image = load_image(source)
            made = self.processor(text=[self.processor.image_token], images=[[image]], add_special_tokens=False)
            self._expansions[key] = [int(token) for token in made["input_ids"][0]]
        return self._expansions[key]

    def check(self, row: Row) -> None:
        """Raises ModelError where the processor makes another thing of the row as a whole. `row` shows an image."""
        messages, tools = as_served(row.values)
        text = self._render([self._message(message) for message in messages], tools, generation=False, row=row)
        images = [load_image(source) for source in row.images]
        made = self.processor(text=[text], images=[images], add_special_tokens=False)
        pixels = self.processor.image_processor(images=[images])
        unknown = sorted(set(made) - TEXT_KEYS - set(pixels))
        name = type(self.processor).__name__
        if unknown:
            raise ModelError(f"{name} gives {', '.join(unknown)} too, which is not trained here")
        if [int(token) for token in made["input_ids"][0]] != self.encode(row, "chat").input_ids:
            raise ModelError(f"{name} places images in a way that is not trained here (row {row.where})")

    def _check_images(self, row: Row) -> None:
        """It sees them all."""

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        return for_template(message)

    def _renderer(self) -> Any:
        return self.processor

    def _chat(self, row: Row) -> Example:
        """As without images; then each image's token becomes those that stand for the image, none of them learnt."""
        example = super()._chat(row)
        sources = row.images
        places = [index for index, token in enumerate(example.input_ids) if token == self.processor.image_token_id]
        if len(places) != len(sources):
            told = f"{len(sources)} images, but {len(places)} times {self.processor.image_token} after rendering"
            raise DataError("the chat template and the images disagree:", [Problem(row.where, told)])
        ids, labels = list(example.input_ids), list(example.labels)
        for place, source in reversed(list(zip(places, sources, strict=True))):
            tokens = self.expansion(source)
            ids[place : place + 1] = tokens
            labels[place : place + 1] = [IGNORED] * len(tokens)
        end = max((index + 1 for index, token in enumerate(ids) if token == self.processor.image_token_id), default=0)
        return Example(ids, labels, tuple(sources), end)


@dataclass(frozen=True)
class VisionCollator:
    """Batches of tokens, and the pixels of their images. C: channels; H, W: of a tile."""

    text: Collator
    image_processor: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.text(rows)
        return batch | pixels_of(self.image_processor, [[str(s) for s in row.get("images", ())] for row in rows])


def check_images(encoder: Encoder, rows: Rows, packing: bool, has_task: bool) -> None:
    """What must hold of rows with images before they are encoded. Raises ModelError, DataError."""
    first = next((row for row in rows.rows if row.images), None)
    if first is None or not isinstance(encoder, VisionEncoder):
        return
    if packing:
        raise ModelError("packing: rows with images are not packed; set packing: false")
    if has_task:
        raise ModelError("task: rows with images are scored by similarity:, not by a task")
    by_number = {len(row.images): row for row in reversed(rows.rows) if row.images}
    for row in by_number.values():
        encoder.check(row)


def probes_of(
    encoder: Encoder, rows: Sequence[Row], row_format: Format
) -> tuple[list[list[int]], dict[int, dict[str, torch.Tensor]]]:
    """The prompts of some rows, and the pixels of those with images, by number.

    A row with images gives two: the one without them is what the server can ask by tokens alone.
    """
    prompts = [encoder.prompt_ids(_without_images(row), row_format)[:MAX_PROMPT_TOKENS] for row in rows]
    pixels: dict[int, dict[str, torch.Tensor]] = {}
    for row in rows:
        if row.images and isinstance(encoder, VisionEncoder):
            ids = encoder.prompt_ids(row, row_format)
            shown = sum(is_image(part) for m in _before_answer(row) for part in parts_of(m))
            pixels[len(prompts)] = pixels_of(encoder.processor.image_processor, [row.images[:shown]])
            prompts.append(ids)
    return prompts, pixels


def _before_answer(row: Row) -> list[dict[str, Any]]:
    """The messages before the first that is learnt."""
    messages: list[dict[str, Any]] = row.values["messages"]
    learnt = (i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) == 1)
    return messages[: next(learnt)]


def _without_images(row: Row) -> Row:
    if not row.images:
        return row
    messages = [dict(message) for message in row.values["messages"]]
    for message in messages:
        if parts_of(message):
            texts = [part for part in message["content"] if not is_image(part)]
            message["content"] = texts or [{"type": "text", "text": ""}]
    return replace(row, values={**row.values, "messages": messages})


def loss_sample(rows: Any, processor: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens of a training row on which two ways to the loss are compared, and its pixels: the first with an image,
    where there is one."""
    number, sources = 0, []
    if "images" in rows.column_names:
        shown = [list(map(str, images)) for images in rows["images"]]
        number = next((index for index, images in enumerate(shown) if images), 0)
        sources = shown[number]
    pixels = pixels_of(processor.image_processor, [sources]) if sources else {}
    return torch.as_tensor(rows[number]["input_ids"]), pixels


def pixels_of(image_processor: Any, sources: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
    """What the model gets beside the tokens: for Idefics3 pixel_values (rows, tiles, C, H, W) and their mask; nothing
    where no row shows an image."""
    if not any(sources):
        return {}
    images = [[load_image(source) for source in row] for row in sources]
    made = image_processor(images=images, return_tensors="pt")
    return {name: cast(torch.Tensor, value) for name, value in made.items()}
