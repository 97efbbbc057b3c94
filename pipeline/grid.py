"""Pictures side by side in one image: a row for each prompt, which stands above it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 192, 512
"""Sides of a picture in the grid, in pixels: smaller ones are enlarged by a whole factor, larger ones scaled down."""

MARGIN, FONT_SIZE = 12, 15
LINE_HEIGHT = 20
INK, PAPER = "black", "white"

Row = tuple[str, Sequence[Image.Image]]
"""A text and the pictures below it."""


def grid(headings: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """One image of all rows; each has a picture for each of the headings, all of one size."""
    font = ImageFont.load_default(FONT_SIZE)
    cells = [[legible(picture) for picture in pictures] for _, pictures in rows]
    across, down = cells[0][0].size
    width = MARGIN + len(headings) * (across + MARGIN)
    texts = [wrapped(text, width - 2 * MARGIN, font) for text, _ in rows]
    heights = [len(lines) * LINE_HEIGHT + down + 2 * MARGIN for lines in texts]
    image = Image.new("RGB", (width, 2 * MARGIN + LINE_HEIGHT + sum(heights)), PAPER)
    draw, places = ImageDraw.Draw(image), [MARGIN + number * (across + MARGIN) for number in range(len(headings))]
    for left, heading in zip(places, headings):
        draw.text((left, MARGIN), heading, INK, font)
    top = 2 * MARGIN + LINE_HEIGHT
    for lines, pictures, height in zip(texts, cells, heights):
        for number, line in enumerate(lines):
            draw.text((MARGIN, top + number * LINE_HEIGHT), line, INK, font)
        for left, picture in zip(places, pictures):
            image.paste(picture, (left, top + len(lines) * LINE_HEIGHT + MARGIN // 2))
        top += height
    return image


def legible(picture: Image.Image) -> Image.Image:
    """A small picture enlarged until its shorter side is SMALLEST, every pixel a square; a large one made smaller."""
    short, long = min(picture.size), max(picture.size)
    if short < SMALLEST:
        factor = -(-SMALLEST // short)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if long > LARGEST:
        size = tuple(max(1, round(side * LARGEST / long)) for side in picture.size)
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def wrapped(text: str, width: int, font) -> list[str]:
    """The lines of a text, none wider than ``width`` pixels; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while (kept := _fitting(lines[-1], width, font)) != lines[-1]:
            lines[-1:] = [kept, lines[-1][len(kept) :]]
    return lines


def _fitting(word: str, width: int, font) -> str:
    """As much of the beginning of a word as fits, one letter at least."""
    kept = word
    while len(kept) > 1 and font.getlength(kept) > width:
        kept = kept[:-1]
    return kept
