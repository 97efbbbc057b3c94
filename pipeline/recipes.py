"""What an experiment needs from the store, and under which address.  Imports no MindSpore: the scheduler asks here.

A recipe holds all that decides an entry's bytes besides its item, and nothing else: no path, no file name, no setting
of the training.  Devices are interchangeable on purpose: what was encoded on one serves another of the same precision.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cache import Entries, Source, Store, canonical, caption_item, digest
from pipeline import checkpoints, device, precision
from pipeline.data import conditions, indexing, variants
from pipeline.data.images import PREPROCESSING
from pipeline.data.variants import Sample, Size, Variant
from pipeline.settings import Experiment

SCHEMA = 1
"""Bump when the encoding code may compute other bytes from the same recipe; every store is then encoded again."""

RESULT_NAME = "result.json"
"""Written last in a run's folder: a run that has it is done."""

LORA, CONTROLNET = "lora", "controlnet"

UNDECISIVE = ("log_every", "checkpoint_every", "keep_checkpoints")
"""Settings of the training that decide no weight."""


@dataclass(frozen=True)
class ImageNeed:
    """What a training needs of one variant.  photos: each content once, the first photo that has it."""

    variant: Variant
    entries: Entries
    photos: tuple[indexing.IndexedPhoto, ...]

    @property
    def items(self) -> list[str]:
        return [photo.digest for photo in self.photos]


class ControlNeed(ImageNeed):
    """What a training needs of the photos' conditions in one variant."""

    @property
    def items(self) -> list[str]:
        return [conditions.item(photo, self.variant) for photo in self.photos]


