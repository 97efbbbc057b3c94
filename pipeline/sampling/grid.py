"""Pictures side by side in one image: a column for each prompt, which stands above it, and a row for each model."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pipeline.plan.pictures import LARGEST_SHOWN, SMALLEST_SHOWN

WIDEST = 1200
"""What would be wider than this, in pixels, goes on below."""

MARGIN, FONT_SIZE = 12, 15
LINE_HEIGHT = 20
INK, PAPER = "black", "white"

MOST_LINES = 24
"""Of a text above pictures."""

Column = tuple[str, Sequence[Image.Image]]
"""A text and the pictures below it."""


def grid(headings: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """One image of all columns; each has a picture for each of the headings, all of one size."""
    font = ImageFont.load_default(FONT_SIZE)
    across = legible(columns[0][1][0]).width
    aside = 2 * MARGIN + round(max(map(font.getlength, headings)))
    each = max(1, (WIDEST - aside) // (across + MARGIN))
    bands = [_band(headings, columns[at : at + each], aside, font) for at in range(0, len(columns), each)]
    image = Image.new("RGB", (max(band.width for band in bands), sum(band.height for band in bands) + MARGIN), PAPER)
    for number, band in enumerate(bands):
        image.paste(band, (0, sum(above.height for above in bands[:number])))
    return image


def _band(headings: Sequence[str], columns: Sequence[Column], aside: int, font) -> Image.Image:
    """Columns side by side.  aside: the width of what stands to the left of them, in pixels."""
    cells = [[legible(picture) for picture in pictures] for _, pictures in columns]
    across, down = cells[0][0].size
    texts = [wrapped(text, across, font) for text, _ in columns]
    top = MARGIN + max(map(len, texts)) * LINE_HEIGHT
    height = top + len(headings) * (down + MARGIN)
    image = Image.new("RGB", (aside + len(columns) * (across + MARGIN), height), PAPER)
    draw = ImageDraw.Draw(image)
    for row, heading in enumerate(headings):
        draw.text((MARGIN, top + row * (down + MARGIN) + down // 2), heading, INK, font, anchor="lm")
    for column, (lines, pictures) in enumerate(zip(texts, cells)):
        left = aside + column * (across + MARGIN)
        for number, line in enumerate(reversed(lines), start=1):
            draw.text((left, top - number * LINE_HEIGHT), line, INK, font)
        for row, picture in enumerate(pictures):
            image.paste(picture, (left, top + row * (down + MARGIN)))
    return image


def legible(picture: Image.Image) -> Image.Image:
    """A small picture enlarged to a shorter side of SMALLEST_SHOWN, every pixel a square; a large one made smaller."""
    short, long = min(picture.size), max(picture.size)
    if short < SMALLEST_SHOWN:
        factor = max(1, min(-(-SMALLEST_SHOWN // short), LARGEST_SHOWN // long))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if long > LARGEST_SHOWN:
        width, height = (max(1, round(side * LARGEST_SHOWN / long)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture


def wrapped(text: str, width: int, font) -> list[str]:
    """The lines of a text, none wider than ``width`` pixels; a word that is wider is cut, and so are many lines.

    Pillow's own font has Latin letters only: others show as boxes, and are in samples.json as they are.
    """
    lines = [""]
    for word in text.split():
        if len(lines) > MOST_LINES:
            break
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while len(lines) <= MOST_LINES and (kept := _fitting(lines[-1], width, font)) != lines[-1]:
            lines[-1:] = [kept, lines[-1][len(kept) :]]
    return [*lines[:MOST_LINES], "..."] if len(lines) > MOST_LINES else lines


def _fitting(word: str, width: int, font) -> str:
    """As much of the beginning of a word as fits, one letter at least."""
    fits, too_many = 1, len(word) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if font.getlength(word[:middle]) <= width:
            fits = middle
        else:
            too_many = middle
    return word[:fits]
