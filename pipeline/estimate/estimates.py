"""What each stage of an experiment takes, from configs alone: parameters, bytes, memory.  Imports no MindSpore."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from pipeline.data import variants
from pipeline.devices import dtypes
from pipeline.devices.precision import BYTES
from pipeline.errors import UserError
from pipeline.estimate import advice, memory
from pipeline.estimate.subject import CLIP, CONTROLS, DECODES, DRAWS, IMAGES, T5, Subject
from pipeline.flux import counts
from pipeline.methods import controlnet, lora
from pipeline.plan.plan import CONTROLNET, LORA
from pipeline.settings.fields import LORA_TARGETS, Train

ESTIMATED = ("peak_bytes", "host_loading_bytes")
ACTIVATIONS = tuple(f"activations_{each}bytes" for each in ("", "without_checkpointing_", "with_checkpointing_"))
"""What is estimated of a stage, and of a training besides; everything else here is counted."""


class Epoch(NamedTuple):
    """How many samples an epoch has, and the sizes in pixels that they come in."""

    num_samples: int
    sizes: frozenset[variants.Size]


class Load(NamedTuple):
    """What a stage loads: checkpoint's components, and the bytes of all weights; and what its work takes besides."""

    components: tuple[str, ...]
    parameters: int
    weights_bytes: int
    working_bytes: int


# --- stages that encode, draw or decode ---------------------------------------------------------------------------


def stage(subject: Subject, name: str) -> dict:
    """What one of the stages in `LOADS` takes.

    peak_bytes: of the process on CPU, of the device elsewhere; host_loading_bytes: of the host in any case, besides the
    pages of the files, which the host can take back.  fits, advice: as `advice.verdict` has them.
    """
    load_of, knobs = LOADS[name]
    peak_bytes = _peak_bytes(subject, load_of)
    found = _loaded(subject, load_of(subject)) | {"peak_bytes": peak_bytes, "estimated": list(ESTIMATED)}
    return found | advice.verdict(subject, peak_bytes, knobs, lambda other: _peak_bytes(other, load_of))


def _loaded(subject: Subject, load: Load) -> dict:
    return {
        "components": list(load.components),
        "parameters": load.parameters,
        "weights_bytes": load.weights_bytes,
        "files_bytes": sum(subject.file_bytes(name) for name in load.components),
        "host_loading_bytes": memory.loading_bytes(load.weights_bytes),
    }


def _peak_bytes(subject: Subject, load_of: Callable[[Subject], Load]) -> int:
    load = load_of(subject)
    return memory.peak_bytes(load.weights_bytes, load.working_bytes, subject.target)


def _load(subject: Subject, component: str, working_bytes: int) -> Load:
    number, dtype = subject.parameters(component), getattr(subject.policies, component).params_on_device
    weights_bytes = number * BYTES[dtype]
    if dtypes.KEEPS_FP32.get(component) == dtype:  # T5's alone
        weights_bytes += counts.text_encoder_2_outputs(subject.config(component)) * (BYTES["fp32"] - BYTES[dtype])
    return Load((component,), number, weights_bytes, working_bytes)


def _element_bytes(subject: Subject, component: str) -> int:
    """Of what an encoder or decoder computes; on CPU, kernels for float16 work in float32."""
    return 4 if subject.target == "CPU" else BYTES[getattr(subject.policies, component).compute]


def _clip(subject: Subject) -> Load:
    own, size = subject.config("text_encoder"), _element_bytes(subject, "text_encoder")
    sizes = own["max_position_embeddings"], own["intermediate_size"], own["num_attention_heads"]
    return _load(subject, "text_encoder", memory.of_caption(*sizes, size))


def _t5(subject: Subject) -> Load:
    own, size = subject.config("text_encoder_2"), _element_bytes(subject, "text_encoder_2")
    sizes = subject.experiment.data.max_sequence_length, own["d_ff"], own["num_heads"]
    return _load(subject, "text_encoder_2", memory.of_caption(*sizes, size))


def _images(subject: Subject) -> Load:
    return _vae(subject, memory.ENCODED, variants.squares(subject.experiment.data)[-1])


def _controls(subject: Subject) -> Load:
    """Of the photos, and of what is drawn."""
    side = subject.experiment.sample_resolution if subject.has_pictures else 0
    return _vae(subject, memory.ENCODED, max(variants.squares(subject.experiment.data)[-1], (side, side)))


def _decoding(subject: Subject) -> Load:
    side = subject.experiment.sample_resolution
    return _vae(subject, memory.DECODED, (side, side))


def _vae(subject: Subject, tensors: float, size: variants.Size) -> Load:
    """All of the VAE is loaded, though the encoder or the decoder alone computes."""
    working = memory.of_picture(tensors, subject.config("vae"), *size, _element_bytes(subject, "vae"))
    return _load(subject, "vae", working)


def _drawing(subject: Subject) -> Load:
    frozen, trained, settings = _frozen(subject), _trained(subject), subject.experiment.sample
    side = subject.experiment.sample_resolution
    shape = _shape(subject, frozenset([(side, side)]), min(settings.batch_size, len(settings.prompts)))
    kept = sum(controlnet.depths(subject.experiment)) if subject.trains == CONTROLNET else 0
    size = BYTES[subject.policies.transformer.compute_on_device]
    return frozen._replace(
        parameters=frozen.parameters + trained,
        weights_bytes=frozen.weights_bytes + 4 * trained,
        working_bytes=memory.of_prediction(shape, kept, subject.target, size),
    )


