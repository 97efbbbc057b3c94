"""Sampling: the transformer, as it is and with what was trained, takes noise to the final latents of pictures.

As diffusers' FluxPipeline does it (arXiv:2209.03003, by Euler's method); the text is in the store, the VAE comes later.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cache import caption_item
from pipeline import draws
from pipeline.data import conditions, indexing
from pipeline.devices import dtypes
from pipeline.draws import Purpose
from pipeline.encode import to_storage
from pipeline.flux import checkpoints, flow, models
from pipeline.methods import controlnet, lora
from pipeline.plan import pictures
from pipeline.plan.pictures import BASE, Picture, Series
from pipeline.plan.plan import CONTROLNET, LORA, Plan
from pipeline.process.progress import Progress
from pipeline.process.stopping import StopRequest
from pipeline.training.loss import prediction
from pipeline.training.train import clip_tokens, load_frozen

Velocity = Callable[[np.ndarray, np.float32], np.ndarray]
"""Of x, (batch, tokens, channels), packed, and its noise level, in float32: what `flow.denoised` follows."""


@dataclass(frozen=True)
class Model:
    """What predicts.  predict: as of `loss.prediction`.  configs: of the networks.  frozen, trained: as
    `dtypes.precision` takes them.  pooled: reads what ``predict`` takes as such, of captions' addresses."""

    predict: Callable
    configs: list
    frozen: dict
    trained: dict
    pooled: Callable[[list[str]], np.ndarray]


def sample(plan: Plan, photos: Sequence[indexing.IndexedPhoto], folder: Path) -> dict:
    """Draw the pictures that the experiment asks for and the store lacks.  Returns what the stage's record says.

    folder: of the run.  Nothing is loaded where nothing is missing; what is drawn is kept whenever the stage ends.
    """
    series = pictures.all_series(plan, photos)
    todo = {each.name: _missing(each) for each in series}
    drawn = sum(map(len, todo.values()))
    if not drawn:
        return {"drawn": 0}
    _say_guidance(plan, series[-1])
    frozen, found = load_frozen(plan), {}
    for each in series:  # the base first: it is without the layers that are put in place for a LoRA
        if todo[each.name]:
            model = _base(plan, frozen) if each.name == BASE else LOADERS[plan.trains](plan, photos, frozen, folder)
            found |= observed_precision(plan, photos, model, todo[each.name])
            draw(plan, model, each, todo[each.name])
    counts = {name: len(missing) for name, missing in todo.items()}
    return {"drawn": drawn, "pictures": counts, "precision": found}


def _missing(series: Series) -> dict[str, Picture]:
    with series.entries.writer():  # it takes over what a killed process had drawn, before anyone looks
        return series.missing()


def _say_guidance(plan: Plan, series: Series) -> None:
    if series.entries.recipe["guidance_scale"] is None:
        print("guidance_scale: not used, as this checkpoint has no guidance embedding", flush=True)


