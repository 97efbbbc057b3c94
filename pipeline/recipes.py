"""What an experiment needs from the store, and under which address.  Imports no MindSpore: the scheduler asks here.

A recipe holds all that decides an entry's bytes besides its item, and nothing else: no path, no file name, no setting
of the training.  Devices are interchangeable on purpose: what was encoded on one serves another of the same precision.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cache import Entries, Store, canonical, caption_item, digest
from pipeline import checkpoints, data, device, precision
from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.images import PREPROCESSING

SCHEMA = 1
"""Bump when the encoding code may compute other bytes from the same recipe; every store is then encoded again."""


@dataclass(frozen=True)
class Plan:
    """An experiment, resolved on this machine: device, precision, checkpoint folder, store."""

    experiment: Experiment
    device: str
    precision: precision.Precision
    checkpoint: Path
    store: Store

    @cached_property
    def pooled(self) -> Entries:
        """CLIP's pooled output, one (hidden_size,) vector per caption."""
        config = checkpoints.config(self.checkpoint, "text_encoder")
        return self._entries(
            "pooled",
            "text_encoder",
            tokenizer=checkpoints.tokenizer_digest(self.checkpoint, "tokenizer", self.store.facts),
            max_length=config["max_position_embeddings"],
            shape=[config["hidden_size"]],
        )

    @cached_property
    def txt(self) -> Entries:
        """T5's output sequence, (max_sequence_length, d_model) per caption."""
        length = self.experiment.data.max_sequence_length
        return self._entries(
            "txt",
            "text_encoder_2",
            tokenizer=checkpoints.tokenizer_digest(self.checkpoint, "tokenizer_2", self.store.facts),
            max_length=length,
            shape=[length, checkpoints.config(self.checkpoint, "text_encoder_2")["d_model"]],
        )

    @cached_property
    def latents(self) -> Entries:
        """The VAE's posterior, (2 * latent_channels, height, width) per image: means, then log-variances."""
        config, size = checkpoints.config(self.checkpoint, "vae"), self.experiment.data.resolution
        side = size // 2 ** (len(config["block_out_channels"]) - 1)
        return self._entries(
            "latents",
            "vae",
            preprocessing=PREPROCESSING,
            width=size,
            height=size,
            crop="centre",
            flip=False,
            shape=[2 * config["latent_channels"], side, side],
        )

    def _entries(self, kind: str, component: str, **decisive) -> Entries:
        policy = getattr(self.precision, component)
        recipe = {"schema": SCHEMA, "kind": kind, "params": policy.params, "compute": policy.compute}
        recipe |= {"encoder": self._digest_of(component), "dtype": policy.storage_dtype}
        return self.store.entries(recipe | decisive)

    def _digest_of(self, component: str) -> dict:
        variant = self.experiment.model.variant
        return checkpoints.component_digest(self.checkpoint, component, self.store.facts, variant)

    @cached_property
    def transformer_digest(self) -> dict:
        return self._digest_of("transformer")

    def photos(self) -> list[data.IndexedPhoto]:
        """The indexed photos in training's order; the first time, each is decoded and checked."""
        found = data.index_photos(self.experiment.images, self.experiment.data.prompt, self.store.facts)
        return data.by_content(found)

    def run_id(self, photos: Iterable[data.IndexedPhoto]) -> str:
        """Identifies a training run by all that decides its weights: no path, no logging."""
        vae = checkpoints.config(self.checkpoint, "vae")
        policies = (self.precision.transformer, self.precision.trained)
        train = {key: value for key, value in vars(self.experiment.train).items() if key != "log_every"}
        decisive = {
            "schema": SCHEMA,
            "seed": self.experiment.seed,
            "device": self.device,
            "entries": [self.pooled.id, self.txt.id, self.latents.id],
            "pairs": [[photo.digest, caption_item(photo.caption)] for photo in photos],
            "transformer": self.transformer_digest,
            "vae": [vae.get(key) for key in ("scaling_factor", "shift_factor")],
            "scheduler": checkpoints.working_config(self.checkpoint, "scheduler"),
            "precision": [[policy.params, policy.compute] for policy in policies],
            "lora": vars(self.experiment.lora),
            "train": train,
        }
        return digest(canonical(decisive))

    def run_folder(self, photos: Iterable[data.IndexedPhoto]) -> Path:
        return self.experiment.runs / f"{self.experiment.name}-{self.run_id(photos)[:12]}"


def resolve(experiment: Experiment) -> Plan:
    """Raises UserError where the device cannot run the precision policy or there is no checkpoint yet."""
    target, policies = device_and_precision(experiment)
    model = experiment.model
    if not model.path and not experiment.model_path.exists():
        raise UserError(f"{experiment.model_path}: the embedded model is not written yet; run GetModel first")
    checkpoint = checkpoints.local_folder(experiment.model_path, model.revision, model.variant)
    return Plan(experiment, target, policies, checkpoint, Store(*experiment.stores))


def device_and_precision(experiment: Experiment) -> tuple[str, precision.Precision]:
    """The device that the experiment runs on here, and every component's policy; needs no checkpoint.

    Raises UserError where the device cannot run the policy.
    """
    target = device.choose(experiment.device.target)
    return target, precision.resolve(experiment.precision, target, device.COMPUTES[target])