LOADS = {
    CLIP: (_clip, [advice.PRESET]),
    T5: (_t5, [advice.PRESET, advice.LENGTH]),
    IMAGES: (_images, [advice.PRESET, advice.RESOLUTION]),
    CONTROLS: (_controls, [advice.PRESET, advice.RESOLUTION, advice.SAMPLE_RESOLUTION]),
    **dict.fromkeys(DRAWS.values(), (_drawing, [advice.SAMPLE_BATCH, advice.PRESET, advice.SAMPLE_RESOLUTION])),
    **dict.fromkeys(DECODES.values(), (_decoding, [advice.PRESET, advice.SAMPLE_RESOLUTION])),
}
"""By stage: what it loads, and which settings save memory there, in the order in which they are to be changed."""


# --- training -----------------------------------------------------------------------------------------------------

TRAINING_KNOBS = [advice.CHECKPOINTING, advice.BATCH, advice.PRESET, advice.DEPTH, advice.RESOLUTION]


def training(subject: Subject, epoch: Epoch) -> dict:
    """What a training keeps: of the frozen models and of what trains, which has float32 and two moments.

    checkpoints_bytes: at most at one time, while a new one is written.  memory_bytes: what the device has.
    """
    found = _training(subject, epoch)

    def peak_of(other: Subject) -> int:
        is_smaller = other.experiment.data != subject.experiment.data
        sizes = frozenset(variants.squares(other.experiment.data)) if is_smaller else epoch.sizes
        return _training(other, epoch._replace(sizes=sizes))["peak_bytes"]

    found |= {"estimated": [*ESTIMATED, *ACTIVATIONS]}
    return found | advice.verdict(subject, found["peak_bytes"], TRAINING_KNOBS, peak_of)


def _training(subject: Subject, epoch: Epoch) -> dict:
    experiment, settings = subject.experiment, subject.experiment.train
    frozen, trained = _frozen(subject), _trained(subject)
    copies = 4 if settings.ema_decay else 3
    saved = BYTES[experiment.controlnet.save_dtype] if subject.trains == CONTROLNET else 4
    held = {
        "weights_bytes": frozen.weights_bytes + 4 * trained,
        "gradients_bytes": 4 * trained * (1 + (settings.accumulate > 1)),
        "optimizer_bytes": 4 * trained * (copies - 1),
    }
    steps = settings.steps
    if settings.epochs:
        steps = max(1, settings.epochs * epoch.num_samples // (settings.batch_size * settings.accumulate))
    shape = _shape(subject, epoch.sizes, settings.batch_size)
    element_bytes = BYTES[subject.policies.transformer.compute_on_device]
    known = dataclasses.replace(settings, steps=steps)
    load = frozen._replace(parameters=frozen.parameters + trained, weights_bytes=held["weights_bytes"])
    return {
        "trained_parameters": trained,
        **_loaded(subject, load),
        **held,
        **memory.of_training(held, shape, known, subject.target, element_bytes, len(epoch.sizes)),
        "num_shapes": len(epoch.sizes),
        "checkpoints_bytes": checkpoints_bytes(4 * trained, settings),
        "result_bytes": saved * trained,
    }


def _frozen(subject: Subject) -> Load:
    """The models that a training, or drawing with its result, loads and does not change."""
    found = _load(subject, "transformer", 0)
    if subject.trains != LORA or not subject.experiment.lora.train_text_encoder:
        return found
    clip = _load(subject, "text_encoder", 0)
    return Load(*(own + other for own, other in zip(found, clip)))


def _shape(subject: Subject, sizes: frozenset[variants.Size], batch_size: int) -> memory.Shape:
    """Of the largest batch, of pictures of these sizes in pixels."""
    own, experiment = subject.config("transformer"), subject.experiment
    blocks = own["num_layers"] + own["num_single_layers"]
    blocks += sum(controlnet.depths(experiment)) if subject.trains == CONTROLNET else 0
    pixels = 2 ** len(subject.config("vae")["block_out_channels"])  # of a token, which is 2 x 2
    tokens = max(width * height for width, height in sizes) // pixels**2 + experiment.data.max_sequence_length
    heads = own["num_attention_heads"]
    return memory.Shape(batch_size, tokens, heads * own["attention_head_dim"], heads, blocks)


def checkpoints_bytes(trained_bytes: int, settings: Train) -> int:
    """The most that a run's checkpoints take at one time: those that are kept, and one that is being written.

    Where the run's length is in epochs, as many as that are taken to be written.
    """
    every = settings.checkpoint_every or settings.steps
    written = settings.keep_checkpoints + 1 if settings.epochs else -(-settings.steps // every)
    copies = 4 if settings.ema_decay else 3  # the parameters, two moments, and their moving average
    return trained_bytes * copies * min(settings.keep_checkpoints + 1, written)


def _trained(subject: Subject) -> int:
    own, experiment = subject.config("transformer"), subject.experiment
    if subject.trains == CONTROLNET:
        controlnet.check(experiment, own)
        return counts.controlnet(own, *controlnet.depths(experiment))
    wanted, layers = LORA_TARGETS.get(experiment.lora.targets, experiment.lora.targets), counts.transformer_layers(own)
    for target in wanted:
        if not any(counts.is_meant(name, target) for name in layers):
            raise UserError(f"lora.targets: no linear layer of the transformer is named {target}")
    trained = counts.lora(layers, experiment.lora.rank, wanted)
    if experiment.lora.train_text_encoder:
        layers = counts.text_encoder_layers(subject.config("text_encoder"))
        trained += counts.lora(layers, experiment.lora.rank, lora.TEXT_ENCODER_TARGETS)
    return trained
