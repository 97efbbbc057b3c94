"""What is planned: an experiment on one device, with the models that some configs describe.  Imports no MindSpore."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.devices import device, precision
from pipeline.flux import checkpoints, counts
from pipeline.plan import pictures
from pipeline.plan.plan import CONTROLNET, LORA
from pipeline.settings.fields import Experiment

CLIP, T5, IMAGES, CONTROLS = "EncodeCLIP", "EncodeT5", "EncodeImages", "EncodeControls"
TRAINS = {LORA: "TrainLoRA", CONTROLNET: "TrainControlNet"}
DRAWS = {LORA: "SampleLatents", CONTROLNET: "SampleControlNetLatents"}
DECODES = {LORA: "Sample", CONTROLNET: "SampleControlNet"}
"""The stages that load a model; the last three by what the experiment trains."""

PUBLISHED = "bf16"
"""The dtype of FLUX.1's weights as they are published."""


@dataclass(frozen=True)
class Subject:
    """configs: a folder in a checkpoint's layout; ``has_weights`` says whether the weights are in it too.

    target: the device, "Ascend" or "CPU".  trains: as of `recipes.Plan`.
    """

    configs: Path
    experiment: Experiment
    target: str
    trains: str
    has_weights: bool = False

    @cached_property
    def policies(self) -> precision.Precision:
        """Raises UserError where the device cannot run the experiment's precision."""
        return precision.resolve(self.experiment.precision, self.target, device.COMPUTES[self.target])

    @property
    def memory_bytes(self) -> int:
        """What one device has."""
        return device.memory_bytes(self.target, self.experiment.device.memory_gb)

    @property
    def has_pictures(self) -> bool:
        """Whether the experiment asks for pictures of what it trains."""
        return pictures.is_asked(self.experiment, self.trains)

    def parameters(self, component: str) -> int:
        return counts.component(component, self.config(component))

    def file_bytes(self, component: str) -> int:
        """Of the files that hold a component's weights: as they are here, or as they are published."""
        if not self.has_weights:
            return self.parameters(component) * precision.BYTES[PUBLISHED]
        files = checkpoints.weight_files(self.configs, component, self.experiment.model.variant)
        return sum(path.stat().st_size for path in files)

    def config(self, component: str) -> dict:
        """Raises UserError where the config is missing, of another model, or lacks a size."""
        return checkpoints.checked_config(self.configs, component)
