"""The protocol of a method: what stages ask of whatever is trained, a LoRA, a ControlNet, or a later one.

Only what makes or loads models imports MindSpore; the scheduler asks here too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pipeline.flux.family import Flux
from pipeline.settings.experiment import Experiment

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan


class StageNames(NamedTuple):
    """What the stages of a method are called."""

    room: str
    train: str
    measure: str
    draw: str
    decode: str
    report: str

    @classmethod
    def of(cls, label: str) -> "StageNames":
        """The names that a method gets where it says nothing."""
        drawn = f"Sample{label}Latents", f"Sample{label}"
        return cls(f"Check{label}Room", f"Train{label}", f"Measure{label}", *drawn, f"Report{label}")


class Saving(NamedTuple):
    """A value of a setting of the method with which a training takes less memory."""

    table: str
    name: str
    value: object


def _cannot_be_saved(folder: Path, result: Mapping, metadata: dict) -> Path:
    raise AssertionError("this is for predicting alone")


@dataclass
class Trainee:
    """Models in this process, and what of them trains or has been trained.

    frozen: the models that do not train, by component.  networks: those that predict, by name, whose blocks gradient
    checkpointing computes again.  predict: what they predict together, as of the family's `prediction`.
    trained: the parameters that train.  groups: of each 0, or 1 where ``text_encoder_lr`` is its learning rate.
    layer: one that trains, by name, whose output shows what it computes in.
    save: takes the run's folder, the trained parameters by name, and metadata; writes the result and returns its path.
    before_batch: called with the number of each batch, where something has to happen before it.
    as_saved: takes the folder of a result of the same training, and gives a block in which the models predict exactly
    what they do once `Method.load` has read that result; after it they are as before, bit for bit.
    """

    frozen: Mapping[str, Any]
    networks: Mapping[str, Any]
    predict: Callable
    trained: list
    layer: tuple[str, Any] | None = None
    groups: Sequence[int] = ()
    save: Callable[[Path, Mapping, dict], Path] = _cannot_be_saved
    before_batch: Callable[[int], object] | None = None
    as_saved: Callable[[Path], AbstractContextManager] | None = None

    @property
    def configs(self) -> list:
        return [network.config for network in self.networks.values()]


def untrained(plan: "Plan", frozen: dict) -> Trainee:
    """What the frozen models predict before anything is made in them or beside them: nothing trains."""
    network = plan.family.network
    return Trainee(frozen, {network: frozen[network]}, plan.family.prediction(**frozen), [])


class Method:
    """What a method answers; a new one is a subclass and a line in `pipeline.methods`.

    name: of its table in the experiment file and in identities.  label: what people call its result.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    stages: ClassVar[StageNames]
    """What its stages are called; `StageNames.of` its label, unless it says something else."""

    reads_conditions: ClassVar[bool] = False
    """Whether its batches have a condition for each photo, which EncodeControls encodes."""

    result_files: ClassVar[tuple[str, ...]] = ()
    """The files of a result, relative to the run's folder."""

    def __init_subclass__(cls):
        if "stages" not in vars(cls):
            cls.stages = StageNames.of(cls.label)

    def __repr__(self) -> str:
        return self.name

    def loading(self, folder: str) -> str:
        """How a Python program loads the result from a run's folder, in one line; empty where no library does."""
        return ""

    # --- what it needs and what decides it ---

    def has_pairs(self, experiment: Experiment) -> bool:
        """Whether every photo must name a file that is its condition."""
        return False

    def condition(self, experiment: Experiment) -> str:
        """What its conditions are, as of `pipeline.data.conditions`; asked where it reads conditions."""
        raise NotImplementedError

    def identity(self, plan: "Plan") -> dict:
        """What decides the weights of its result besides photos, models and [train]."""
        raise NotImplementedError

    def confirm(self, plan: "Plan") -> None:
        """Raise StoreError where a file that the training began with has changed since `identity` was asked for."""

    def frozen(self, experiment: Experiment, family: Flux) -> tuple[str, ...]:
        """The components that its training, and drawing with its result, loads."""
        return (family.network,)

    def trains_encoder(self, experiment: Experiment) -> bool:
        """Whether the family's trainable text encoder trains too."""
        return False

    # --- models ---

    def make(self, plan: "Plan", frozen: dict) -> Trainee:
        """What is to be trained, beside or inside the frozen models, by component."""
        raise NotImplementedError

    def load(self, plan: "Plan", frozen: dict, folder: Path) -> Trainee:
        """The same, as a training has saved it in ``folder``."""
        raise NotImplementedError

    # --- what the result is in a picture's address ---

    def drawn_with(self, plan: "Plan", folder: Path) -> dict:
        """What decides pictures with the result in ``folder`` besides what decides those without it."""
        raise NotImplementedError

    def configs(self, plan: "Plan", folder: Path) -> list[dict]:
        """The configs of networks of its own, saved in ``folder``, that predict beside the family's."""
        return []

    # --- estimates, from configs alone ---

    def num_trained(self, experiment: Experiment, family: Flux, config_of: Callable[[str], dict]) -> int:
        """How many parameters train.  config_of: gives a component's config.  Raises UserError where that cannot be."""
        raise NotImplementedError

    def num_blocks(self, experiment: Experiment, config: dict) -> int:
        """How many blocks it has of its own, beside a network of this config."""
        return 0

    def saved_dtype(self, experiment: Experiment) -> str:
        return "fp32"

    def savings(self, experiment: Experiment, config: dict) -> Iterable[Saving]:
        """Settings of its own with which a training takes less memory, each less than the one before.

        config: the network's.
        """
        return ()
