"""A ControlNet (arXiv:2302.05543) for the FLUX.1 transformer: making, loading and saving it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cache import write_atomically, write_tensors
from cache.core.files import make_folder
from pipeline.devices import simulation, tensors
from pipeline.devices.precision import LONG_NAMES, Policy
from pipeline.errors import UserError
from pipeline.flux import models, pretrained, weights
from pipeline.methods.exchanged import exchanged
from pipeline.settings.experiment import Experiment

FOLDER, WEIGHTS_NAME = "controlnet", "controlnet/diffusion_pytorch_model.safetensors"
CONFIG_NAME = "controlnet/config.json"
PREFIX = "controlnet."
SHARED = (
    *("in_channels", "joint_attention_dim", "pooled_projection_dim", "attention_head_dim", "num_attention_heads"),
    *("axes_dims_rope", "patch_size"),
)
"""What the ControlNet's config must have in common with the transformer's."""

USUAL_DOUBLE_LAYERS = 4
"""What ``num_double_layers = "auto"`` is where the transformer has as many; diffusers' script trains 4 by default."""

UNSUPPORTED = {"num_mode": "a union of several conditions", "conditioning_embedding_channels": "a pixel encoder"}
"""Config fields of ControlNets that take other conditions than the VAE's latents."""


def make(transformer, experiment: Experiment, policy: Policy):
    """A ControlNet to be trained beside a frozen transformer, all of its parameters in ``policy.params``.

    From a folder, or from the transformer's first blocks, copied: nothing it is trained to changes the transformer.
    Its output layers start at zero then, so that at first the transformer predicts what it does alone.
    Raises UserError where the folder's ControlNet is for another transformer, or asks for more blocks than there are.
    """
    origin = experiment.init_from
    config = dict(transformer.config)
    check(experiment, config)
    if origin:
        controlnet = models.load_model(origin, pretrained.CONTROLNET, policy.params)
    else:
        controlnet = from_transformer(transformer, *depths(experiment, config))
    for parameter in controlnet.get_parameters():
        parameter.requires_grad = True
        parameter.name = PREFIX + parameter.name  # a compiled graph takes no two parameters of one name
    use_precision(controlnet, policy)
    return controlnet.set_train(False)  # as in inference: FLUX.1 has no layer that knows the difference


def check(experiment: Experiment, transformer: dict) -> None:
    """Raise UserError where no ControlNet can be made as the experiment says, for a transformer of this config."""
    if experiment.init_from:
        check_fits(experiment.init_from, transformer)
    else:
        _check_depths(transformer, *depths(experiment, transformer))


def depths(experiment: Experiment, transformer: dict) -> tuple[int, int]:
    """How many double and single blocks the ControlNet has, beside a transformer of this config."""
    if experiment.init_from:
        found = pretrained.checked_config(experiment.init_from, pretrained.CONTROLNET)
        return found["num_layers"], found["num_single_layers"]
    double = experiment.controlnet.num_double_layers
    at_most = transformer["num_layers"]
    return min(USUAL_DOUBLE_LAYERS, at_most) if double == "auto" else double, experiment.controlnet.num_single_layers


def from_transformer(transformer, num_double_layers: int, num_single_layers: int):
    """A ControlNet of the first so many double and single blocks of a transformer.

    mindone's ``from_transformer`` lets both share memory in float32, so that training one changes the other.
    """
    own = dict(transformer.config)
    depths = {"num_layers": num_double_layers, "num_single_layers": num_single_layers}
    wanted = {key: own[key] for key in (*SHARED, "guidance_embeds") if key in own}
    controlnet = models.without_values(pretrained.CONTROLNET, wanted | depths)
    base = {parameter.name: parameter for parameter in transformer.get_parameters()}
    for parameter in controlnet.get_parameters():
        if parameter.name in base:
            values = base[parameter.name].float().asnumpy().copy()
        elif parameter.name.startswith(("controlnet_", "input_hint")):
            values = np.zeros(parameter.shape, np.float32)
        else:
            raise ValueError(f"the transformer has no {parameter.name} to start the ControlNet from")
        weights.set_value(parameter, values)
    return controlnet


