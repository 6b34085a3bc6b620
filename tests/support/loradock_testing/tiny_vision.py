"""A tiny real Idefics3 (and Idefics2, SmolVLM) for tests: a two-layer vision tower, a connector, a small Llama, and the
processor beside them.

Random but seeded, made on the spot in a second: nothing is downloaded, and torchvision is not needed. An image of any
size becomes one of 32 x 32 pixels and four image tokens. Knows nothing of vLLM and nothing of Loradock.
"""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from loradock_testing.tiny_models import make_tokenizer

IMAGE_SIZE, PATCH_SIZE, SCALE = 32, 8, 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE) ** 2
SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>")

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The shape of Idefics3's own."""

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


def make_idefics3(directory: Path, seed: int = 0, *, hidden: int = 64, text_layers: int = 2) -> Path:
    """Save a random Idefics3 with tokenizer and processor, and return the directory."""
    tokenizer = make_tokenizer(directory)
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL)})
    tokenizer.add_special_tokens({"pad_token": "<unk>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=True
        ),
        tokenizer,
        image_seq_len=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Idefics3ForConditionalGeneration(_config(tokenizer, hidden, text_layers))  # type: ignore[no-untyped-call]
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        processor.tokenizer.convert_tokens_to_ids(SPECIAL[2]),
    ]
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _config(tokenizer: PreTrainedTokenizerFast, hidden: int, text_layers: int) -> Idefics3Config:
    options: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Idefics3Config(
        **options,
        image_token_id=tokenizer.get_vocab()["<image>"],
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=SCALE,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "initializer_range": 0.1,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "initializer_range": 1.5 * hidden**-0.5,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        dtype=torch.float32,
    )


def make_idefics2(directory: Path, seed: int = 0) -> Path:
    """Save a random Idefics2 with tokenizer and processor, and return the directory."""
    tokenizer = make_tokenizer(directory)
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL[:3]), "pad_token": "<unk>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    pictures = Idefics2ImageProcessorPil(
        size={"shortest_edge": 24, "longest_edge": IMAGE_SIZE}, do_image_splitting=False
    )
    processor = Idefics2Processor(pictures, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)
    vision: Any = _config(tokenizer, 64, 2).vision_config
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    resampler = {"resampler_n_latents": IMAGE_TOKENS, "resampler_depth": 1, "resampler_n_heads": 2}
    resampler |= {"resampler_head_dim": 32, "num_key_value_heads": 1, "hidden_size": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Idefics2Config(
        image_token_id=tokenizer.get_vocab()["<image>"],
        tie_word_embeddings=False,
        vision_config={key: value for key, value in vision.to_dict().items() if key != "model_type"},
        perceiver_config=resampler,
        text_config={"model_type": "mistral", "max_position_embeddings": 512, **sizes, **heads, **tokens},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Idefics2ForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def make_smolvlm(directory: Path, seed: int = 0) -> Path:
    """The same as a SmolVLM, whose processor needs torchvision and num2words."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    make_idefics3(directory, seed)
    processor = Idefics3Processor.from_pretrained(directory)
    edge = {"longest_edge": IMAGE_SIZE}
    pictures = SmolVLMImageProcessorPil(size=edge, max_image_size=edge)
    videos: Any = SmolVLMVideoProcessor()
    made = SmolVLMProcessor(pictures, processor.tokenizer, videos, IMAGE_TOKENS, CHAT_TEMPLATE)
    config = _config(processor.tokenizer, 64, 2).to_dict()
    config["vision_config"].pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fields = ("image_token_id", "pad_token_id", "scale_factor", "vision_config", "text_config")
        model: Any = SmolVLMForConditionalGeneration(SmolVLMConfig(**{name: config[name] for name in fields}))  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    made.save_pretrained(directory)
    return directory


def square(colour: str, size: int = 24) -> Image.Image:
    """A square of one colour."""
    return Image.new("RGB", (size, size), COLOURS[colour])


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """The image as chat requests carry it."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
