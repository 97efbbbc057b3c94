"""Write 12 captioned crops of a photo of a cat: ``python examples/twelve_photos.py FOLDER``.

The photo is "Chelsea" of scikit-image, which has it in its wheel: nothing is downloaded.
"""

import sys
from pathlib import Path

from PIL import Image
from skimage import data

CROPS = {
    "the whole head": [(60, 0, 360, 300), (80, 0, 380, 300), (100, 0, 400, 300)],
    "from close by": [(110, 40, 310, 240), (130, 50, 330, 250), (120, 70, 320, 270)],
    "the eyes": [(100, 60, 260, 220), (180, 60, 340, 220), (140, 50, 300, 210)],
    "the nose and the whiskers": [(140, 130, 300, 290), (160, 120, 320, 280), (120, 130, 280, 290)],
}
"""What is seen, and the crops' left, upper, right and lower edges in pixels."""


def main(folder: Path) -> None:
    photo, number = Image.fromarray(data.chelsea()), 0
    folder.mkdir(parents=True, exist_ok=True)
    for words, boxes in CROPS.items():
        for box in boxes:
            number += 1
            photo.crop(box).save(folder / f"cat{number:02}.jpg", quality=92)
            (folder / f"cat{number:02}.txt").write_text(f"a photo of sks cat, {words}\n")
    print(f"{folder}: {number} photos and their captions")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python examples/twelve_photos.py FOLDER")
    main(Path(sys.argv[1]))
