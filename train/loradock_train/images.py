"""Images in chat rows: which parts a message may have, what is wrong with one, and the picture itself.

A part is {"type": "text", "text": …}, {"type": "image_url", "image_url": {"url": …}} (a data: URL, or the path of a
file) or {"type": "image", "path": …}; paths are relative to the data file. The limits are those of OpenAI's vision
fine-tuning. A picture is made RGB as the engine makes it (turned by its EXIF, transparency over white): what is trained
on is what is seen at serving. Knows nothing of tokens.
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from loradock_train.errors import DataError, Problem

Message: TypeAlias = Mapping[str, Any]

MAX_IMAGES = 10
MAX_IMAGE_BYTES = 10_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
_DATA_URL = "data:image/"


class _ImageError(ValueError):
    """What is wrong with one image; said with its row by whoever knows the row."""


# ---- what a row holds -----------------------------------------------------------------------------------------------


def parts_of(message: Message) -> Sequence[Any]:
    """The parts of a message whose content is a list; none where it is a text."""
    content = message.get("content")
    return content if isinstance(content, list) else ()


def is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image_url", "image")


def sources_of(messages: Sequence[Message], file: str) -> list[str]:
    """The images of a conversation, in order: data: URLs as they are, paths resolved beside the data file."""
    sources = [_source(part) for message in messages for part in parts_of(message) if is_image(part)]
    return [source if ":" in source.partition("/")[0] else str(Path(file).parent / source) for source in sources]


def _source(part: Message) -> str:
    return str(part["image_url"]["url"] if part["type"] == "image_url" else part["path"])


def for_template(message: Message) -> dict[str, Any]:
    """The message as the engine hands it to a chat template that reads parts: a text is a part, an image its place."""
    content = message.get("content")
    if isinstance(content, str):
        parts: list[Any] = [{"type": "text", "text": content}]
    elif content is None:
        parts = []
    else:
        parts = [{"type": "image"} if is_image(part) else {"type": "text", "text": part["text"]} for part in content]
    return {**message, "content": parts}


def flat(message: Message) -> dict[str, Any]:
    """The message with its texts as one, a line each, as the engine hands it to a chat template that reads texts."""
    if isinstance(message.get("content"), list):
        texts = [part["text"] for part in parts_of(message) if not is_image(part)]
        return {**message, "content": "\n".join(texts)}
    return dict(message)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_parts(parts: Sequence[Any], role: Any, place: str, file: str | None) -> Iterator[str]:
    """What is wrong with the parts of one message. file: what images lie beside; None: there may be none."""
    if not parts:
        yield f"{place}: 'content' is an empty list"
    for index, part in enumerate(parts):
        where = f"{place}.content[{index}]"
        if not isinstance(part, Mapping):
            yield f"{where}: expected an object, found {type(part).__name__}"
        elif part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                yield f"{where}: missing or non-string 'text'"
        elif not is_image(part):
            yield f"{where}: invalid type {part.get('type')!r}; expected text, image_url or image"
        elif role != "user":
            yield f"{where}: images may stand in user messages only, not in those of {role!r}"
        elif file is None:
            yield f"{where}: images may stand in chat rows only"
        else:
            yield from _check_image(part, where, file)


def check_number(messages: Sequence[Any]) -> Iterator[str]:
    """Whether a conversation has more images than it may."""
    images = sum(is_image(part) for m in messages if isinstance(m, Mapping) for part in parts_of(m))
    if images > MAX_IMAGES:
        yield f"Example has {images} images; at most {MAX_IMAGES} are allowed"


def _check_image(part: Message, where: str, file: str) -> Iterator[str]:
    if part["type"] == "image_url":
        url = part.get("image_url")
        if not isinstance(url, Mapping) or not isinstance(url.get("url"), str):
            yield f'{where}: missing \'image_url\'; expected {{"image_url": {{"url": "data:image/png;base64,…"}}}}'
            return
    elif not isinstance(part.get("path"), str):
        yield f"{where}: missing or non-string 'path'"
        return
    try:
        (source,) = sources_of([{"content": [part]}], file)
        with Image.open(io.BytesIO(read_bytes(source)), formats=FORMATS) as image:
            image.verify()
    except _ImageError as error:
        yield f"{where}: {error}"
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        yield f"{where}: not a readable image; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def read_bytes(source: str) -> bytes:
    """The file behind a data: URL or a path. Raises ValueError that says what is wrong."""
    if "://" in source and not source.startswith("data:"):
        raise _ImageError(
            f"images are not fetched from {source.partition('://')[0]}:// addresses (what is there may change under a "
            "run); save it beside the data and give its path, or a data: URL"
        )
    content = _of_data_url(source) if source.startswith("data:") else _of_file(source)
    if len(content) > MAX_IMAGE_BYTES:
        raise _ImageError(f"an image of {len(content):,} bytes is over the limit of {MAX_IMAGE_BYTES:,}")
    return content


def _of_data_url(source: str) -> bytes:
    head, comma, body = source.partition(",")
    if not head.startswith(_DATA_URL) or not head.endswith(";base64") or not comma:
        raise _ImageError(f"not an image's data: URL ({head[:40]}…); expected data:image/png;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _ImageError(f"the data: URL is not valid base64: {error}") from None


def _of_file(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise _ImageError(f"no such image file: {source}") from None
    except OSError as error:
        raise _ImageError(f"the image file {source} cannot be read: {error.strerror}") from None


# ---- the picture ----------------------------------------------------------------------------------------------------


def load_image(source: str) -> Image.Image:
    """The picture, RGB, as the engine would see it. Raises DataError."""
    try:
        with Image.open(io.BytesIO(read_bytes(source)), formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError("an image cannot be read:", [Problem(_shown(source), str(error))]) from error
    if image.mode in ("RGBA", "LA", "PA") or (image.mode != "RGB" and "transparency" in image.info):
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image.paste(layer, mask=layer.split()[3])
    return image.convert("RGB")


def image_files(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Path and sha256 of every image that lies in a file of its own, each once, sorted."""
    paths = sorted({source for source in sources if not source.startswith("data:")})
    return [(path, hashlib.sha256(read_bytes(path)).hexdigest()) for path in paths]


def _shown(source: str) -> str:
    return source if not source.startswith("data:") else f"{source[:32]}… ({len(source):,} characters)"
