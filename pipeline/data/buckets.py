"""Aspect-ratio buckets: a few sizes of about equal area, so that little of a photo that is no square is cut off."""

import numpy as np

AREA_TOLERANCE = 0.02
"""A bucket's area is above resolution**2 by no more than this part of it."""

CENTRE = "centre"


def bucket_sizes(resolution: int, step: int = 16, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """The (width, height) of every bucket in pixels, from the narrowest to the widest.

    All sides are multiples of ``step``.  One bucket for each short side, from ``resolution`` down to where the longer
    side would be more than ``max_ratio`` times the shorter; the long side is the multiple that brings the area nearest
    to resolution**2, or the one below where that would exceed AREA_TOLERANCE.  Each comes upright and lying.
    Raises ValueError where ``resolution`` is no multiple of ``step`` or ``max_ratio`` is below 1.
    """
    if resolution < step or resolution % step or max_ratio < 1:
        raise ValueError(
            f"buckets of {resolution} px: need a multiple of {step}, and a max_ratio of 1 or more, found {max_ratio}"
        )
    pairs = {(_long_side(resolution, short, step), short) for short in range(step, resolution + 1, step)}
    lying = {(long, short) for long, short in pairs if long <= max_ratio * short}
    return sorted(lying | {(short, long) for long, short in lying})


def _long_side(resolution: int, short: int, step: int) -> int:
    area = resolution**2
    below = area // short // step * step
    above = below + step
    nearer = above * short - area < area - below * short
    return above if nearer and above * short <= area * (1 + AREA_TOLERANCE) else below


def choose(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The one of ``sizes`` nearest to a photo of ``width`` x ``height`` in the logarithm of width / height.

    Of two that are equally near: the one nearer to the square, then the narrower.
    """

    def distance(size: tuple[int, int]) -> tuple:
        across, down = width * size[1], height * size[0]
        # A quotient in place of its logarithm: correctly rounded, so that equally near is equal on every machine.
        return max(across, down) / min(across, down), max(size) / min(size), size

    return min(sizes, key=distance)


def crop_box(
    digest: str, width: int, height: int, target_w: int, target_h: int, crop: str | int
) -> tuple[float, float, float, float]:
    """The part of a photo that is to be scaled to ``target_w`` x ``target_h`` pixels.

    digest: of the photo's file, 32 hexadecimal digits.  width, height: of the photo in pixels, upright.
    crop: CENTRE, or the number of a fixed random crop, from 0.  Returns (left, top, right, bottom) in pixels of the
    photo, fractions included, for Pillow's ``resize(size, resample, box)``.  The box is as large as `images.fit` has
    it: it spans the photo in one direction, and a random crop is free in the other alone.  There it lies whole pixels
    of the scaled photo from the edge, every such place as likely as another; only digest, number and sizes decide.
    Raises ValueError for another ``crop``.
    """
    scale = max(target_w / width, target_h / height)
    box_w, box_h = min(target_w / scale, width), min(target_h / scale, height)
    if crop == CENTRE:
        left, top = (width - box_w) / 2, (height - box_h) / 2  # to the bit what images.fit computes
    elif isinstance(crop, int) and crop >= 0:
        left, top = (_offset(digest, crop, room) / scale for room in _room(width, height, target_w, target_h))
        left, top = min(left, width - box_w), min(top, height - box_h)
    else:
        raise ValueError(f"crop must be {CENTRE!r} or a number from 0, found {crop!r}")
    return left, top, left + box_w, top + box_h


def _room(width: int, height: int, target_w: int, target_h: int) -> tuple[int, int]:
    """How many whole pixels of the scaled photo lie outside the target, across and down; one of them is 0."""
    if target_w * height >= target_h * width:
        return 0, height * target_w // width - target_h
    return width * target_h // height - target_w, 0


def _offset(digest: str, number: int, room: int) -> int:
    """Uniform over 0, ..., room; Philox keyed by the digest's 16 bytes, its counter set to the number of the crop."""
    key = np.frombuffer(bytes.fromhex(digest), "<u8").astype(np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, number], np.uint64))
    return int(np.random.Generator(philox).integers(room, endpoint=True))