@dataclass(frozen=True)
class Plan:
    """An experiment, resolved on this machine: device, precision, checkpoint folder, store.

    trains: LORA or CONTROLNET, of which an experiment has one run each.
    """

    experiment: Experiment
    device: str
    precision: precision.Precision
    checkpoint: Path
    store: Store
    trains: str = LORA

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

    def latents(self, variant: Variant, condition: str = conditions.FILE) -> Entries:
        """The VAE's posterior, (2 * latent_channels, height, width) per image: means, then log-variances.

        condition: computed from the image, and encoded in its place.
        """
        key = variant, condition
        if key not in self._latents:
            config = checkpoints.config(self.checkpoint, "vae")
            scale = 2 ** (len(config["block_out_channels"]) - 1)
            shape = [2 * config["latent_channels"], variant.height // scale, variant.width // scale]
            settings = {
                "preprocessing": PREPROCESSING,
                "shape": shape,
                **variant.recipe,
                **conditions.recipe(condition),
            }
            self._latents[key] = self._entries("latents", "vae", **settings)
        return self._latents[key]

    @cached_property
    def _latents(self) -> dict[tuple[Variant, str], Entries]:
        return {}

    def _entries(self, kind: str, component: str, **decisive) -> Entries:
        policy = getattr(self.precision, component)
        recipe = {"schema": SCHEMA, "kind": kind} | policy.decisive
        recipe |= {"encoder": self._digest_of(component), "dtype": policy.storage_dtype}
        return self.store.entries(recipe | decisive)

    def _digest_of(self, component: str) -> dict:
        variant = self.experiment.model.variant
        return checkpoints.component_digest(self.checkpoint, component, self.store.facts, variant)

    @cached_property
    def transformer_digest(self) -> dict:
        return self._digest_of("transformer")

    @cached_property
    def vae_digest(self) -> dict:
        return self._digest_of("vae")

    def photos(self) -> list[indexing.IndexedPhoto]:
        """The indexed photos in training's order; the first time, each is decoded and checked.

        With their conditions, where these are files that are trained with.
        """
        index = indexing.index_pairs if self.has_pairs else indexing.index_photos
        return indexing.by_content(index(self.experiment.images, self.experiment.data.prompt, self.store.facts))

    @property
    def has_pairs(self) -> bool:
        return has_pairs(self.experiment, self.trains)

    @cached_property
    def sample_conditions(self) -> list[indexing.IndexedPhoto]:
        """The images that a ControlNet's pictures are conditioned on, one for each prompt, decoded and checked."""
        if self.trains != CONTROLNET:
            return []
        known = indexing.index_files(self.experiment.sample_conditions, "sample.conditions", self.store.facts)
        return [known[name] for name in self.experiment.sample.conditions]

    def captions(self, photos: Iterable[indexing.IndexedPhoto]) -> list[Source]:
        """The captions to encode, each once: what a training needs, the empty one too where it drops captions; and the
        prompts that are sampled with."""
        found: dict[str, Source] = {}
        for photo in photos:
            item = caption_item(photo.caption)
            found.setdefault(item, Source(item, photo.name, photo.caption))
        if self.experiment.train.caption_dropout:
            found.setdefault(caption_item(""), Source(caption_item(""), "", ""))
        for prompt in self.experiment.sample.prompts:
            found.setdefault(caption_item(prompt), Source(caption_item(prompt), prompt, prompt))
        return list(found.values())

    def variants(self, photo: indexing.IndexedPhoto) -> list[Variant]:
        """All in which a photo must be encoded."""
        settings = self.experiment.data
        return [each for size in variants.sizes(settings, photo) for each in variants.of_size(settings, size)]

    def image_needs(self, photos: Iterable[indexing.IndexedPhoto]) -> list[ImageNeed]:
        """What a training needs of each variant, the smallest size first; no two have the same recipe."""
        settings = self.experiment.data
        by_size: dict[Size, dict[str, indexing.IndexedPhoto]] = {}
        for photo in photos:
            for size in variants.sizes(settings, photo):
                by_size.setdefault(size, {}).setdefault(photo.digest, photo)
        return [
            ImageNeed(variant, self.latents(variant), tuple(found.values()))
            for size, found in sorted(by_size.items())
            for variant in variants.of_size(settings, size)
        ]

    def control_needs(self, photos: Iterable[indexing.IndexedPhoto]) -> list[ControlNeed]:
        """What a ControlNet's training needs of the conditions, in the order of `image_needs`."""
        condition, settings = self.experiment.controlnet.condition, self.experiment.data
        found: dict[Variant, dict[str, indexing.IndexedPhoto]] = {}
        for photo in photos:
            for variant in self.variants(photo):
                found.setdefault(variant, {}).setdefault(conditions.item(photo, variant), photo)
        return [
            ControlNeed(variant, self.latents(variant, condition), tuple(found[variant].values()))
            for size in sorted({(variant.width, variant.height) for variant in found})
            for variant in variants.of_size(settings, size)
        ]

    def samples(self, photos: Iterable[indexing.IndexedPhoto]) -> list[Sample]:
        """What an epoch consists of, in the order of the photos; a photo at several sizes is several samples."""
        return self._samples_once(photos) * self.experiment.data.repeats

    def _samples_once(self, photos):
        settings = self.experiment.data
        return [Sample(photo, *size) for photo in photos for size in variants.sizes(settings, photo)]

    def decisive(self, photos: Sequence[indexing.IndexedPhoto]) -> dict:
        """All that decides a run's weights, by name: no path, no logging."""
        settings, vae = self.experiment.data, checkpoints.config(self.checkpoint, "vae")
        policies = {name: getattr(self.precision, name) for name in ("transformer", "trained")}
        return {
            "schema": SCHEMA,
            "seed": self.experiment.seed,
            "device": self.device,
            "entries": {
                "pooled": self.pooled.id,
                "txt": self.txt.id,
                "latents": [need.entries.id for need in self.image_needs(photos)],
            },
            "data": {
                "samples": [
                    [each.photo.digest, caption_item(each.photo.caption), *each.size]
                    for each in self._samples_once(photos)
                ],
                "repeats": settings.repeats,
                "crops": settings.crops,
                "flip": settings.flip,
            },
            "transformer": self.transformer_digest,
            "vae": {key: vae.get(key) for key in ("scaling_factor", "shift_factor")},
            "scheduler": checkpoints.working_config(self.checkpoint, "scheduler"),
            "precision": {name: policy.decisive for name, policy in policies.items()},
            "train": {key: value for key, value in vars(self.experiment.train).items() if key not in UNDECISIVE},
        } | (self._controlnet(photos) if self.trains == CONTROLNET else {"lora": vars(self.experiment.lora)})

    def _controlnet(self, photos) -> dict:
        """What decides a ControlNet's weights besides."""
        settings, origin = vars(self.experiment.controlnet), self.experiment.init_from
        if origin:
            settings = {
                key: value for key, value in settings.items() if key not in ("num_double_layers", "num_single_layers")
            }
            settings["init_from"] = checkpoints.component_digest(origin, checkpoints.CONTROLNET, self.store.facts)
        return {
            "controlnet": settings,
            "controls": {
                "entries": [need.entries.id for need in self.control_needs(photos)],
                "items": [conditions.item(photo, Variant(0, 0)) for photo in photos],
            },
        }

    def run_id(self, photos: Sequence[indexing.IndexedPhoto]) -> str:
        """Identifies a training run by all that decides its weights."""
        return digest(canonical(self.decisive(photos)))

    def run_folder(self, photos: Sequence[indexing.IndexedPhoto]) -> Path:
        return self.experiment.runs / f"{self.experiment.name}-{self.run_id(photos)[:12]}"


def has_pairs(experiment: Experiment, trains: str) -> bool:
    """Whether photos are trained with files that are their conditions."""
    return trains == CONTROLNET and experiment.controlnet.condition == conditions.FILE


def trained_by(experiment: Experiment) -> str:
    """What an experiment file is about, where nobody says it: a ControlNet where it has such a table."""
    return CONTROLNET if CONTROLNET in experiment.tables else LORA


def resolve(experiment: Experiment, trains: str = LORA) -> Plan:
    """Raises UserError where the device cannot run the precision policy or there is no checkpoint yet."""
    target, policies = device_and_precision(experiment)
    model = experiment.model
    checkpoint = checkpoints.local_folder(experiment.model_path, model.revision, model.variant)
    return Plan(experiment, target, policies, checkpoint, Store(*experiment.stores), trains)


def device_and_precision(experiment: Experiment) -> tuple[str, precision.Precision]:
    """The device that the experiment runs on here, and every component's policy; needs no checkpoint.

    Raises UserError where the device cannot run the policy.
    """
    target = device.choose(experiment.device.target)
    return target, precision.resolve(experiment.precision, target, device.COMPUTES[target])