def draw(plan: Plan, model: Model, series: Series, missing: dict[str, Picture]) -> None:
    """Write the final latents of ``missing`` pictures, batch by batch.  Raises Stopped after one of them."""
    settings, items = plan.experiment.sample, iter(missing.items())
    sigmas = noise_levels(plan)
    size = settings.batch_size
    total = -(-len(missing) // size) * settings.num_inference_steps
    with StopRequest() as stop, Progress(f"sample {series.name}", total, "step") as progress:
        with series.entries.writer() as writer:
            while batch := dict(islice(items, size)):
                velocity = counted(velocity_of(plan, model, list(batch.values())), progress)
                latents = flow.denoised(noise(plan, batch.values()), sigmas, velocity)
                plan.confirm("transformer")
                for item, each in zip(batch, flow.unpack(latents, *series.entries.shape[1:])):
                    writer.write(item, each, series.words(item))
                stop.check()


def noise_levels(plan: Plan) -> np.ndarray:
    """(steps + 1,), float32, from 1 to 0."""
    _, height, width = plan.latents(pictures.variant(plan)).shape
    return models.inference_sigmas(
        plan.checkpoint, plan.experiment.sample.num_inference_steps, height // 2 * (width // 2)
    )


def noise(plan: Plan, several: Iterable[Picture]) -> np.ndarray:
    """(batch, tokens, channels), packed: of each picture by its seed alone, whatever it is drawn with."""
    doubled, height, width = plan.latents(pictures.variant(plan)).shape
    shape = doubled // 2, height, width
    return flow.pack(np.stack([draws.normal(each.seed, Purpose.SAMPLE, 0, shape) for each in several]))


def counted(velocity: Velocity, progress: Progress) -> Velocity:
    def count(x, sigma):
        found = velocity(x, sigma)
        progress.advance()
        return found

    return count


def velocity_of(plan: Plan, model: Model, batch: list[Picture]) -> Velocity:
    """What a model predicts for some pictures, whose inputs are read from the store once."""
    import mindspore as ms

    cast = functools.partial(models.as_input, policy=plan.precision.transformer)

    def tensor(array):
        return ms.Tensor(array) if array.dtype == np.int32 else cast(ms.Tensor(array.astype(np.float32)))

    _, height, width = plan.latents(pictures.variant(plan)).shape
    captions = [caption_item(picture.prompt) for picture in batch]
    txt, pooled = tensor(plan.txt.read_many(captions)), tensor(model.pooled(captions))
    img_ids, txt_ids = map(ms.Tensor, (flow.image_ids(height, width), np.zeros((txt.shape[1], 3), np.float32)))
    control = [tensor(control_of(plan, batch))] if CONTROLNET in model.trained else []
    is_guided, scale = pictures.is_guided(model.configs), plan.experiment.sample.guidance_scale
    guidance = tensor(np.full(len(batch), scale)) if is_guided else None

    def velocity(x, sigma):
        # As FluxPipeline does: in half precision it is rounded twice, in bfloat16 by up to 0.4 % each time.
        timestep = cast(tensor(np.full(len(batch), sigma * np.float32(1000))) / 1000)
        found = model.predict(tensor(x), txt, pooled, timestep, img_ids, txt_ids, guidance, *control)
        return to_storage(found, "float32")

    return velocity


def control_of(plan: Plan, batch: Sequence[Picture]) -> np.ndarray:
    """The conditions' latents, (batch, tokens, channels): the posterior's mode, so that they are always the same."""
    own, vae = pictures.variant(plan), checkpoints.config(plan.checkpoint, "vae")
    entries = plan.latents(own, plan.experiment.controlnet.condition)
    posterior = entries.read_many([conditions.item(picture.condition, own) for picture in batch])
    latents = flow.sample_posterior(posterior, None)
    return flow.pack(flow.normalized(latents, vae["shift_factor"], vae["scaling_factor"]))


def observed_precision(plan: Plan, photos, model: Model, missing: dict[str, Picture]) -> dict:
    """What is found of the models in a first prediction.  Raises UserError where it is not what the policy says."""
    batch = list(missing.values())[: plan.experiment.sample.batch_size]
    velocity, sigma = velocity_of(plan, model, batch), noise_levels(plan)[0]
    return dtypes.precision(plan, photos, model.frozen, model.trained, lambda: velocity(noise(plan, batch), sigma))


# --- models -------------------------------------------------------------------------------------------------------


def _base(plan: Plan, frozen: dict) -> Model:
    transformer = frozen[lora.TRANSFORMER]
    return Model(
        prediction(transformer), [transformer.config], {lora.TRANSFORMER: transformer}, {}, plan.pooled.read_many
    )


def _with_lora(plan: Plan, photos: Sequence[indexing.IndexedPhoto], frozen: dict, folder: Path) -> Model:
    adapted = lora.Adapted(frozen, plan.experiment.lora, plan.precision.trained, plan.experiment.seed)
    plan.store.facts.file_digest(folder / lora.WEIGHTS_NAME)
    adapted.load(folder / lora.WEIGHTS_NAME)
    plan.store.facts.confirm([folder / lora.WEIGHTS_NAME])
    trained = {LORA: (adapted.first_layer(), adapted.trained)}
    tokens = clip_tokens(plan, photos)  # where CLIP has a LoRA too, it is here, and the store's pooled are another's

    def pooled(captions):
        return np.stack([tokens(each) for each in captions]) if tokens else plan.pooled.read_many(captions)

    return Model(prediction(**frozen), [frozen[lora.TRANSFORMER].config], frozen, trained, pooled)


def _with_controlnet(plan: Plan, photos: Sequence[indexing.IndexedPhoto], frozen: dict, folder: Path) -> Model:
    transformer, policy = frozen[lora.TRANSFORMER], plan.precision.trained
    own = folder / controlnet.FOLDER, checkpoints.CONTROLNET
    checkpoints.component_digest(*own, plan.store.facts)
    network = models.load_model(*own, policy.params)
    checkpoints.confirm(*own, plan.store.facts)
    controlnet.use_precision(network, policy)
    scale = plan.experiment.controlnet.conditioning_scale
    predict = prediction(transformer, controlnet=network, conditioning_scale=scale)
    layer = [*network.controlnet_blocks, *network.controlnet_single_blocks][0]
    trained = {CONTROLNET: (layer, list(network.get_parameters()))}
    return Model(predict, [transformer.config, network.config], frozen, trained, plan.pooled.read_many)


LOADERS = {LORA: _with_lora, CONTROLNET: _with_controlnet}
