"""Images with captions, and texts beside them, on one sheet, for people to look at."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8  # pixels around images and text
INK, PAPER = (30, 30, 30), (255, 255, 255)
FRAME = (190, 190, 190)  # one pixel wide around an image, so that a white one is visible on the paper
MAX_LINES, MAX_CHARACTERS = 8, 600  # of a caption
Cell = Image.Image | str | None  # an image, a text in its place, or an empty place


def contact_sheet(
    images: Sequence[Cell],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    cell: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """Lays images of any sizes out in a grid, each in a thin frame with its caption wrapped below.

    Args:
        images: at least one cell; images of any mode. A text is written in the place of an image, None leaves it empty.
        captions: one per image (line breaks are kept), or None.
        columns: default: about a square grid, with at least four columns if there are four images.
        cell: side in pixels of the square that an image is fitted into; default: the largest side of all images,
            within 128 … 384. Smaller images are enlarged by whole factors without smoothing, so that single pixels
            stay visible.
        title: a line at the top.

    Returns:
        An RGB image.
    """
    assert images, "a contact sheet needs at least one image"
    assert captions is None or len(captions) == len(images), f"{len(images)} images, {len(captions)} captions"
    cell = cell or min(max(128, *(max(image.size) for image in images if isinstance(image, Image.Image)), 0), 384)
    columns = columns or min(len(images), max(4, math.ceil(math.sqrt(len(images)))))
    written = [title or "", *(captions or []), *(image for image in images if isinstance(image, str))]
    font, heading = (_font(size, written) for size in (max(12, cell // 14), max(14, cell // 10)))
    line_height = sum(font.getmetrics())
    texts = [_wrap(caption, font, cell) for caption in captions or [""] * len(images)]
    fitted = [_fit(image, cell) if isinstance(image, Image.Image) else _card(image, font, cell) for image in images]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    tallest = [max(fitted[index].height for index in row) for row in rows]
    heights = [
        tall + MARGIN + line_height * max(len(texts[index]) for index in row) + MARGIN
        for row, tall in zip(rows, tallest, strict=True)
    ]
    top = MARGIN + (sum(heading.getmetrics()) + MARGIN if title else 0)
    sheet = Image.new("RGB", (MARGIN + columns * (cell + MARGIN), top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, heading)
    for row, tall, height in zip(rows, tallest, heights, strict=True):
        for column, index in enumerate(row):
            left, image = MARGIN + column * (cell + MARGIN), fitted[index]
            x, y = left + (cell - image.width) // 2, top + (tall - image.height) // 2
            if isinstance(images[index], Image.Image):
                draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=FRAME)
            sheet.paste(image, (x, y))
            for number, line in enumerate(texts[index]):
                draw.text((left, top + tall + MARGIN // 2 + number * line_height), line, INK, font)
        top += height
    return sheet


def _font(size: int, texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font, which covers ASCII only; for other letters a system font, if there is one."""
    for name in () if all(text.isascii() for text in texts) else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size=size)


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """Fits an image into `cell` x `cell`, enlarged by a whole factor or shrunk smoothly; transparency becomes white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, PAPER)
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    image = image.convert("RGB")
    factor = cell // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _card(text: str | None, font: ImageFont.FreeTypeFont, cell: int) -> Image.Image:
    """A text as wide as an image, in at most as many lines as are as high as one; nothing without a text."""
    line_height = sum(font.getmetrics())
    lines = _wrap(text, font, cell, cell // line_height) if text else []
    card = Image.new("RGB", (cell, max(1, line_height * len(lines))), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(card).text((0, number * line_height), line, INK, font)
    return card


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; wider words are split, long texts end in "..."."""
    lines = []
    for paragraph in text[:MAX_CHARACTERS].splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
            while len(line) > 1 and font.getlength(line) > width:
                keep = next(n for n in range(1, len(line)) if font.getlength(line[: n + 1]) > width)
                lines.append(line[:keep])
                line = line[keep:]
        lines.append(line)
    lines = [line for line in lines if line]
    if len(lines) <= max_lines and len(text) <= MAX_CHARACTERS:
        return lines
    lines = lines[:max_lines] or [""]
    while lines[-1] and font.getlength(f"{lines[-1]} ...") > width:
        lines[-1] = lines[-1][:-1]
    return [*lines[:-1], f"{lines[-1]} ..."]