def _check_depths(own: dict, num_double_layers: int, num_single_layers: int) -> None:
    for name, asked, there in (
        ("num_double_layers", num_double_layers, own["num_layers"]),
        ("num_single_layers", num_single_layers, own["num_single_layers"]),
    ):
        if asked > there:
            raise UserError(f"controlnet.{name}: {asked}, but the transformer has {there} such blocks to start from")
    if not num_double_layers + num_single_layers:
        raise UserError("controlnet.num_double_layers: the transformer has no double blocks; set num_single_layers")


def check_fits(folder: Path, transformer: dict) -> None:
    """Raise UserError where there is no ControlNet in ``folder``, or one for a transformer of another config."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing; check [controlnet] init_from: the folder of a FLUX.1 ControlNet")
    found = pretrained.checked_config(folder, pretrained.CONTROLNET)
    pretrained.weight_files(folder, pretrained.CONTROLNET)
    for key, meaning in UNSUPPORTED.items():
        if found.get(key) is not None:
            raise UserError(f"{path}: {key} is {found[key]}: {meaning}, not supported; see [controlnet] init_from")
    both = [key for key in SHARED if key in found and key in transformer]  # what is not said has the same default
    differing = [key for key in both if _plain(found[key]) != _plain(transformer[key])]
    if differing:
        said = ", ".join(f"{key} {found[key]} and not {transformer.get(key)}" for key in differing)
        raise UserError(f"{path}: for another transformer than [model] path has: {said}")


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


def use_precision(controlnet, policy: Policy) -> None:
    """Linear layers compute in ``policy.compute``, everything else in the dtype that comes to it, as under autocast.

    Of a whole model `to_float` would also take positions, timesteps and variances to half precision.
    """
    if policy.simulated:
        return simulation.round_outputs(controlnet, models.last_layers(controlnet))
    if policy.compute == policy.params:
        return
    from mindspore import mint

    dtype = tensors.mindspore_dtype(policy.compute)
    names = {id(parameter): parameter.name for parameter in controlnet.get_parameters()}
    for _, cell in list(controlnet.cells_and_names()):
        if isinstance(cell, mint.nn.Linear):
            cell.to_float(dtype)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):  # their fp32 weights make fp32 of half
            if getattr(cell, norm, None) is not None:
                setattr(cell, norm, _cast(getattr(cell, norm), dtype))
    for parameter in controlnet.get_parameters():
        parameter.name = names[id(parameter)]


def _cast(cell, dtype):
    """``cell`` with its output in ``dtype``."""
    from mindspore import nn

    class Cast(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.cell = cell

        def construct(self, x):
            return self.cell(x).astype(dtype)

    return Cast()


def save(controlnet, folder: Path, result: Mapping, dtype: str, metadata: dict[str, str]) -> Path:
    """Write ``folder``/controlnet as diffusers loads it, the weights last, atomically.  Returns their path.

    result: the parameters by name.  dtype: "fp32", "bf16" or "fp16", of the saved weights.
    Raises UserError where a weight overflows in that dtype.
    """
    import ml_dtypes

    name = LONG_NAMES[dtype]
    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    parameters = {weights.name_in_file(key.removeprefix(PREFIX)): result[key] for key in sorted(result)}
    make_folder(folder / FOLDER)
    _write_config(folder / CONFIG_NAME, controlnet)

    def arrays():
        for key, parameter in parameters.items():
            array = parameter.asnumpy().astype(numpy_dtype)
            if not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f"controlnet: {key} is not finite in {dtype}; set controlnet.save_dtype = 'fp32'")
            yield array

    shapes = {key: (name, parameter.shape) for key, parameter in parameters.items()}
    path = folder / WEIGHTS_NAME
    write_tensors(path, shapes, arrays(), {"format": "pt"} | metadata)
    return path


@contextmanager
def as_saved(parameters: Sequence, folder: Path) -> Iterator[None]:
    """A block in which a ControlNet's parameters are what is saved in ``folder``, rounded as it was."""
    saved = weights.mapped(folder / WEIGHTS_NAME)
    named = [(each, weights.name_in_file(each.name.removeprefix(PREFIX))) for each in parameters]
    with exchanged((parameter, saved[name]) for parameter, name in named):
        yield


def _write_config(path: Path, controlnet) -> None:
    found = {key: value for key, value in dict(controlnet.config).items() if not key.startswith("_")}
    found |= {"_class_name": "FluxControlNetModel", "_diffusers_version": "0.35.2"}
    write_atomically(path, json.dumps(found, indent=2, sort_keys=True) + "\n")
