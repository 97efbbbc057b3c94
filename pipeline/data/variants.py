"""What training sees of a photo: at which sizes, which part of it, and whether mirrored.  Imports no MindSpore.

All variants of a photo are encoded once and kept; training draws one of them each time.
"""

import functools
from dataclasses import dataclass

from pipeline.data import buckets
from pipeline.data.buckets import CENTRE
from pipeline.data.indexing import IndexedPhoto
from pipeline.settings import Data

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, order=True)
class Variant:
    """One way in which a photo is encoded.  crop: as `buckets.crop_box` takes it; flip: mirrored, left to right."""

    width: int
    height: int
    crop: str | int = CENTRE
    flip: bool = False

    @property
    def recipe(self) -> dict:
        """Its part of an entry's address."""
        return vars(self) | {"crop": CENTRE if self.crop == CENTRE else f"random-{self.crop}"}


@dataclass(frozen=True)
class Sample:
    """What counts once in an epoch: a photo at a size.  Crop and flip are drawn each time it comes."""

    photo: IndexedPhoto
    width: int
    height: int

    @property
    def size(self) -> Size:
        return self.width, self.height


def sizes(settings: Data, photo: IndexedPhoto) -> list[Size]:
    """The sizes at which a photo is trained on, one for each resolution, the lowest first."""
    if not settings.buckets:
        return squares(settings)
    return [_bucket(photo.width, photo.height, resolution) for resolution, _ in squares(settings)]


def squares(settings: Data) -> list[Size]:
    """The size of a square photo at each resolution."""
    several = settings.resolution if isinstance(settings.resolution, tuple) else (settings.resolution,)
    return [(resolution, resolution) for resolution in sorted(several)]


def crops(settings: Data) -> list[str | int]:
    """The crops of a photo at each of its sizes."""
    return list(range(settings.crops)) or [CENTRE]


def flips(settings: Data) -> list[bool]:
    return [False, True] if settings.flip else [False]


def of_size(settings: Data, size: Size) -> list[Variant]:
    """All variants of a photo at one of its sizes."""
    return [Variant(*size, crop, flip) for crop in crops(settings) for flip in flips(settings)]


_bucket_sizes = functools.cache(buckets.bucket_sizes)


@functools.lru_cache(maxsize=1 << 16)  # photos of one camera have few sizes
def _bucket(width: int, height: int, resolution: int) -> Size:
    return buckets.choose(width, height, _bucket_sizes(resolution))
