"""What an estimate is about: an experiment, a device, and the configs of the models.  Imports no MindSpore."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.devices import device, precision
from pipeline.flux import pretrained
from pipeline.flux.family import Flux
from pipeline.plan import pictures
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan, shared_by
from pipeline.settings.experiment import Experiment

PUBLISHED = "bf16"
"""The dtype of FLUX.1's weights as they are published."""


@dataclass(frozen=True)
class Subject:
    """configs: a folder in diffusers' layout; ``has_weights`` says whether the weights are in it too.

    target: the device, "Ascend" or "CPU".
    """

    configs: Path
    experiment: Experiment
    target: str
    method: Method
    family: Flux
    has_weights: bool = False

    @classmethod
    def of_plan(cls, plan: Plan) -> "Subject":
        return cls(plan.model_folder, plan.experiment, plan.device, plan.method, plan.family, has_weights=True)

    @cached_property
    def policies(self) -> precision.Precision:
        """Raises UserError where the device cannot run the experiment's precision."""
        return precision.resolve(self.experiment.precision, self.target, device.COMPUTES[self.target])

    @property
    def memory_bytes(self) -> int:
        """What one device has."""
        return device.memory_bytes(self.target, self.experiment.device.memory_gb)

    @property
    def num_ranks(self) -> int:
        """How many devices train together."""
        return shared_by(self.experiment, self.target)

    @property
    def has_pictures(self) -> bool:
        """Whether the experiment asks for pictures of what it trains."""
        return pictures.is_asked(self.experiment, self.method)

    def parameters(self, component: str) -> int:
        return self.family.num_parameters(component, self.config(component))

    def file_bytes(self, component: str) -> int:
        """Of the files that hold a component's weights: as they are here, or as they are published."""
        if not self.has_weights:
            return self.parameters(component) * precision.BYTES[PUBLISHED]
        files = pretrained.weight_files(self.configs, component, *self.experiment.model_weights)
        return sum(path.stat().st_size for path in files)

    def policy(self, component: str) -> precision.Policy:
        return getattr(self.policies, component)

    def config(self, component: str) -> dict:
        """Raises UserError where the config is missing, of another model, or lacks a size."""
        return pretrained.checked_config(self.configs, component)
