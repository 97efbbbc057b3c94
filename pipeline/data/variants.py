"""What training sees of a photo: at which sizes, which part of it, and whether mirrored.  Imports no MindSpore.

All variants of a photo are encoded once and kept; training draws one of them each time.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.data import buckets
from pipeline.data.buckets import CENTRE
from pipeline.data.indexing import IndexedPhoto
from pipeline.settings.fields import Data

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


class Example(NamedTuple):
    """What counts once in an epoch: a photo at a size.  Crop and flip are drawn each time it comes."""

    photo: IndexedPhoto
    size: Size


class Examples(Sequence):
    """The examples of an epoch, each made when it is asked for: all photos in turn, each at all its sizes, repeated.

    sizes: of each example.
    """

    def __init__(self, settings: Data, photos: Sequence[IndexedPhoto]):
        of_photo = sizes_of(settings)
        self._photos, self._per_photo = photos, len(squares(settings))
        self.sizes = [size for photo in photos for size in of_photo(photo)] * settings.repeats

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, place) -> Example:  # of a place; slices are not asked for
        size = self.sizes[place]
        return Example(self._photos[place // self._per_photo % len(self._photos)], size)


def sizes(settings: Data, photo: IndexedPhoto) -> list[Size]:
    """The sizes at which a photo is trained on, one for each resolution, the lowest first."""
    return sizes_of(settings)(photo)


def sizes_of(settings: Data) -> Callable[[IndexedPhoto], list[Size]]:
    """As `sizes`, for many photos of one experiment."""
    of_squares = squares(settings)
    if not settings.buckets:
        return lambda photo: of_squares
    return lambda photo: [_bucket(photo.width, photo.height, resolution) for resolution, _ in of_squares]


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
