"""What a file says of itself: ModelSpec, which programs show, and the hashes of sd-scripts.

https://github.com/Stability-AI/ModelSpec.  The fields are those of sd-scripts' `library/sai_model_spec.py`, the hashes
those of its `library/train_util.py`.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from cache import header_of
from pipeline.data import images
from pipeline.errors import UserError

VERSION = "1.0.1"
IMPLEMENTATION = "https://github.com/black-forest-labs/flux"
NATIVE_RESOLUTION = "1024x1024"
THUMBNAIL_PIXELS, THUMBNAIL_QUALITY = 256, 85
PREFIX = "modelspec."
LEGACY_BEGIN, LEGACY_LENGTH = 0x100000, 0x10000
"""Which bytes of a file the older hash of stable-diffusion-webui is of."""

Shapes = Mapping[str, tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class About:
    """What is said of a file besides what its tensors say.

    kept: metadata that is true of it whatever the layout.  date: seconds since 1970.  resolution: as "512x512".
    thumbnail: a data URI.  merged_from: the names of what it was made of.
    """

    title: str
    date: float
    resolution: str = ""
    trigger: str = ""
    thumbnail: str = ""
    description: str = ""
    merged_from: str = ""
    kept: Mapping[str, str] = field(default_factory=dict)


def architecture(config: Mapping, kind: str) -> str:
    """kind: "lora", "controlnet"; "" is a transformer itself."""
    return ("flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell") + (f"/{kind}" if kind else "")


def constant(config: Mapping, kind: str, title: str, resolution: str) -> dict[str, str]:
    """The fields that every file must have."""
    fields = {"sai_model_spec": VERSION, "architecture": architecture(config, kind), "implementation": IMPLEMENTATION}
    return _named(fields | {"title": title, "resolution": resolution or NATIVE_RESOLUTION})


def of_lora(about: About, config: Mapping, arrays: Iterable[np.ndarray]) -> dict[str, str]:
    """arrays: in the order in which they will stand in the file."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(_bytes(array))
    return of_file(about, config, "lora") | _named({"hash_sha256": f"0x{hashed.hexdigest()}"})


def of_file(about: About, config: Mapping, kind: str) -> dict[str, str]:
    """The same without the hash, of a file whose tensors are not at hand at once."""
    date = datetime.fromtimestamp(about.date, UTC).replace(tzinfo=None).isoformat(timespec="seconds")
    fields = {"date": date, "trigger_phrase": about.trigger, "thumbnail": about.thumbnail}
    fields |= {"description": about.description, "merged_from": about.merged_from}
    known = {key: value for key, value in about.kept.items() if key.startswith(PREFIX)}
    return {"format": "pt"} | known | constant(config, kind, about.title, about.resolution) | _named(fields)


def _named(fields: Mapping[str, str]) -> dict[str, str]:
    return {PREFIX + key: value for key, value in fields.items() if value}


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def sshs_hashes(path: Path, shapes: Shapes, arrays: Iterable[np.ndarray], metadata: Mapping[str, str]) -> dict:
    """sshs_model_hash, of all tensors' bytes; sshs_legacy_hash, of 64 KiB of a file with ss_ metadata alone."""
    own = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = header_of(path, shapes, own)
    hashed, end = hashlib.sha256(), LEGACY_BEGIN + LEGACY_LENGTH
    slice_, position = header[LEGACY_BEGIN:end], len(header)
    for array in arrays:
        data = _bytes(array)
        hashed.update(data)
        if position < end:
            slice_ += bytes(data[max(0, LEGACY_BEGIN - position) : end - position])
        position += data.nbytes
    legacy = hashlib.sha256(slice_).hexdigest()[:8]
    return {"sshs_model_hash": hashed.hexdigest(), "sshs_legacy_hash": legacy}


def thumbnail(path: Path) -> str:
    """A picture of at most 256 pixels, as a data URI of a JPEG.  Raises UserError where it cannot be read."""
    try:
        small = images.read_image(path)
    except images.BadImage as error:
        raise UserError(f"{path}: {error}; name another picture by --thumbnail") from None
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
