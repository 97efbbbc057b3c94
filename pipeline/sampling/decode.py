"""Decoding sampled latents with the VAE, the only model in the process, and showing the pictures side by side."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cache import write_atomically
from cache.core.files import make_folder
from pipeline.data import conditions, indexing
from pipeline.devices import dtypes
from pipeline.encode import to_storage
from pipeline.flux import checkpoints, flow, models
from pipeline.plan import pictures
from pipeline.plan.pictures import BASE, CONDITION, TRAINED, Series
from pipeline.plan.plan import CONTROLNET, LORA, Plan
from pipeline.process.progress import Progress
from pipeline.process.stopping import StopRequest
from pipeline.sampling.grid import grid

HEADINGS = {CONDITION: "condition", BASE: "base", LORA: "with the LoRA", CONTROLNET: "with the ControlNet"}


def is_done(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> bool:
    """Whether the run's folder shows what the experiment asks for, all of it and nothing else."""
    folder, wanted = plan.run_folder(photos), pictures.listing(plan, photos)
    try:
        found = json.loads((folder / pictures.LIST_NAME).read_text())
    except (OSError, ValueError):
        return False
    return found == wanted and all((folder / name).is_file() for name in pictures.names_in(wanted))


def decode(plan: Plan, photos: Sequence[indexing.IndexedPhoto], folder: Path) -> dict:
    """Write the pictures that ``folder`` lacks, the grid of all and, last, samples.json.

    folder: of the run.  Returns what the stage's record says.
    """
    listing = pictures.listing(plan, photos)
    make_folder(folder / pictures.FOLDER)
    outcome = _decode_missing(plan, pictures.all_series(plan, photos), folder)
    _write_conditions(plan, pictures.trained(plan, photos), folder)
    write_png(folder / pictures.GRID_NAME, _grid(plan, listing, folder))
    write_atomically(folder / pictures.LIST_NAME, json.dumps(listing, indent=2, ensure_ascii=False) + "\n")
    print(f"samples: {folder / pictures.GRID_NAME}", flush=True)
    return outcome


def _decode_missing(plan: Plan, several: Sequence[Series], folder: Path) -> dict:
    todo = [
        (each, item, folder / name)
        for each in several
        for item, name in zip(each.pictures, pictures.file_names(plan, each))
        if not (folder / name).is_file()
    ]
    if not todo:
        return {"decoded": 0}
    decoder, found = load_decoder(plan)
    with StopRequest() as stop, Progress("VAE", len(todo), "picture") as progress:
        for series, item, path in todo:
            picture = to_picture(decoder(series.entries.read(item)))
            plan.confirm("vae")
            write_png(path, picture)
            progress.advance()
            stop.check()
    return {"decoded": len(todo), "precision": found}


def load_decoder(plan: Plan) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """What makes of a picture's latents, (channels, height, width), its pixels, (3, height, width) in about [-1, 1].

    Also the VAE's dtypes, once it has decoded: where they are not what the policy says, that raises UserError.
    """
    import mindspore as ms

    policy, config = plan.precision.vae, checkpoints.config(plan.checkpoint, "vae")
    vae, found = models.load_component(plan, "vae"), {}

    def decoded(latents):
        latents = flow.unnormalized(latents[None], config["shift_factor"], config["scaling_factor"])
        output = vae.decode(models.as_input(ms.Tensor(latents), policy))[0]
        if not found:
            found["vae"] = dtypes.found_in(vae, output, policy)
            dtypes.check("vae", policy, found["vae"])
        return to_storage(output, "float32")[0]

    return decoded, found


def to_picture(pixels: np.ndarray) -> Image.Image:
    """(3, height, width) in [-1, 1], what is outside cut off, as an image of 8 bits."""
    scaled = np.clip(pixels.transpose(1, 2, 0) * 0.5 + 0.5, 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def write_png(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _write_conditions(plan: Plan, series: Series, folder: Path) -> None:
    """What the pictures are conditioned on, in the very pixels that were encoded."""
    for picture in filter(lambda each: each.condition, series.pictures.values()):
        path = folder / pictures.condition_name(plan, picture)
        if not path.is_file():
            photo, kind = picture.condition, plan.experiment.controlnet.condition
            write_png(path, conditions.picture(photo, indexing.read_photo(photo), pictures.variant(plan), kind))


def _grid(plan: Plan, listing: dict, folder: Path) -> Image.Image:
    names = [name for name in (CONDITION, BASE, TRAINED) if name in listing["pictures"][0]]
    headings = [HEADINGS[plan.trains if name == TRAINED else name] for name in names]
    columns = []
    for row in listing["pictures"]:
        text = f"seed {row['seed']}: {row['prompt']}"
        columns.append((text, [Image.open(folder / row[name]) for name in names]))
    return grid(headings, columns)
