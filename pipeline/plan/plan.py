"""The plan: an experiment resolved on this machine, with its photos.  Imports no MindSpore: the scheduler asks here.

In the order in which one asks: the photos and captions; the store's entries of what encoders make of them; what decides
the weights of the run, and where the run is.  Each answer is worked out once: with a million photos it takes seconds.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cache import Entries, Store, canonical, caption_item, caption_items, digest, recipe_id
from pipeline.data import conditions, indexing, variants
from pipeline.data.findings import Cut
from pipeline.data.images import PREPROCESSING
from pipeline.data.indexing import IndexedPhoto
from pipeline.data.variants import Examples, Size, Variant
from pipeline.devices import device
from pipeline.devices.precision import Policy, Precision
from pipeline.devices.precision import resolve as resolve_precision
from pipeline.errors import UserError
from pipeline.flux import pretrained
from pipeline.flux.family import Flux
from pipeline.plan import caption_lengths, identity, prior
from pipeline.plan.families import family_of
from pipeline.plan.method import Method
from pipeline.plan.run_folder import RunFolder
from pipeline.settings.experiment import Experiment
from pipeline.settings.reading import unshared

Photos = tuple[IndexedPhoto, ...]


@dataclass(frozen=True)
class ImageNeed:
    """The pictures to encode under one recipe.  items: their addresses.  photos: of each, the first that has it."""

    variant: Variant
    entries: Entries
    items: tuple[str, ...]
    photos: Photos


class Captions(NamedTuple):
    """Captions, each once: items, texts, and names of what they are of.  Columns, as objects of a million take long."""

    items: tuple[str, ...]
    texts: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """device: "Ascend" or "CPU".  model_folder: of the pretrained model.

    known: the photos, where the caller has them; None: `photos` lists and checks them when it is first asked.
    """

    experiment: Experiment
    method: Method
    family: Flux
    device: str
    precision: Precision
    model_folder: Path
    store: Store
    known: Photos | None = None

    def of(self, photos: Iterable[IndexedPhoto]) -> "Plan":
        """The same plan for other photos."""
        return dataclasses.replace(self, known=tuple(photos))

    # --- photos and captions ---

    @cached_property
    def photos(self) -> Photos:
        """The indexed photos in training's order; each that is new is decoded and checked.

        With their conditions, where these are files that are trained with.  Raises UserError that lists what is wrong.
        """
        if self.known is not None:
            return self.known
        index = indexing.index_pairs if self.has_pairs else indexing.index_photos
        return indexing.by_content(index(self.experiment.images, self.experiment.data.prompt, self.store.facts))

    @property
    def has_pairs(self) -> bool:
        """Whether photos are trained with files that are their conditions."""
        return self.method.has_pairs(self.experiment)

    @cached_property
    def examples(self) -> Examples:
        """What an epoch consists of, in the order of the photos; a photo at several sizes is several examples."""
        return Examples(self.experiment.data, self.photos)

    @cached_property
    def sample_conditions(self) -> list[IndexedPhoto]:
        """The images that pictures with the result are conditioned on, one for each prompt, decoded and checked."""
        if not self.method.reads_conditions:
            return []
        names = self.experiment.sample.conditions
        return indexing.index_files(self.experiment.folder, names, "sample.conditions", self.store.facts)

    @cached_property
    def captions(self) -> Captions:
        """The captions to encode: what a training needs, the empty one too where it drops captions; and the prompts
        of the prior and of samples.  A caption has the name of the first photo that has it."""
        first: dict[str, IndexedPhoto | None] = {}
        for item, photo in zip(self.caption_items, self.photos):
            first.setdefault(item, photo)
        texts, names = ([getattr(photo, field) for photo in first.values()] for field in ("caption", "name"))
        others = [""] if self.experiment.train.caption_dropout else []
        for text in [*others, *prior.prompts(self.experiment), *self.experiment.sample.prompts]:
            if (item := caption_item(text)) not in first:
                first[item] = None
                texts.append(text)
                names.append(text)
        return Captions(tuple(first), tuple(texts), tuple(names))

    @cached_property
    def caption_items(self) -> tuple[str, ...]:
        """The address of each photo's caption."""
        return tuple(caption_items(photo.caption for photo in self.photos))

    @cached_property
    def cuts(self) -> list[Cut]:
        """What the text encoders leave out of the photos' captions."""
        captions = dict.fromkeys(photo.caption for photo in self.photos)
        return caption_lengths.cuts(self.model_folder, self.family, self.experiment.data, captions)

    # --- entries of the store ---

    @cached_property
    def pooled(self) -> Entries:
        """CLIP's pooled output, one (hidden_size,) vector per caption."""
        return self._captioned("pooled")

    @cached_property
    def txt(self) -> Entries:
        """T5's output sequence, (max_sequence_length, d_model) per caption."""
        return self._captioned("txt")

    def entries_of(self, kind: str) -> Entries:
        """The outputs of a caption encoder, by their kind, "pooled" or "txt"."""
        return {"pooled": self.pooled, "txt": self.txt}[kind]

    def _captioned(self, kind: str) -> Entries:
        encoder = self.family.caption_encoders[kind]
        settings = self.family.caption_settings(kind, self.model_folder, self.experiment.data)
        return self._encoded(kind, encoder.component, tokenizer=self.tokenizer_digest(encoder.tokenizer), **settings)

    def latents(self, variant: Variant, condition: str = conditions.FILE) -> Entries:
        """The VAE's posterior, (2 * latent_channels, height, width) per image: means, then log-variances.

        condition: FILE, the image itself is encoded; any other name, what `conditions` computes from the image is.
        """
        key = variant, condition
        if key not in self._latents:
            component = self.family.image_encoder
            settings = {
                "preprocessing": PREPROCESSING,
                "shape": self.family.posterior_shape(self.config(component), variant.width, variant.height),
                **variant.recipe,
                **conditions.recipe(condition),
            }
            self._latents[key] = self._encoded("latents", component, **settings)
        return self._latents[key]

    @cached_property
    def _latents(self) -> dict[tuple[Variant, str], Entries]:
        return {}

    def _encoded(self, kind: str, component: str, **decisive) -> Entries:
        policy = self.policy(component)
        recipe = {"schema": identity.SCHEMA, "kind": kind} | policy.decisive
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

    def variants(self, photo: IndexedPhoto) -> list[Variant]:
        """All in which a photo must be encoded."""
        settings = self.experiment.data
        return [each for size in variants.sizes(settings, photo) for each in variants.of_size(settings, size)]

    @cached_property
    def image_needs(self) -> tuple[ImageNeed, ...]:
        """What a training needs of each variant, the smallest size first; no two have the same recipe."""
        return self._needs_by_variant(conditions.FILE, lambda photo: photo.item)

    @cached_property
    def control_needs(self) -> tuple[ImageNeed, ...]:
        """What a training needs of the photos' conditions, in the order of `image_needs`; none where it reads none."""
        if not self.method.reads_conditions:
            return ()
        any_variant = variants.of_size(self.experiment.data, (0, 0))[0]  # all of an experiment have the same items
        condition = self.method.condition(self.experiment)
        return self._needs_by_variant(condition, lambda photo: conditions.item(photo, any_variant))

    def _needs_by_variant(self, condition: str, item_of: Callable[[IndexedPhoto], str]) -> tuple[ImageNeed, ...]:
        settings, sizes_of = self.experiment.data, variants.sizes_of(self.experiment.data)
        by_size: dict[Size, dict[str, IndexedPhoto]] = {}
        for photo in self.photos:
            item = item_of(photo)
            for size in sizes_of(photo):
                by_size.setdefault(size, {}).setdefault(item, photo)
        needs: list[ImageNeed] = []
        for size, found in sorted(by_size.items()):
            columns = tuple(found), tuple(found.values())  # all variants of a size share them
            several = variants.of_size(settings, size)
            needs += [ImageNeed(each, self.latents(each, condition), *columns) for each in several]
        return tuple(needs)

    # --- the pretrained model ---

    def config(self, component: str) -> dict:
        return pretrained.config(self.model_folder, component)

    def policy(self, component: str) -> Policy:
        """The precision policy of a component, or of what is "trained"."""
        return getattr(self.precision, component)

    def load(self, component: str):
        """A component of the pretrained model, frozen, as its precision policy says, or a tokenizer.

        Raises StoreError where its files are no longer those that the plan's addresses are about.
        """
        is_tokenizer = component in pretrained.TOKENIZERS
        (self.tokenizer_digest if is_tokenizer else self.digest_of)(component)  # before the files are opened
        policy = None if is_tokenizer else self.policy(component)
        loaded = self.family.load(self.model_folder, component, policy, *self.experiment.model_weights)
        self.confirm(component)
        return loaded

    def load_frozen(self) -> dict:
        """The frozen models that the method works with, by component."""
        return {component: self.load(component) for component in self.method.frozen(self.experiment, self.family)}

    @property
    def are_weights_known(self) -> bool:
        """Whether the digests of all weights are known, or can be learnt in passing; else GetModel reads them."""
        return pretrained.are_weights_known(self.model_folder, self.store.facts, *self.experiment.model_weights)

    def tokenizer_digest(self, component: str) -> str:
        """What identifies a tokenizer of the pretrained model."""
        return pretrained.tokenizer_digest(self.model_folder, component, self.store.facts)

    def digest_of(self, component: str) -> dict:
        """What identifies a component of the pretrained model: digests of its weights and of its config."""
        weights = self.experiment.model_weights
        return pretrained.component_digest(self.model_folder, component, self.store.facts, *weights)

    def confirm(self, component: str) -> None:
        """Raise StoreError where a file of the component or tokenizer has changed since its digest was first asked for.

        Ask it after the files were used, before what was made of them is kept.
        """
        pretrained.confirm(self.model_folder, component, self.store.facts, *self.experiment.model_weights)

    @cached_property
    def network_digest(self) -> dict:
        return self.digest_of(self.family.network)

    @cached_property
    def image_encoder_digest(self) -> dict:
        return self.digest_of(self.family.image_encoder)

    # --- the run ---

    @cached_property
    def num_ranks(self) -> int:
        """How many devices share the batches of a step."""
        return shared_by(self.experiment, self.device)

    @cached_property
    def entry_ids(self) -> dict:
        """The recipes of what a training reads, by their ids in the store."""
        latents = [need.entries.id for need in self.image_needs]
        return {"pooled": self.pooled.id, "txt": self.txt.id, "latents": latents}

    @cached_property
    def decisive(self) -> dict:
        """All that decides the run's weights, by name."""
        return identity.decisive(self)

    @cached_property
    def run_id(self) -> str:
        """Identifies a training run by all that decides its weights."""
        return digest(canonical(self.decisive))

    @cached_property
    def run(self) -> RunFolder:
        return RunFolder(self.experiment.runs / f"{self.experiment.name}-{self.run_id[:12]}")

    @property
    def is_trained(self) -> bool:
        """Whether the run has been trained to its end, now."""
        return self.run.is_trained(self.method.result_files)


def resolve(experiment: Experiment, method: Method, photos: Photos | None = None) -> Plan:
    """photos: as of `Plan.known`.

    Raises UserError where the device cannot run the precision policy or there is no pretrained model yet.
    """
    target, policies = device_and_precision(experiment)
    folder = pretrained.local_folder(experiment.model_path, experiment.model.revision, *experiment.model_weights)
    family, store = family_of(folder), Store(*experiment.stores)
    return Plan(experiment, method, family, target, policies, folder, store, photos)


def shared_by(experiment: Experiment, target: str) -> int:
    """How many devices of this machine train.  Raises UserError where they cannot share a step's batches evenly."""
    asked = experiment.parallel.ranks
    count = max(1, device.num_visible(target)) if asked == "auto" else asked
    if uneven := unshared(experiment, count):
        raise UserError(uneven)
    return count


def device_and_precision(experiment: Experiment) -> tuple[str, Precision]:
    """The device that the experiment runs on here, and every component's policy; needs no pretrained model.

    Raises UserError where the device cannot run the policy, or as many devices as there are cannot share a step.
    """
    target = device.choose(experiment.device.target)
    shared_by(experiment, target)
    return target, resolve_precision(experiment.precision, target, device.COMPUTES[target])
