"""Batches for the train step, from the store: everything random and everything small is done here, on the host."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache import Entries, caption_item
from pipeline import draws
from pipeline.data import conditions, indexing, variants
from pipeline.data.variants import Example, Size, Variant
from pipeline.draws import Purpose
from pipeline.flux import flow
from pipeline.methods.tokens import pooled_reader
from pipeline.plan.plan import Plan
from pipeline.training.order import Order
from pipeline.training.reminders import Reminders
from pipeline.training.weighting import drawn_levels, level_indices, loss_weights


@dataclass(frozen=True)
class Batch:
    """One step's input, float32.

    x, target: (batch, tokens, channels), the noised latents and the velocity to predict.
    txt: (batch, length, d_model).  pooled: (batch, hidden_size); or CLIP's tokens, (batch, length), int32.
    timestep: (batch,), in [0, 1] as the model takes it.  img_ids, txt_ids: (tokens, 3), positions.
    weight: (batch,), the factor on each item's loss.
    control: (batch, tokens, channels), the condition's latents; None where the method reads none.
    """

    x: np.ndarray
    target: np.ndarray
    txt: np.ndarray
    pooled: np.ndarray
    timestep: np.ndarray
    img_ids: np.ndarray
    txt_ids: np.ndarray
    weight: np.ndarray
    control: np.ndarray | None = None


class Batches:
    """Makes any batch from the cached tensors; the same number always gives the same batch.

    A batch is of one size of pictures.  Once made, this needs no MindSpore, and `training` may be called from a thread.
    order: which examples are in which batch of training.  pooled: reads what `Batch.pooled` is.
    """

    def __init__(self, plan: Plan):
        self.seed, self.train, self.data = plan.experiment.seed, plan.experiment.train, plan.experiment.data
        self.family, self.examples = plan.family, plan.examples
        self.sizes = self.examples.sizes
        self.order = Order(self.seed, _numbered(self.sizes), self.train.batch_size)
        self.latents = {need.variant: need.entries for need in plan.image_needs}
        self.controls = {need.variant: need.entries for need in plan.control_needs}
        for need in [*plan.image_needs, *plan.control_needs]:
            need.entries.prefetch(need.items)
        plan.txt.prefetch(plan.captions.items)
        self.txt, self.pooled = plan.txt, pooled_reader(plan)
        self.scaling = plan.config(plan.family.image_encoder)
        self.sigmas, self.timesteps = plan.family.training_levels(plan.model_folder)
        self.prior = Reminders(plan, self._noised, len(self.sigmas)) if plan.experiment.has_prior else None

    @property
    def num_shapes(self) -> int:
        """How many sizes batches come in."""
        return len({*self.sizes, *(self.prior.sizes if self.prior else ())})

    @property
    def in_a_step(self) -> int:
        """How many batches are in one step, of all ranks: ``accumulate``, and as many of the prior."""
        return self.train.accumulate * (2 if self.prior else 1)

    def training(self, number: int) -> Batch:
        """Batch ``number`` of the training, counted from 0 over the whole run; a step's are those of photos first."""
        if self.prior is None:
            return self._of_photos(number)
        step, place = divmod(number, self.in_a_step)
        accumulate = self.train.accumulate
        if place >= accumulate:
            return self.prior.batch(step * accumulate + place - accumulate)
        # The mean of a step is over twice as many batches: weighed so, it is that of the photos and that of the prior.
        found = self._of_photos(step * accumulate + place)
        return dataclasses.replace(found, weight=2 * found.weight)

    def _of_photos(self, number: int) -> Batch:
        def generator(purpose):
            return draws.generator(self.seed, purpose, number)

        settings = self.train
        examples = [self.examples[index] for index in self.order.batch(number)]
        return self._make(
            self._drawn_variants(examples, generator(Purpose.CROP), generator(Purpose.FLIP)),
            [example.photo for example in examples],
            self._drawn_captions(examples, generator(Purpose.CAPTION_DROPOUT)),
            drawn_levels(settings, self.seed, number, len(self.sigmas)),
            generator(Purpose.NOISE),
            generator(Purpose.POSTERIOR),
            generator(Purpose.CONTROL_POSTERIOR),
            settings.weighting_scheme,
        )

    def evaluation(self, index: int, size: int) -> Batch:
        """Fixed pairs of noise and noise level on the experiment's own photos, apart from all that training draws.

        Each photo as it is, at its first crop and with its caption; noise levels are uniform and weigh the same,
        whatever the training prefers.
        """
        examples = self.evaluated(index, size)
        generators = (draws.generator(self.seed, Purpose.EVALUATION, 3 * index + part) for part in range(3))
        for_levels, for_noise, for_posterior = generators
        for_control = draws.generator(self.seed, Purpose.EVALUATION, (1 << 40) + index)
        return self._make(
            [variants.of_size(self.data, example.size)[0] for example in examples],
            [example.photo for example in examples],
            [caption_item(example.photo.caption) for example in examples],
            level_indices(for_levels.random(size), len(self.sigmas)),
            for_noise,
            for_posterior,
            for_control,
        )

    def evaluated(self, index: int, size: int) -> list[Example]:
        """What `evaluation` is of."""
        places = next(itertools.islice(_in_turn(self.sizes, size), index, None))
        return [self.examples[place] for place in places]

    def _drawn_variants(self, examples: list[Example], for_crops, for_flips) -> list[Variant]:
        crops, flips = variants.crops(self.data), variants.flips(self.data)
        drawn_crops = level_indices(for_crops.random(len(examples)), len(crops))
        drawn_flips = level_indices(for_flips.random(len(examples)), len(flips))
        drawn = zip(examples, drawn_crops, drawn_flips)
        return [Variant(*example.size, crops[crop], flips[flip]) for example, crop, flip in drawn]

    def _drawn_captions(self, examples: list[Example], generator) -> list[str]:
        """The captions' addresses, some of them dropped: the empty caption's instead."""
        is_dropped = generator.random(len(examples)) < self.train.caption_dropout
        return [caption_item("" if drop else example.photo.caption) for example, drop in zip(examples, is_dropped)]

    def _make(
        self, chosen: list[Variant], photos, captions, levels, for_noise, for_posterior, for_control, scheme="none"
    ) -> Batch:
        """captions: their addresses.  levels: (batch,), indices into the schedule."""
        posterior = self._posterior(self.latents, chosen, [photo.item for photo in photos])
        latents = self._sampled(posterior, for_posterior)
        control = self._control(chosen, photos, for_control) if self.controls else None
        _, channels, *size = posterior.shape
        return self._noised(latents, (channels // 2, *size), captions, levels, for_noise, scheme, control)

    def _noised(self, latents, shape, captions, levels, for_noise, scheme, control) -> Batch:
        """latents: (batch, tokens, channels), packed.  shape: of one item's, (channels, height, width), unpacked."""
        noise = self.family.pack(for_noise.standard_normal((len(latents), *shape), dtype=np.float32))
        _, height, width = shape
        sigma = self.sigmas[levels]
        x, img_ids = self.family.sequence(flow.noised(latents, noise, sigma), height, width, latents)
        return Batch(
            x=x,
            target=noise - latents,
            txt=self.txt.read_many(captions).astype(np.float32),
            pooled=self.pooled(captions),
            timestep=self.family.timesteps(self.timesteps[levels]),
            img_ids=img_ids,
            txt_ids=self.family.txt_positions(self.txt.shape[0]),
            weight=loss_weights(scheme, sigma),
            control=control,
        )

    def _control(self, chosen: list[Variant], photos: list[indexing.IndexedPhoto], for_posterior) -> np.ndarray:
        """The conditions of the photos in the very variants that were chosen for these."""
        items = [conditions.item(photo, variant) for photo, variant in zip(photos, chosen)]
        return self._sampled(self._posterior(self.controls, chosen, items), for_posterior)

    def _posterior(self, entries: dict[Variant, Entries], chosen: list[Variant], items: list[str]) -> np.ndarray:
        """(batch, 2 * channels, height, width): each item in its variant, all of one size."""
        posterior = np.empty((len(items), *entries[chosen[0]].shape), np.float32)
        for variant in dict.fromkeys(chosen):
            rows = [row for row, each in enumerate(chosen) if each == variant]
            posterior[rows] = entries[variant].read_many([items[row] for row in rows])
        return posterior

    def _sampled(self, posterior: np.ndarray, for_posterior) -> np.ndarray:
        """Packed latents, (batch, tokens, channels): a fresh draw from the posterior, or its mode."""
        batch, channels, height, width = posterior.shape
        noise = None
        if self.train.posterior == "sample":
            noise = for_posterior.standard_normal((batch, channels // 2, height, width), dtype=np.float32)
        return self.family.packed(posterior, noise, self.scaling)


def _numbered(sizes: list[Size]) -> list[int]:
    """A number for each size: the same for equal ones."""
    numbers: dict[Size, int] = {}
    return [numbers.setdefault(size, len(numbers)) for size in sizes]


def _in_turn(sizes: list[Size], batch_size: int) -> Iterator[list[int]]:
    """Batches of one size without end: as `Order` has them, but the examples come in turn."""
    queues: defaultdict[Size, list[int]] = defaultdict(list)
    for place in itertools.cycle(range(len(sizes))):
        queue = queues[sizes[place]]
        queue.append(place)
        if len(queue) == batch_size:
            yield queue
            queues.pop(sizes[place])
