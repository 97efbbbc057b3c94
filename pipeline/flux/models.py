"""Loading FLUX.1's models and tokenizers by component, and finding that what was loaded is what the files hold.

Every loader raises UserError for what a user can put right, and returns nothing that lacks a weight or ignored one.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.devices import simulation
from pipeline.devices.precision import Policy
from pipeline.errors import UserError
from pipeline.flux import weights
from pipeline.flux.checkpoints import EXPECTED, TOKENIZERS, checked_config, config, one_line, part_of, weight_files
from pipeline.plan.plan import Plan


def load_tokenizer(folder: Path, component: str):
    """The fast tokenizer: the slow CLIP one gives other tokens with ftfy installed than without."""
    from transformers import CLIPTokenizerFast, T5TokenizerFast

    cls = {"tokenizer": CLIPTokenizerFast, "tokenizer_2": T5TokenizerFast}[component]
    try:
        return cls.from_pretrained(str(folder / component), local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json is a bare Exception
        raise UserError(f"{folder / component}: cannot load the tokenizer: {one_line(error)}") from error


def load_model(folder: Path, component: str, dtype: str, variant: str = ""):
    """The component with its weights in ``dtype`` ("fp32", ...), frozen, in inference mode.

    Raises UserError that names every missing or unexpected weight.
    """
    settings, files = checked_config(folder, component), weight_files(folder, component, variant)
    model = without_values(component, settings, part_of(folder, component))
    _use_dtype(model, dtype)
    weights.fill(model, part_of(folder, component), files)
    if component == "text_encoder_2":
        _use_exact_buckets(model)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    return model.set_train(False)


def without_values(component: str, settings: dict, part: Path | str = "config"):
    """The component's model as its config, ``settings``, says; nothing is drawn at random for its parameters.

    part: the folder that is named where the class cannot use such a config, which raises UserError.
    """
    from mindspore.nn.utils import no_init_parameters

    cls = _model_class(component)
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
        parameter.set_dtype(mindspore_dtype("fp32" if is_kept else dtype))


def load_component(plan: Plan, component: str):
    """A component of the plan's checkpoint, as its precision policy says, or a tokenizer.

    Raises StoreError where its files are no longer those that the plan's addresses are about.
    """
    plan.digest_of(component)  # before the files are opened
    if component in TOKENIZERS:
        loaded = load_tokenizer(plan.checkpoint, component)
    else:
        policy = getattr(plan.precision, component)
        loaded = load_model(plan.checkpoint, component, policy.params_on_device, plan.experiment.model.variant)
        if policy.simulated:
            simulation.simulate(loaded)
    plan.confirm(component)
    return loaded


def _model_class(component: str):
    from mindone.diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
    from mindone.transformers import CLIPTextModel, T5EncoderModel

    classes = AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel, CLIPTextModel, T5EncoderModel
    return {cls.__name__: cls for cls in classes}[EXPECTED[component][0]]


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


def as_input(tensor, policy: Policy):
    """A float32 tensor as a model under the policy takes it."""
    if policy.simulated:
        return simulation.rounding()(tensor)
    dtype = mindspore_dtype(policy.compute)
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)  # to its own dtype it takes 0.2 ms on CPU


def mindspore_dtype(name: str):
    import mindspore as ms

    return {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}[name]


def position_buckets(num_queries: int, num_keys: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """T5's bidirectional relative position buckets (arXiv:1910.10683), (num_queries, num_keys), int32.

    They depend on nothing but shapes.  In float32 on a device ``log(16)`` may come out a hair low and is then cut off
    to the bucket below; here the host computes them in float64.
    """
    distance = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None]
    half = num_buckets // 2
    exact = half // 2
    length = np.abs(distance)
    growth = np.log(np.maximum(length, 1) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + np.floor(growth * (half - exact) + 1e-9).astype(np.int64), half - 1)
    return (np.where(length < exact, length, far) + half * (distance > 0)).astype(np.int32)


def _use_exact_buckets(t5) -> None:
    for _, cell in t5.cells_and_names():
        if getattr(cell, "has_relative_attention_bias", False):
            cell.compute_bias = _host_bias.__get__(cell)


def _host_bias(self, query_length, key_length, cache_position=None):
    import mindspore as ms

    limits = self.relative_attention_num_buckets, self.relative_attention_max_distance
    buckets = position_buckets(query_length, key_length, *limits)
    values = self.relative_attention_bias(ms.Tensor(buckets))
    return values.permute(2, 0, 1).expand_dims(0)


def inference_sigmas(folder: Path, num_steps: int, num_tokens: int) -> np.ndarray:
    """The noise levels of sampling, (num_steps + 1,) float32, from high to 0, as diffusers' FluxPipeline has them.

    Evenly spaced from 1 to 1 / num_steps, then shifted: by the number of an image's tokens where the checkpoint's
    scheduler shifts dynamically, by its constant elsewhere.  Raises UserError for a scheduler that draws noise at
    every step.
    """
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler

    settings = config(folder, "scheduler")
    if settings.get("stochastic_sampling"):
        raise UserError(f"{folder / 'scheduler'}: stochastic_sampling is not supported; set it to false")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings)
    even = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=even, mu=resolution_shift(num_tokens, scheduler.config))
    return scheduler.sigmas.asnumpy()


def resolution_shift(num_tokens: int, settings: Mapping) -> float:
    """mu of arXiv:2403.03206's shift by resolution: on the line through both ends of the scheduler's config."""
    first, last = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    low, high = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
    slope = (high - low) / (last - first)
    return num_tokens * slope + (low - slope * first)


def scheduler_sigmas(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The scheduler's own noise levels and timesteps, (num_train_timesteps,) float32 each, from high to low."""
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config(folder, "scheduler"))
    return scheduler.sigmas.asnumpy(), scheduler.timesteps.asnumpy()
