"""Images in rows: what is refused, with its place; and the picture as the engine would see it."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loradock_testing.rows import WriteRows
from loradock_testing.tiny_vision import data_url, png_bytes, square
from loradock_train.errors import DataError
from loradock_train.images import flat, load_image
from loradock_train.rows import read_rows

URL = data_url(square("red"))
ASKED = {"type": "text", "text": "What colour?"}
ANSWER = {"role": "assistant", "content": "red"}


def image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def conversation(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}, ANSWER]}


def test_images_by_url_and_by_path_are_read_beside_the_data(write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png_bytes(square("blue")))
    by_path = {"type": "image", "path": "pictures/a.png"}
    path = write_rows(
        "rows.jsonl", [conversation(image_url(URL), ASKED), conversation(by_path, image_url("pictures/a.png"))]
    )
    rows = read_rows((str(path),), "auto", "train_path")
    file = str(tmp_path / "pictures" / "a.png")
    assert [row.images for row in rows.rows] == [[URL], [file, file]]
    assert [name for name, _ in rows.files] == [str(path), file]


def test_changed_image_file_is_other_data(write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(square("blue")))
    path = write_rows("rows.jsonl", [conversation({"type": "image", "path": "a.png"})])
    before = read_rows((str(path),), "auto", "train_path").sha256
    (tmp_path / "a.png").write_bytes(png_bytes(square("red")))
    assert read_rows((str(path),), "auto", "train_path").sha256 != before


GIF = "data:image/gif;base64," + base64.b64encode(b"GIF89a").decode()
LARGE = "data:image/png;base64," + base64.b64encode(bytes(10_000_001)).decode()

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "web": (
        conversation(image_url("https://example.org/a.png")),
        "messages[0].content[0]: images are not fetched from https:// addresses",
    ),
    "missing-file": (conversation({"type": "image", "path": "no.png"}), "content[0]: no such image file: "),
    "no-path": (conversation({"type": "image"}), "content[0]: missing or non-string 'path'"),
    "bare-url": (conversation({"type": "image_url", "image_url": URL}), "content[0]: missing 'image_url'; expected"),
    "gif": (conversation(image_url(GIF)), "content[0]: not a readable image; expected JPEG, PNG or WEBP"),
    "base64": (conversation(image_url("data:image/png;base64,@@")), "content[0]: the data: URL is not valid base64"),
    "not-an-image-url": (conversation(image_url("data:text/plain,x")), "content[0]: not an image's data: URL"),
    "large": (conversation(image_url(LARGE)), "an image of 10,000,001 bytes is over the limit of 10,000,000"),
    "many": (conversation(*[image_url(URL)] * 11), "Example has 11 images; at most 10 are allowed"),
    "system": (
        conversation(image_url(URL), role="system"),
        "messages[0].content[0]: images may stand in user messages only, not in those of 'system'",
    ),
    "assistant": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [image_url(URL)]}]},
        "messages[1].content[0]: images may stand in user messages only",
    ),
    "type": (conversation({"type": "audio"}), "content[0]: invalid type 'audio'; expected text, image_url or image"),
    "part": (conversation("x"), "content[0]: expected an object, found str"),
    "text": (conversation({"type": "text", "text": 3}), "content[0]: missing or non-string 'text'"),
    "empty": (conversation(), "messages[0]: 'content' is an empty list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_names_line_and_part(write_rows: WriteRows, name: str) -> None:
    row, expected = BROKEN[name]
    path = write_rows("rows.jsonl", [conversation(image_url(URL)), row])
    with pytest.raises(DataError) as caught:
        read_rows((str(path),), "auto", "train_path")
    (problem,) = caught.value.problems
    assert problem.where == f"{path}, line 2"
    assert expected in problem.message


def test_transparent_picture_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(png_bytes(image))
    loaded = load_image(str(tmp_path / "a.png"))
    assert (loaded.mode, loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == ("RGB", (255, 0, 0), (255, 255, 255))


def test_turned_picture_is_seen_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert load_image(str(tmp_path / "a.jpg")).size == (2, 4)


def test_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(square("red", 64))[:-40])
    with pytest.raises(DataError, match=r"a\.png"):
        load_image(str(tmp_path / "a.png"))


def test_texts_of_parts_are_lines_for_a_template_that_reads_texts() -> None:
    assert flat({"role": "user", "content": [ASKED, {"type": "text", "text": "Say."}]}) == {
        "role": "user",
        "content": "What colour?\nSay.",
    }
