"""Sampling: the transformer, as it is and with what was trained, takes noise to the final latents of pictures.

As diffusers' FluxPipeline does it (arXiv:2209.03003, by Euler's method); the text is in the store, the VAE comes later.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from cache import caption_item
from pipeline import draws
from pipeline.data import conditions
from pipeline.devices import tensors
from pipeline.devices.tensors import to_storage
from pipeline.draws import Purpose
from pipeline.estimate import estimates
from pipeline.estimate.subject import Subject
from pipeline.flux import flow
from pipeline.methods import kept, observed
from pipeline.methods.tokens import pooled_reader
from pipeline.plan import mode, pictures, prior
from pipeline.plan.method import Trainee, untrained
from pipeline.plan.needs import note_needs
from pipeline.plan.pictures import Drawing, Picture, Series
from pipeline.plan.plan import Plan
from pipeline.plan.shard import WHOLE, Shard
from pipeline.process.progress import Progress, say
from pipeline.process.stopping import StopRequest
from pipeline.settings.values import Mode

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


def draw_prior(plan: Plan, shard: Shard = WHOLE) -> dict:
    """Draw the shard's pictures that the experiment's [prior] asks for and the store lacks; as `sample`."""
    return _drawn(plan, prior.series(plan), shard)


def _drawn(plan: Plan, series: Sequence[Series], shard: Shard) -> dict:
    todo = {each.name: _missing(each, shard) for each in series}
    drawn = sum(map(len, todo.values()))
    if not drawn:
        return {"drawn": 0}
    _say_guidance(series[-1])
    wanted = [each for each in series if todo[each.name]]
    models = Models(plan, is_trained=any(each.result for each in wanted))
    found: dict[str, dict] = {}
    modes: dict[str, str] = {}
    for each in wanted:
        with models.of(each) as (model, pooled):
            found |= observed_precision(plan, each.drawing, model, pooled, todo[each.name])
            modes[each.name] = draw(plan, model, pooled, each, todo[each.name])
    counts = {name: len(missing) for name, missing in todo.items()}
    return {"drawn": drawn, "pictures": counts, "modes": modes, "precision": found}


class Models:
    """What draws several series, loaded once.  is_trained: whether any of them is drawn with a result."""

    def __init__(self, plan: Plan, is_trained: bool):
        network = plan.family.network
        self._plan = plan
        self._trained: Trainee | None = None
        self._frozen = plan.load_frozen() if is_trained else {network: plan.load(network)}

    @contextmanager
    def of(self, series: Series) -> Iterator[tuple[Trainee, Pooled]]:
        """A block for what draws one.  The base comes first: it is without the layers that a LoRA puts in place."""
        plan, network = self._plan, self._plan.family.network
        if series.result is None:
            yield untrained(plan, {network: self._frozen[network]}), plan.pooled.read_many
            return
        if self._trained is None or self._trained.as_saved is None:
            self._trained = plan.method.load(plan, self._frozen, series.result)
            yield self._trained, pooled_reader(plan)
            return
        with self._trained.as_saved(series.result):
            yield self._trained, pooled_reader(plan)


def _missing(series: Series, shard: Shard) -> dict[str, Picture]:
    with series.entries.writer():  # it takes over what a killed process had drawn, before anyone looks
        return {item: picture for item, picture in series.missing().items() if item in shard}


def _say_guidance(series: Series) -> None:
    if series.entries.recipe["guidance_scale"] is None:
        say("guidance_scale: not used, as this model has no guidance embedding")


def draw(
    plan: Plan, model: Trainee, pooled: Pooled, series: Series, missing: dict[str, Picture], asked: Mode | None = None
) -> Mode:
    """Write the final latents of ``missing`` pictures, batch by batch.  Raises Stopped after one of them.

    asked: the mode; None for what [sample] says.  Returns the mode that predictions were computed in.
    """
    drawing, batches = series.drawing, in_batches(list(missing), series.drawing.batch_size)
    sigmas = noise_levels(plan, drawing)
    total = len(batches) * drawing.num_inference_steps
    size = drawing.size.width, drawing.size.height
    chosen, reason = estimates.drawing_mode(Subject.of_plan(plan), size, len(batches[0]), total, asked)
    if chosen == "jit":
        say(f"mode: jit, {reason}")
    with StopRequest() as stop, Progress(f"sample {series.name}", total, "step") as progress:
        if chosen == "jit":
            predict = kept.compiled_prediction(plan, model, partial(_say_compiling, plan, model, progress))
            model = dataclasses.replace(model, predict=predict)
        with series.entries.writer() as writer:
            for items in batches:
                batch = [missing[item] for item in items]
                velocity = counted(velocity_of(plan, drawing, model, pooled, batch), progress)
                latents = flow.denoised(noise(plan, drawing, batch), sigmas, velocity)
                plan.confirm(plan.family.network)
                for item, each in dict(zip(items, plan.family.unpack(latents, *series.entries.shape[1:]))).items():
                    writer.write(item, each, series.words(item))
                stop.check()
    return chosen


def _say_compiling(plan: Plan, model: Trainee, progress: Progress, folder: Path | None) -> None:
    progress.say_now(mode.compiling(plan.device, num_blocks(plan, model), folder))


def in_batches(items: Sequence[str], most: int) -> list[list[str]]:
    """Batches of one size, the smallest in which none is larger than ``most`` and there are as few as can be.

    What lacks in the last one is its last item once more: another size would have to be compiled for itself.
    """
    size = math.ceil(len(items) / math.ceil(len(items) / most))
    starts = range(0, len(items), size)
    return [[items[min(at, len(items) - 1)] for at in range(start, start + size)] for start in starts]


def num_blocks(plan: Plan, model: Trainee) -> int:
    """Of all networks that predict."""
    return sum(len(plan.family.blocks_of(each)) for each in model.networks.values())


def noise_levels(plan: Plan, drawing: Drawing) -> np.ndarray:
    """(steps + 1,), float32, from 1 to 0."""
    _, height, width = plan.latents(drawing.size).shape
    return plan.family.sampling_levels(plan.model_folder, drawing.num_inference_steps, height, width)


def noise(plan: Plan, drawing: Drawing, several: Iterable[Picture]) -> np.ndarray:
    """(batch, tokens, channels), packed: of each picture by its seed alone, whatever it is drawn with."""
    doubled, height, width = plan.latents(drawing.size).shape
    shape = doubled // 2, height, width
    return plan.family.pack(np.stack([draws.normal(each.seed, Purpose.SAMPLE, 0, shape) for each in several]))


def counted(velocity: Velocity, progress: Progress) -> Velocity:
    def count(x, sigma):
        found = velocity(x, sigma)
        progress.advance()
        return found

    return count


def velocity_of(plan: Plan, drawing: Drawing, model: Trainee, pooled_of: Pooled, batch: list[Picture]) -> Velocity:
    """What a model predicts for some pictures, whose inputs are read from the store once."""
    import mindspore as ms

    family = plan.family
    cast = partial(tensors.as_input, policy=plan.policy(family.network))

    def tensor(array):
        return ms.Tensor(array) if array.dtype == np.int32 else cast(ms.Tensor(array.astype(np.float32)))

    _, height, width = plan.latents(drawing.size).shape
    captions = [caption_item(picture.prompt) for picture in batch]
    txt, pooled = tensor(plan.txt.read_many(captions)), tensor(pooled_of(captions))
    txt_ids = ms.Tensor(family.txt_positions(txt.shape[1]))
    control = [tensor(control_of(plan, batch))] if plan.method.reads_conditions and model.trained else []
    is_guided = family.is_guided(model.configs)
    guidance = tensor(np.full(len(batch), drawing.guidance_scale)) if is_guided else None

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


def observed_precision(
    plan: Plan, drawing: Drawing, model: Trainee, pooled: Pooled, missing: dict[str, Picture]
) -> dict:
    """What is found of the models in a first prediction.  Raises UserError where it is not what the policy says."""
    batch = list(missing.values())[: drawing.batch_size]
    velocity, sigma = velocity_of(plan, drawing, model, pooled, batch), noise_levels(plan, drawing)[0]
    return observed.precision(plan, model, lambda: velocity(noise(plan, drawing, batch), sigma))
