"""Decoding sampled latents with the VAE, the only model in the process, and showing the pictures side by side."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cache import load_json, write_atomically
from cache.core.files import make_folder
from cache.terminal.places import shown
from pipeline.data import conditions, indexing
from pipeline.devices import dtypes, tensors
from pipeline.devices.tensors import to_storage
from pipeline.errors import UserError
from pipeline.plan import pictures
from pipeline.plan.pictures import Series
from pipeline.plan.plan import Plan
from pipeline.plan.whole import is_whole
from pipeline.process.progress import Progress, say
from pipeline.process.stopping import StopRequest
from pipeline.sampling import quick
from pipeline.sampling.shown import picture_of_all, to_picture, write_png


def is_done(plan: Plan) -> bool:
    """Whether the run's folder shows what the experiment asks for, all of it and nothing else."""
    wanted = pictures.listing(plan, pictures.all_series(plan))
    try:
        found = load_json(plan.run.samples_list.read_bytes())
    except (OSError, ValueError):
        return False
    return found == wanted and all(is_whole(plan.run.path / name) for name in pictures.names_in(wanted))


def decode(plan: Plan) -> dict:
    """Write the pictures that the run's folder lacks, the grid of all and, last, samples.json.

    Returns what the stage's record says.
    """
    pictures.check(plan.experiment, plan.method)
    outcome = _decoded(plan, pictures.all_series(plan))
    quick.remove(plan.run)
    return outcome


def decode_by_now(plan: Plan) -> None:
    """The same of what has been drawn by now, while the training may go on.  Raises UserError where nothing has."""
    pictures.check(plan.experiment, plan.method)
    several = [each for each in pictures.by_now(plan) if not each.missing()]
    if not several:
        raise UserError(
            f"{plan.run.path}: nothing has been drawn yet; while it trains, that begins with [sample] every = N"
        )
    _decoded(plan, several)


def _decoded(plan: Plan, several: Sequence[Series]) -> dict:
    listing, run = pictures.listing(plan, several), plan.run
    make_folder(run.samples)
    outcome = _decode_missing(plan, several, run.path)
    _write_conditions(plan, several[-1], run.path)
    write_png(run.samples_grid, picture_of_all(plan, listing["pictures"]))
    write_atomically(run.samples_list, json.dumps(listing, indent=2, ensure_ascii=False) + "\n")
    say(f"samples: {shown(run.samples_grid)}")
    return outcome


def _decode_missing(plan: Plan, several: Sequence[Series], folder: Path) -> dict:
    todo = [
        (each, item, folder / name)
        for each in several
        for item, name in zip(each.pictures, pictures.file_names(plan, each))
        if not is_whole(folder / name)
    ]
    if not todo:
        return {"decoded": 0}
    decoder, found = load_decoder(plan)
    with StopRequest() as stop, Progress("VAE", len(todo), "picture") as progress:
        for series, item, path in todo:
            picture = to_picture(decoder(series.entries.read(item)))
            plan.confirm(plan.family.image_encoder)
            write_png(path, picture)
            progress.advance()
            stop.check()
    return {"decoded": len(todo), "precision": found}


def load_decoder(plan: Plan) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """What makes of a picture's latents, (channels, height, width), its pixels, (3, height, width) in about [-1, 1].

    Also the VAE's dtypes, once it has decoded: where they are not what the policy says, that raises UserError.
    """
    import mindspore as ms

    component = plan.family.image_encoder
    policy, config = plan.policy(component), plan.config(component)
    vae = plan.load(component)
    found: dict[str, dict] = {}

    def decoded(latents):
        latents = plan.family.unscaled(latents[None], config)
        output = vae.decode(tensors.as_input(ms.Tensor(latents), policy))[0]
        if not found:
            found[component] = dtypes.found_in(vae, output, policy)
            dtypes.check(component, policy, found[component])
        return to_storage(output, "float32")[0]

    return decoded, found


def _write_conditions(plan: Plan, series: Series, folder: Path) -> None:
    """What the pictures are conditioned on, in the very pixels that were encoded."""
    for picture in series.pictures.values():
        photo = picture.condition
        if photo and not is_whole(path := folder / pictures.condition_name(plan, picture)):
            kind = plan.method.condition(plan.experiment)
            write_png(path, conditions.picture(photo, indexing.read_photo(photo), pictures.variant(plan), kind))
