"""What an experiment needs from the store, and under which address.  Imports no MindSpore: the scheduler asks here.

A recipe holds all that decides an entry's bytes besides its item, and nothing else: no path, no file name, no setting
of the training.  Devices are interchangeable on purpose: what was encoded on one serves another of the same precision.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cache import Entries, Spelled, Store, canonical, caption_item, caption_items, digest, recipe_id
from pipeline.data import conditions, indexing, variants
from pipeline.data.images import PREPROCESSING
from pipeline.data.variants import Samples, Size, Variant
from pipeline.devices import device, precision
from pipeline.flux import checkpoints
from pipeline.plan.answers import once
from pipeline.settings.fields import Experiment

SCHEMA = 1
"""Bump when the encoding code may compute other bytes from the same recipe; every store is then encoded again."""

RESULT_NAME = "result.json"
"""Written last in a run's folder: a run that has it is done."""

LORA, CONTROLNET = "lora", "controlnet"

UNDECISIVE = ("log_every", "checkpoint_every", "keep_checkpoints")
"""Settings of the training that decide no weight."""

FIRST_SETTINGS = {
    "lora": ("rank", "alpha", "dropout", "targets", "train_text_encoder"),
    "controlnet": (
        *("init_from", "num_double_layers", "num_single_layers", "condition", "conditioning_scale", "save_dtype"),
    ),
    "train": (
        *("steps", "epochs", "batch_size", "accumulate", "learning_rate", "text_encoder_lr", "lr_scheduler"),
        *("lr_warmup_steps", "lr_num_cycles", "lr_power", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("weight_decay", "max_grad_norm", "ema_decay", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
        *("caption_dropout", "guidance_scale", "posterior", "gradient_checkpointing", "mode"),
    ),
}
"""Settings that are part of a run's identity whatever they are, by table.  Any other is part of it unless it is at its
default, so that runs of a version that did not know it are found.  Never add to these."""


@dataclass(frozen=True)
class ImageNeed:
    """What a training needs of one variant of photos or conditions: items, and for each the first photo that has it."""

    variant: Variant
    entries: Entries
    items: tuple[str, ...]
    photos: tuple[indexing.IndexedPhoto, ...]


class Captions(NamedTuple):
    """Captions, each once: items, texts, and names of what they are of.  Columns, as objects of a million take long."""

    items: tuple[str, ...]
    texts: tuple[str, ...]
    names: tuple[str, ...]


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
        return self._encoded(
            "pooled",
            "text_encoder",
            tokenizer=self.digest_of("tokenizer"),
            max_length=config["max_position_embeddings"],
            shape=[config["hidden_size"]],
        )

    @cached_property
    def txt(self) -> Entries:
        """T5's output sequence, (max_sequence_length, d_model) per caption."""
        length = self.experiment.data.max_sequence_length
        return self._encoded(
            "txt",
            "text_encoder_2",
            tokenizer=self.digest_of("tokenizer_2"),
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
            self._latents[key] = self._encoded("latents", "vae", **settings)
        return self._latents[key]

    @cached_property
    def _latents(self) -> dict[tuple[Variant, str], Entries]:
        return {}

    def _encoded(self, kind: str, component: str, **decisive) -> Entries:
        policy = getattr(self.precision, component)
        recipe = {"schema": SCHEMA, "kind": kind} | policy.decisive
        recipe |= {"encoder": self.digest_of(component), "dtype": policy.storage_dtype}
        return self.entries(recipe | decisive)

    def entries(self, recipe: dict) -> Entries:
        """The entries of a recipe, one object of each: what it has found in the store is looked at once."""
        own = recipe_id(recipe)
        if own not in self._entries:
            self._entries[own] = self.store.entries(recipe)
        return self._entries[own]

    @cached_property
    def _entries(self) -> dict[str, Entries]:
        return {}

    def digest_of(self, component: str) -> dict | str:
        """What identifies a component of the checkpoint, or a tokenizer."""
        if component in checkpoints.TOKENIZERS:
            return checkpoints.tokenizer_digest(self.checkpoint, component, self.store.facts)
        variant = self.experiment.model.variant
        return checkpoints.component_digest(self.checkpoint, component, self.store.facts, variant)

    def confirm(self, component: str) -> None:
        """Raise StoreError where a file of the component has changed since `digest_of` was first asked for it.

        Ask it after the files were used, before what was made of them is kept.
        """
        checkpoints.confirm(self.checkpoint, component, self.store.facts, self.experiment.model.variant)

    def confirm_init(self) -> None:
        """As `confirm`, of the ControlNet that this one begins as, where there is one."""
        if self.trains == CONTROLNET and self.experiment.init_from:
            checkpoints.confirm(self.experiment.init_from, checkpoints.CONTROLNET, self.store.facts)

    @cached_property
    def transformer_digest(self) -> dict:
        return self.digest_of("transformer")

    @cached_property
    def vae_digest(self) -> dict:
        return self.digest_of("vae")

    def photos(self) -> tuple[indexing.IndexedPhoto, ...]:
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
        names = self.experiment.sample.conditions
        return indexing.index_files(self.experiment.folder, names, "sample.conditions", self.store.facts)

    @once
    def captions(self, photos: Sequence[indexing.IndexedPhoto]) -> Captions:
        """The captions to encode: what a training needs, the empty one too where it drops captions; and the prompts
        that are sampled with.  A caption has the name of the first photo that has it."""
        first: dict[str, indexing.IndexedPhoto | None] = {}
        for item, photo in zip(self._caption_items(photos), photos):
            first.setdefault(item, photo)
        texts, names = ([getattr(photo, field) for photo in first.values()] for field in ("caption", "name"))
        others = [""] if self.experiment.train.caption_dropout else []
        for text in [*others, *self.experiment.sample.prompts]:
            if (item := caption_item(text)) not in first:
                first[item] = None
                texts.append(text)
                names.append(text)
        return Captions(tuple(first), tuple(texts), tuple(names))

    @once
    def _caption_items(self, photos: Sequence[indexing.IndexedPhoto]) -> tuple[str, ...]:
        """The address of each photo's caption."""
        return tuple(caption_items(photo.caption for photo in photos))

    def variants(self, photo: indexing.IndexedPhoto) -> list[Variant]:
        """All in which a photo must be encoded."""
        settings = self.experiment.data
        return [each for size in variants.sizes(settings, photo) for each in variants.of_size(settings, size)]

    @once
    def image_needs(self, photos: Sequence[indexing.IndexedPhoto]) -> tuple[ImageNeed, ...]:
        """What a training needs of each variant, the smallest size first; no two have the same recipe."""
        return self._needs_by_variant(photos, conditions.FILE, lambda photo: photo.digest)

    @once
    def control_needs(self, photos: Sequence[indexing.IndexedPhoto]) -> tuple[ImageNeed, ...]:
        """What a ControlNet's training needs of the conditions, in the order of `image_needs`."""
        any_variant = variants.of_size(self.experiment.data, (0, 0))[0]  # all of an experiment have the same items
        condition = self.experiment.controlnet.condition
        return self._needs_by_variant(photos, condition, lambda photo: conditions.item(photo, any_variant))

    def _needs_by_variant(self, photos: Sequence[indexing.IndexedPhoto], condition: str, item_of: Callable):
        settings, sizes_of = self.experiment.data, variants.sizes_of(self.experiment.data)
        by_size: dict[Size, dict[str, indexing.IndexedPhoto]] = {}
        for photo in photos:
            item = item_of(photo)
            for size in sizes_of(photo):
                by_size.setdefault(size, {}).setdefault(item, photo)
        needs = []
        for size, found in sorted(by_size.items()):
            columns = tuple(found), tuple(found.values())  # all variants of a size share them
            several = variants.of_size(settings, size)
            needs += [ImageNeed(each, self.latents(each, condition), *columns) for each in several]
        return tuple(needs)

    def samples(self, photos: Sequence[indexing.IndexedPhoto]) -> Samples:
        """What an epoch consists of, in the order of the photos; a photo at several sizes is several samples."""
        return Samples(self.experiment.data, photos)

    def entry_ids(self, photos: Sequence[indexing.IndexedPhoto]) -> dict:
        """The recipes of what a training reads, by their ids in the store."""
        latents = [need.entries.id for need in self.image_needs(photos)]
        return {"pooled": self.pooled.id, "txt": self.txt.id, "latents": latents}

    def decisive(self, photos: Sequence[indexing.IndexedPhoto]) -> dict:
        """All that decides a run's weights, by name: no path, no logging."""
        settings, vae = self.experiment.data, checkpoints.config(self.checkpoint, "vae")
        policies = {name: getattr(self.precision, name) for name in ("transformer", "trained")}
        return {
            "schema": SCHEMA,
            "seed": self.experiment.seed,
            "device": self.device,
            "entries": self.entry_ids(photos),
            "data": {
                "samples": self._spelled_samples(photos),
                "repeats": settings.repeats,
                "crops": settings.crops,
                "flip": settings.flip,
            },
            "transformer": self.transformer_digest,
            "vae": {key: vae.get(key) for key in ("scaling_factor", "shift_factor")},
            "scheduler": checkpoints.working_config(self.checkpoint, "scheduler"),
            "precision": {name: policy.decisive for name, policy in policies.items()},
            "train": decisive_settings(self.experiment, "train"),
        } | (
            self._controlnet(photos)
            if self.trains == CONTROLNET
            else {"lora": decisive_settings(self.experiment, "lora")}
        )

    def _spelled_samples(self, photos: Sequence[indexing.IndexedPhoto]) -> Spelled:
        """A list of [digest of the photo, address of its caption, width, height]."""
        sizes_of, captions = variants.sizes_of(self.experiment.data), self._caption_items(photos)
        rows = [
            f'["{photo.digest}","{caption}",{width},{height}]'
            for photo, caption in zip(photos, captions)
            for width, height in sizes_of(photo)
        ]
        return Spelled(f"[{','.join(rows)}]")

    def _controlnet(self, photos) -> dict:
        """What decides a ControlNet's weights besides."""
        settings, origin = decisive_settings(self.experiment, "controlnet"), self.experiment.init_from
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

    @once
    def run_id(self, photos: Sequence[indexing.IndexedPhoto]) -> str:
        """Identifies a training run by all that decides its weights."""
        return digest(canonical(self.decisive(photos)))

    def run_folder(self, photos: Sequence[indexing.IndexedPhoto]) -> Path:
        return self.experiment.runs / f"{self.experiment.name}-{self.run_id(photos)[:12]}"


def decisive_settings(experiment: Experiment, table: str) -> dict:
    """Those settings of a table that are part of a run's identity."""
    settings, first = getattr(experiment, table), FIRST_SETTINGS[table]
    return {
        field.name: value
        for field in dataclasses.fields(settings)
        if field.name not in UNDECISIVE
        and ((value := getattr(settings, field.name)) != field.default or field.name in first)
    }


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
