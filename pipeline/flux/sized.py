"""Models of any size with random weights, written straight to safetensors: no model is made in memory as a whole.

For tests and benchmarks of FLUX.1's real sizes, one dimension at a time.  Needs `device.use` before.
"""

import json
from pathlib import Path

import numpy as np

from cache import digest, write_tensors
from pipeline.flux import models, pretrained
from pipeline.flux.tiny import random_weight
from pipeline.flux.weights import name_in_file

CONFIGS = pretrained.PUBLISHED_CONFIGS / "FLUX.1-dev"


def write(folder: Path, component: str, shards: int = 1, dtype: str = "float32", **changed) -> int:
    """Write FLUX.1-dev's component, but for what is ``changed`` in its config, to ``folder`` in diffusers' layout.

    shards: files.  dtype: of the weights.  Returns the number of parameters.  Same config, same numbers.
    """
    settings = json.loads((CONFIGS / component / "config.json").read_text()) | changed
    part = folder / component
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    parameters = {each.name: tuple(each.shape) for each in models.without_values(component, settings).get_parameters()}
    stem, names = pretrained.WEIGHTS[component], list(parameters)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        path = part / (f"{stem}-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else f"{stem}.safetensors")
        own = {name: parameters[name] for name in names[number::shards]}
        described = {name_in_file(name): (dtype, shape) for name, shape in own.items()}
        write_tensors(path, described, (_values(name, shape, dtype) for name, shape in own.items()), {"format": "pt"})
        weight_map |= dict.fromkeys(described, path.name)
    if shards > 1:
        (part / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(int(np.prod(shape)) for shape in parameters.values())


def _values(name: str, shape: tuple, dtype: str) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=int(digest(name.encode()), 16)))
    return np.ascontiguousarray(random_weight(name, shape, generator), dtype)
