"""Photos, captions and metadata.jsonl in a folder, for tests; and what is found there."""

import json
import os
import time

import numpy as np
from PIL import Image

from pipeline.data.photos import list_photos


def age(path, seconds=3600):
    """Make a file look as if it was written some time ago, as photos mostly were."""
    os.utime(path, (time.time() - seconds,) * 2)


def photo(folder, name, caption="a cat", size=(8, 6)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    age(path)
    return path


def metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def captions(folder, prompt=""):
    photos, problems = list_photos(folder, prompt)
    assert problems == []
    return {found.name: found.caption for found in photos}


def problems(folder, prompt=""):
    return {problem.name: problem.reason for problem in list_photos(folder, prompt)[1]}


def link_out(folder, name):
    outside = photo(folder.parent, "outside.png", "private")
    (folder / name).symlink_to(outside)
