"""Which family a pretrained model is of, by the pipeline that its model_index.json names."""

from pathlib import Path

from pipeline.flux import pretrained
from pipeline.flux.family import Flux

FLUX = Flux()
FAMILIES: dict[str, Flux] = {"FluxPipeline": FLUX}
"""By diffusers' class of the pipeline; a second family is a line here."""


def family_of(folder: Path) -> Flux:
    """FLUX.1 where the pipeline's class is not known: whether its components are FLUX.1's is checked in any case."""
    return FAMILIES.get(pretrained.pipeline_class(folder), FLUX)
