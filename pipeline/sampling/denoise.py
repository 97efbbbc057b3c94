"""Sampling: the transformer, as it is and with what was trained, takes noise to the final latents of pictures.

As diffusers' FluxPipeline does it (arXiv:2209.03003, by Euler's method); the text is in the store, the VAE comes later.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np

from cache import caption_item
from pipeline import draws
from pipeline.data import conditions
from pipeline.devices import tensors
from pipeline.devices.tensors import to_storage
from pipeline.draws import Purpose
from pipeline.flux import flow
from pipeline.methods import observed
from pipeline.methods.tokens import pooled_reader
from pipeline.plan import pictures
from pipeline.plan.method import Trainee, untrained
from pipeline.plan.needs import note_needs
from pipeline.plan.pictures import BASE, Picture, Series
from pipeline.plan.plan import Plan
from pipeline.plan.shard import WHOLE, Shard
from pipeline.process.progress import Progress, say
from pipeline.process.stopping import StopRequest

Velocity = Callable[[np.ndarray, np.float32], np.ndarray]
"""Of x, (batch, tokens, channels), packed, and its noise level, in float32: what `flow.denoised` follows."""


Pooled = Callable[[list[str]], np.ndarray]
"""Reads what a network takes as ``pooled``, of captions' addresses."""


def sample(plan: Plan, shard: Shard = WHOLE) -> dict:
    """Draw the shard's pictures, of those that the experiment asks for and the store lacks.

    Returns what the stage's record says.

    Nothing is loaded where nothing is missing; what is drawn is kept whenever the stage ends.
    """
    pictures.check(plan.experiment, plan.method)
    note_needs(plan)  # before: what is drawn of them is kept, however the stage ends
    return _drawn(plan, pictures.all_series(plan), shard)


def _drawn(plan: Plan, series: Sequence[Series], shard: Shard) -> dict:
    todo = {each.name: _missing(each, shard) for each in series}
    drawn = sum(map(len, todo.values()))
    if not drawn:
        return {"drawn": 0}
    _say_guidance(series[-1])
    frozen, network = plan.load_frozen(), plan.family.network
    found: dict[str, dict] = {}
    for each in series:  # the base first: it is without the layers that are put in place for a LoRA
        if todo[each.name]:
            is_base = each.name == BASE
            model = untrained(plan, {network: frozen[network]}) if is_base else plan.method.load(plan, frozen)
            pooled = plan.pooled.read_many if is_base else pooled_reader(plan)
            found |= observed_precision(plan, model, pooled, todo[each.name])
            draw(plan, model, pooled, each, todo[each.name])
    counts = {name: len(missing) for name, missing in todo.items()}
    return {"drawn": drawn, "pictures": counts, "precision": found}


def _missing(series: Series, shard: Shard) -> dict[str, Picture]:
    with series.entries.writer():  # it takes over what a killed process had drawn, before anyone looks
        return {item: picture for item, picture in series.missing().items() if item in shard}


def _say_guidance(series: Series) -> None:
    if series.entries.recipe["guidance_scale"] is None:
        say("guidance_scale: not used, as this model has no guidance embedding")


def draw(plan: Plan, model: Trainee, pooled: Pooled, series: Series, missing: dict[str, Picture]) -> None:
    """Write the final latents of ``missing`` pictures, batch by batch.  Raises Stopped after one of them."""
    settings, items = plan.experiment.sample, iter(missing.items())
    sigmas = noise_levels(plan)
    size = settings.batch_size
    total = -(-len(missing) // size) * settings.num_inference_steps
    with StopRequest() as stop, Progress(f"sample {series.name}", total, "step") as progress:
        with series.entries.writer() as writer:
            while batch := dict(islice(items, size)):
                velocity = counted(velocity_of(plan, model, pooled, list(batch.values())), progress)
                latents = flow.denoised(noise(plan, batch.values()), sigmas, velocity)
                plan.confirm(plan.family.network)
                for item, each in zip(batch, plan.family.unpack(latents, *series.entries.shape[1:])):
                    writer.write(item, each, series.words(item))
                stop.check()


def noise_levels(plan: Plan) -> np.ndarray:
    """(steps + 1,), float32, from 1 to 0."""
    _, height, width = plan.latents(pictures.variant(plan)).shape
    return plan.family.sampling_levels(plan.model_folder, plan.experiment.sample.num_inference_steps, height, width)


def noise(plan: Plan, several: Iterable[Picture]) -> np.ndarray:
    """(batch, tokens, channels), packed: of each picture by its seed alone, whatever it is drawn with."""
    doubled, height, width = plan.latents(pictures.variant(plan)).shape
    shape = doubled // 2, height, width
    return plan.family.pack(np.stack([draws.normal(each.seed, Purpose.SAMPLE, 0, shape) for each in several]))


def counted(velocity: Velocity, progress: Progress) -> Velocity:
    def count(x, sigma):
        found = velocity(x, sigma)
        progress.advance()
        return found

    return count


def velocity_of(plan: Plan, model: Trainee, pooled_of: Pooled, batch: list[Picture]) -> Velocity:
    """What a model predicts for some pictures, whose inputs are read from the store once."""
    import mindspore as ms

    family = plan.family
    cast = functools.partial(tensors.as_input, policy=plan.policy(family.network))

    def tensor(array):
        return ms.Tensor(array) if array.dtype == np.int32 else cast(ms.Tensor(array.astype(np.float32)))

    _, height, width = plan.latents(pictures.variant(plan)).shape
    captions = [caption_item(picture.prompt) for picture in batch]
    txt, pooled = tensor(plan.txt.read_many(captions)), tensor(pooled_of(captions))
    txt_ids = ms.Tensor(family.txt_positions(txt.shape[1]))
    control = [tensor(control_of(plan, batch))] if plan.method.reads_conditions and model.trained else []
    is_guided, scale = family.is_guided(model.configs), plan.experiment.sample.guidance_scale
    guidance = tensor(np.full(len(batch), scale)) if is_guided else None

    def velocity(x, sigma):
        # As FluxPipeline does: in half precision it is rounded twice, in bfloat16 by up to 0.4 % each time.
        timestep = cast(tensor(np.full(len(batch), sigma * np.float32(1000))) / 1000)
        x, img_ids = family.sequence(x, height, width, None)
        found = model.predict(tensor(x), txt, pooled, timestep, ms.Tensor(img_ids), txt_ids, guidance, *control)
        return to_storage(found, "float32")

    return velocity


def control_of(plan: Plan, batch: Sequence[Picture]) -> np.ndarray:
    """The conditions' latents, (batch, tokens, channels): the posterior's mode, so that they are always the same."""
    own = pictures.variant(plan)
    entries = plan.latents(own, plan.method.condition(plan.experiment))
    photos = [picture.condition for picture in batch if picture.condition]
    posterior = entries.read_many([conditions.item(photo, own) for photo in photos])
    return plan.family.packed(posterior, None, plan.config(plan.family.image_encoder))


def observed_precision(plan: Plan, model: Trainee, pooled: Pooled, missing: dict[str, Picture]) -> dict:
    """What is found of the models in a first prediction.  Raises UserError where it is not what the policy says."""
    batch = list(missing.values())[: plan.experiment.sample.batch_size]
    velocity, sigma = velocity_of(plan, model, pooled, batch), noise_levels(plan)[0]
    return observed.precision(plan, model, lambda: velocity(noise(plan, batch), sigma))
