"""What a study of two precisions is about: the experiment's plan under each of them, and a sample of its photos.

Imports no MindSpore.  Nothing of a study goes to the experiment's store, but for the memory of file digests.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from cache import Store
from pipeline.data.indexing import IndexedPhoto
from pipeline.devices.precision import Policy
from pipeline.methods import LORA
from pipeline.plan.families import FLUX
from pipeline.plan.plan import Plan, resolve
from pipeline.settings.experiment import Experiment
from pipeline.settings.fields import PrecisionSettings
from pipeline.settings.reading import load_experiment
from pipeline.settings.values import PRECISION_COMPONENTS, Preset

SIDES = OWN, AGAINST = "own", "against"
"""The two sides of a study: the experiment's own precision, and the one that it is compared with."""

CAPTION_ENCODERS = {encoder.component: kind for kind, encoder in FLUX.caption_encoders.items()}
"""The kind of what each text encoder gives, by its component."""

IMAGE_ENCODER, NETWORK = FLUX.image_encoder, FLUX.network
ENCODERS = (*CAPTION_ENCODERS, IMAGE_ENCODER)
COMPONENTS = dict(
    zip((*ENCODERS, NETWORK), ("pooled output", "output sequence", "posterior's mean", "predicted velocity"))
)
"""What is compared of each component."""

DECODED, LOSSES = "decoded", "losses"
"""Of what children write besides: the images that are decoded, and the first word of the losses' keys."""


@dataclass(frozen=True)
class Job:
    """What one child process computes: a component under the policy of one side.

    experiment: path of its file, "" of the embedded default.  against: a preset.  pairs: of noise and noise level.
    inputs: of the transformer, the sides whose encoded tensors it is given.  folder: where results go.
    """

    experiment: str
    against: Preset
    photos: Sequence[IndexedPhoto]
    pairs: int
    folder: Path
    component: str = ""
    side: str = ""
    inputs: tuple[str, ...] = ()

    def plans(self) -> dict[str, Plan]:
        plans = plans_of(load_experiment(self.experiment), self.against, self.folder / "store")
        return {side: plan.of(self.photos) for side, plan in plans.items()}

    def output(self, side: str = "", component: str = "") -> Path:
        """The file of what this job, or that of another side and component, has computed."""
        return self.folder / f"{side or self.side}-{component or self.component}.safetensors"

    def write(self) -> Path:
        photos = [photo._asdict() for photo in self.photos]
        path = self.output().with_suffix(".json")
        path.write_text(json.dumps({**vars(self), "photos": photos, "folder": str(self.folder)}))
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        fields = json.loads(Path(path).read_text())
        photos = tuple(IndexedPhoto(**photo) for photo in fields["photos"])
        return cls(**{**fields, "photos": photos, "folder": Path(fields["folder"])})


def plans_of(experiment: Experiment, against: Preset, store: Path) -> dict[str, Plan]:
    """The plan of each side, for the first variant of each photo.  store: a folder for what both encode.

    Raises UserError where the device cannot run either policy.
    """
    data = experiment.data
    lowest = min(data.resolution) if isinstance(data.resolution, tuple) else data.resolution
    data = dataclasses.replace(data, resolution=lowest, crops=min(data.crops, 1), flip=False, repeats=1)
    own = dataclasses.replace(experiment, data=data)
    other = dataclasses.replace(own, precision=_precision_of(experiment.precision, against))
    return {side: _stored_in(store, resolve(each, LORA)) for side, each in ((OWN, own), (AGAINST, other))}


def _precision_of(settings: PrecisionSettings, preset: Preset) -> PrecisionSettings:
    """The preset by itself; how the device comes by bf16 is as in ``settings``."""
    if not preset.startswith("bf16"):
        return PrecisionSettings(preset)
    without_tables: dict = {name: {} for name in PRECISION_COMPONENTS}
    return dataclasses.replace(settings, preset=preset, **without_tables)


def _stored_in(folder: Path, plan: Plan) -> Plan:
    """The plan with a store of its own, which knows what the experiment's knows of files."""
    store = Store(folder)
    store.facts = plan.store.facts
    return dataclasses.replace(plan, store=store)


def evenly(things: Sequence, number: int) -> list:
    """``number`` of the things, at even distances, the first among them; all where there are no more."""
    number = min(number, len(things))
    return [things[place * len(things) // number] for place in range(number)]


def is_same(plans: Mapping[str, Plan], component: str) -> bool:
    """Whether both sides have the same policy for a component, so that it is computed once."""
    return getattr(plans[OWN].precision, component) == getattr(plans[AGAINST].precision, component)


def label(policy: Policy) -> str:
    """A policy for people, such as "fp16" or "fp32, kept as bf16"."""
    name = policy.compute + (" simulated" if policy.simulated else "")
    return name if policy.storage == policy.compute else f"{name}, kept as {policy.storage}"


class Tensors(Mapping):
    """The arrays of a safetensors file by key, each read when it is asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="np")
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
