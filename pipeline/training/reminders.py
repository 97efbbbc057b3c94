"""Batches of the pictures that [prior] asks for: a training's second group, which the base model drew itself."""

import dataclasses
from collections.abc import Callable

import numpy as np

from cache import caption_item
from pipeline import draws
from pipeline.draws import Purpose
from pipeline.plan import prior
from pipeline.plan.plan import Plan
from pipeline.training.order import Order
from pipeline.training.weighting import drawn_levels


class Reminders:
    """Makes any batch of the prior's final latents; the same number always gives the same batch.

    Noise levels are drawn and weighed as those of photos are.  Where the method reads conditions, these pictures have
    an empty one, latents of 0: without a condition, the base is to be left as it is.
    noised: makes a batch of packed latents, as `Batches` does.
    """

    def __init__(self, plan: Plan, noised: Callable, num_levels: int):
        self.seed, self.train, self.family = plan.experiment.seed, plan.experiment.train, plan.family
        self.weight, self.has_control = plan.experiment.prior.weight, plan.method.reads_conditions
        self._noised, self._num_levels = noised, num_levels
        self.pictures = []
        for series in prior.series(plan):
            series.entries.prefetch(list(series.pictures))
            self.pictures += [(series, item, caption_item(each.prompt)) for item, each in series.pictures.items()]
        sizes = [series.drawing.size for series, _, _ in self.pictures]
        self.sizes = sorted({(size.width, size.height) for size in sizes})
        self.order = Order(self.seed, [size.width for size in sizes], self.train.batch_size, Purpose.PRIOR_ORDER)

    def batch(self, number: int):
        """Batch ``number`` of the prior, counted from 0 over the whole run."""
        chosen = [self.pictures[index] for index in self.order.batch(number)]
        entries = chosen[0][0].entries
        latents = self.family.pack(entries.read_many([item for _, item, _ in chosen]).astype(np.float32))
        found = self._noised(
            latents,
            entries.shape,
            [caption for _, _, caption in chosen],
            drawn_levels(self.train, self.seed, number, self._num_levels, Purpose.PRIOR_SIGMA),
            draws.generator(self.seed, Purpose.PRIOR_NOISE, number),
            self.train.weighting_scheme,
            np.zeros_like(latents) if self.has_control else None,
        )
        return dataclasses.replace(found, weight=2 * np.float32(self.weight) * found.weight)
