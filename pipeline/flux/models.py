"""Loading the models and tokenizers of FLUX.1, component by component, and checking that the files fit the configs.

Every loader raises UserError for what a user can put right, and returns nothing that lacks a weight or ignored one.
"""

import os
import warnings
from pathlib import Path

from cache.terminal.words import human_bytes
from pipeline.devices import by_need, fp32, simulation, tensors
from pipeline.devices.precision import Policy
from pipeline.errors import UserError
from pipeline.flux import single_file, t5, weights
from pipeline.flux.model_configs import CONFIGS
from pipeline.flux.pretrained import TOKENIZERS, checked_config, one_line, part_of, weight_files
from pipeline.process.progress import busy

KEEPS_FP32 = {"text_encoder_2": "fp16"}
"""Of T5 in float16, mindone keeps the feed-forward's last projections, which overflow there, in float32."""

LABELS = {
    "text_encoder": "CLIP",
    "text_encoder_2": "T5",
    "vae": "the VAE",
    "transformer": "the transformer",
    "controlnet": "the ControlNet",
}
"""What people call the components."""

LAST_LAYERS = {
    "FluxTransformer2DModel": ("proj_out",),
    "FluxControlNetModel": ("controlnet_blocks", "controlnet_single_blocks"),
    "CLIPTextModel": ("text_model.final_layer_norm",),
    "T5EncoderModel": ("encoder.final_layer_norm",),
    "AutoencoderKL": ("encoder.conv_out", "decoder.conv_out"),
}
"""The layers, or lists of layers, that give a model's output, by its class."""


def load_tokenizer(folder: Path, component: str):
    """The fast tokenizer: the slow CLIP one gives other tokens with ftfy installed than without."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not installed
    by_need.install()
    from transformers import CLIPTokenizerFast, T5TokenizerFast

    cls = CLIPTokenizerFast if component == "tokenizer" else T5TokenizerFast
    try:
        return cls.from_pretrained(str(folder / component), local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json is a bare Exception
        raise UserError(f"{folder / component}: cannot load the tokenizer: {one_line(error)}") from error


def load_model(folder: Path, component: str, dtype: str, variant: str = "", transformer: Path | None = None):
    """The component with its weights in ``dtype`` ("fp32", ...), frozen, in inference mode; says what it loads.

    transformer: where the transformer's weights are instead, as of `pretrained.weight_files`.
    Raises UserError that names every missing or unexpected weight.
    """
    settings, files = checked_config(folder, component), weight_files(folder, component, variant, transformer)
    size = human_bytes(sum(path.stat().st_size for path in files))
    with busy(f"loading {LABELS.get(component, component)} ({size})"):
        return _loaded(folder, component, dtype, settings, files, transformer)


def _loaded(
    folder: Path, component: str, dtype: str, settings: dict, files: list[Path], transformer: Path | None = None
):
    model = without_values(component, settings, part_of(folder, component))
    _use_dtype(model, dtype)
    if component == "transformer" and transformer is not None:
        weights.fill(model, transformer, files, single_file.as_diffusers)
    else:
        weights.fill(model, part_of(folder, component), files)
    if component == "text_encoder_2":
        t5.use_exact_buckets(model)
    fp32.keep_attention(model)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    return model.set_train(False)


def without_values(component: str, settings: dict, part: Path | str = "config"):
    """The component's model as its config, ``settings``, says; nothing is drawn at random for its parameters.

    part: the folder that is named where the class cannot use such a config, which raises UserError.
    """
    from mindspore.nn.utils import no_init_parameters

    cls = model_class(component)
    try:
        with no_init_parameters(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of mindone about a name that mindone uses
            if component.startswith("text_encoder"):
                return cls(cls.config_class.from_dict(settings))
            return cls.from_config(settings)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{part}: cannot load {cls.__name__}: {one_line(error)}") from error


def _use_dtype(model, dtype: str) -> None:
    """Set the dtype of parameters that have no values yet, which costs nothing.

    Some layers stay in float32 where the rest is float16, as transformers has it: T5's ``wo`` would overflow.
    """
    kept = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == "fp16" else ()
    for parameter in model.get_parameters():
        is_kept = not set(kept).isdisjoint(parameter.name.split("."))
        parameter.set_dtype(tensors.mindspore_dtype("fp32" if is_kept else dtype))


def load_component(
    folder: Path, component: str, policy: Policy | None, variant: str = "", transformer: Path | None = None
):
    """A component of a pretrained model as its precision policy says, or a tokenizer, which has none."""
    if component in TOKENIZERS:
        return load_tokenizer(folder, component)
    assert policy is not None, component
    loaded = load_model(folder, component, policy.params_on_device, variant, transformer)
    if policy.simulated:
        simulation.simulate(loaded, last_layers(loaded))
    return loaded


def last_layers(model) -> tuple[str, ...]:
    """The names of the layers, or lists of layers, that give a model's output."""
    return LAST_LAYERS[type(model).__name__]


def model_class(component: str):
    from mindone.diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
    from mindone.transformers import CLIPTextModel, T5EncoderModel

    classes = AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel, CLIPTextModel, T5EncoderModel
    return {cls.__name__: cls for cls in classes}[CONFIGS[component][0]]


def blocks_of(network) -> list:
    """The blocks of a transformer or a ControlNet, in their order."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]


def recompute_blocks(transformer) -> None:
    """Keep no activations inside the transformer's blocks: compute them again for the gradient (arXiv:1604.06174).

    Call it when LoRA layers are in place: a block notes then which of its parameters train.
    """
    transformer.pos_embed = _make_constant(transformer.pos_embed)
    for block in blocks_of(transformer):
        block.recompute()


def _make_constant(cell):
    """``cell``, whose output is a pair of tensors, without a gradient: recomputed cells take no others in a tuple."""
    from mindspore import nn, ops

    class Constant(nn.Cell):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def construct(self, ids):
            first, second = self.cell(ids)
            return ops.stop_gradient(first), ops.stop_gradient(second)

    return Constant()
