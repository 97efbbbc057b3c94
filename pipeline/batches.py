"""Batches for the train step, from the store: everything random and everything small is done here, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache import caption_item
from pipeline import checkpoints, data, draws, flow, models
from pipeline.draws import Purpose
from pipeline.recipes import Plan


@dataclass(frozen=True)
class Batch:
    """One step's input, float32.

    x, target: (batch, tokens, channels), the noised latents and the velocity to predict.
    txt: (batch, length, d_model).  pooled: (batch, hidden_size).  timestep: (batch,), in [0, 1] as the model takes it.
    img_ids, txt_ids: (tokens, 3), positions.
    """

    x: np.ndarray
    target: np.ndarray
    txt: np.ndarray
    pooled: np.ndarray
    timestep: np.ndarray
    img_ids: np.ndarray
    txt_ids: np.ndarray


class Batches:
    """Makes the batch of any step from the cached tensors; the same step always gives the same batch."""

    def __init__(self, plan: Plan, photos: Sequence[data.IndexedPhoto]):
        self.plan, self.photos, self.seed = plan, list(photos), plan.experiment.seed
        vae = checkpoints.config(plan.checkpoint, "vae")
        self.shift_factor, self.scaling_factor = vae["shift_factor"], vae["scaling_factor"]
        self.sigmas, self.timesteps = models.scheduler_sigmas(plan.checkpoint)

    def training(self, step: int) -> Batch:
        """The batch of training step ``step``, counted from 0."""
        size = self.plan.experiment.train.batch_size
        chosen = draws.batch_indices(self.seed, step, size, len(self.photos))
        purposes = (Purpose.SIGMA, Purpose.NOISE, Purpose.POSTERIOR)
        return self._make(chosen, *(draws.generator(self.seed, purpose, step) for purpose in purposes))

    def evaluation(self, index: int, size: int) -> Batch:
        """Fixed pairs of noise and noise level on the experiment's own photos, apart from all that training draws."""
        chosen = [place % len(self.photos) for place in range(index * size, (index + 1) * size)]
        generators = (draws.generator(self.seed, Purpose.EVALUATION, 3 * index + part) for part in range(3))
        return self._make(chosen, *generators)

    def _make(self, chosen: list[int], for_levels, for_noise, for_posterior) -> Batch:
        photos = [self.photos[index] for index in chosen]
        captions = [caption_item(photo.caption) for photo in photos]
        posterior = self._read(self.plan.latents, [photo.digest for photo in photos])
        batch, channels, height, width = posterior.shape
        latents = self._latents(posterior, for_posterior)
        noise = flow.pack(for_noise.standard_normal((batch, channels // 2, height, width), dtype=np.float32))
        levels = (for_levels.random(batch) * len(self.sigmas)).astype(np.int64)
        return Batch(
            x=flow.noised(latents, noise, self.sigmas[levels]),
            target=noise - latents,
            txt=self._read(self.plan.txt, captions),
            pooled=self._read(self.plan.pooled, captions),
            timestep=self.timesteps[levels] / np.float32(1000),
            img_ids=flow.image_ids(height, width),
            txt_ids=np.zeros((self.plan.txt.shape[0], 3), np.float32),
        )

    def _latents(self, posterior: np.ndarray, for_posterior) -> np.ndarray:
        """Packed latents, (batch, tokens, channels): a fresh draw from the posterior, or its mode."""
        batch, channels, height, width = posterior.shape
        noise = None
        if self.plan.experiment.train.posterior == "sample":
            noise = for_posterior.standard_normal((batch, channels // 2, height, width), dtype=np.float32)
        latents = flow.sample_posterior(posterior, noise)
        return flow.pack(flow.normalized(latents, self.shift_factor, self.scaling_factor))

    def _read(self, entries, items: list[str]) -> np.ndarray:
        return entries.read_many(items).astype(np.float32)
