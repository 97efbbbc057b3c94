"""What each stage of an experiment takes, from configs alone: parameters, bytes, memory.  Imports no MindSpore."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypedDict

from pipeline.data import variants
from pipeline.devices.communication import BUCKET_BYTES
from pipeline.devices.precision import BYTES
from pipeline.estimate import advice, memory
from pipeline.estimate.subject import Subject
from pipeline.plan import mode, pictures, prior
from pipeline.plan.needs import CONTROLS, IMAGES
from pipeline.settings.fields import Prior, Sampling, Train
from pipeline.settings.values import Mode

ESTIMATED = ("peak_bytes", "host_loading_bytes")
ACTIVATIONS = tuple(f"activations_{each}bytes" for each in ("", "without_checkpointing_", "with_checkpointing_"))
"""What is estimated of a stage, and of a training besides; everything else here is counted."""


class Epoch(NamedTuple):
    """How many samples an epoch has, and the sizes in pixels that they come in."""

    num_examples: int
    sizes: frozenset[variants.Size]


class Load(NamedTuple):
    """What a stage loads: checkpoint's components, and the bytes of all weights; and what its work takes besides."""

    components: tuple[str, ...]
    parameters: int
    weights_bytes: int
    working_bytes: int


class Loaded(TypedDict):
    """What loading takes.  host_loading_bytes: of the host in any case, besides the pages of the files, which the host
    can take back."""

    components: list[str]
    parameters: int
    weights_bytes: int
    files_bytes: int
    host_loading_bytes: int


class Estimate(Loaded, advice.Verdict):
    """What a stage takes.  peak_bytes: of the process on CPU, of the device elsewhere.  estimated: fields that are."""

    peak_bytes: int
    estimated: list[str]


class Parts(Loaded, memory.Steps):
    """What a training keeps, part by part.

    checkpoints_bytes: at most at one time, while a new one is written.  kept_steps_bytes: still to be
    written of the weights of steps of which pictures are drawn.
    """

    trained_parameters: int
    gradients_bytes: int
    optimizer_bytes: int
    num_shapes: int
    checkpoints_bytes: int
    result_bytes: int
    kept_steps_bytes: int


class TrainingEstimate(Parts, advice.Verdict):
    """What a training takes.  estimated: fields that are."""

    estimated: list[str]


# --- stages that encode, draw or decode ---------------------------------------------------------------------------


def stage(subject: Subject, name: str) -> Estimate:
    """What one of the stages that `loads` names takes."""
    load_of, knobs = loads(subject)[name]
    peak_bytes = _peak_bytes(subject, load_of)
    return {
        **_loaded(subject, load_of(subject)),
        "peak_bytes": peak_bytes,
        "estimated": list(ESTIMATED),
        **advice.verdict(subject, peak_bytes, knobs, lambda other: _peak_bytes(other, load_of)),
    }


def _loaded(subject: Subject, load: Load) -> Loaded:
    return {
        "components": list(load.components),
        "parameters": load.parameters,
        "weights_bytes": load.weights_bytes,
        "files_bytes": sum(subject.file_bytes(name) for name in load.components),
        "host_loading_bytes": memory.loading_bytes(load.weights_bytes, subject.target),
    }


def _peak_bytes(subject: Subject, load_of: Callable[[Subject], Load]) -> int:
    load = load_of(subject)
    return memory.peak_bytes(load.weights_bytes, load.working_bytes, subject.target)


def _load(subject: Subject, component: str, working_bytes: int) -> Load:
    number, dtype = subject.parameters(component), subject.policy(component).params_on_device
    weights_bytes = number * BYTES[dtype]
    if subject.family.keeps_fp32(component) == dtype:
        num_kept = subject.family.num_kept_fp32(component, subject.config(component))
        weights_bytes += num_kept * (BYTES["fp32"] - BYTES[dtype])
    return Load((component,), number, weights_bytes, working_bytes)


def _element_bytes(subject: Subject, component: str) -> int:
    """Of what an encoder or decoder computes; on CPU, kernels for float16 work in float32."""
    return 4 if subject.target == "CPU" else BYTES[subject.policy(component).compute]


def _captions(kind: str) -> Callable[[Subject], Load]:
    def load_of(subject: Subject) -> Load:
        family, component = subject.family, subject.family.caption_encoders[kind].component
        work = family.caption_work(kind, subject.config(component), subject.experiment.data)
        return _load(subject, component, memory.of_caption(*work, _element_bytes(subject, component)))

    return load_of


def compiles_captions(subject: Subject, kind: str, count: int) -> bool:
    """Whether so many captions are encoded by a compiled model.

    Those of sequences, T5's, are not: at its width it gains nothing by that, and MindSpore cannot keep its graph.
    """
    return kind == "pooled" and _is_compiled(subject, _captions(kind)(subject), count)


def compiles_pictures(subject: Subject, size: variants.Size, count: int) -> bool:
    """Whether so many pictures of a size in pixels are."""
    return _is_compiled(subject, _vae(subject, memory.ENCODED, size), count)


def _is_compiled(subject: Subject, load: Load, count: int) -> bool:
    more = load.weights_bytes + int(memory.COMPILED_ENCODER * load.working_bytes)
    return mode.compiles_encoder(subject.target, count, more, subject.memory_bytes)


def _images(subject: Subject) -> Load:
    return _vae(subject, memory.ENCODED, variants.squares(subject.experiment.data)[-1])


def _controls(subject: Subject) -> Load:
    """Of the photos, and of what is drawn."""
    side = subject.experiment.sample_resolution if subject.has_pictures else 0
    return _vae(subject, memory.ENCODED, max(variants.squares(subject.experiment.data)[-1], (side, side)))


def _decoding(subject: Subject) -> Load:
    side = subject.experiment.sample_resolution
    return _vae(subject, memory.DECODED, (side, side))


def _vae(subject: Subject, tensors: Mapping[str, float], size: variants.Size) -> Load:
    """All of the VAE is loaded, though the encoder or the decoder alone computes."""
    component = subject.family.image_encoder
    element_bytes = _element_bytes(subject, component)
    working = memory.of_picture(tensors, subject.config(component), *size, subject.target, element_bytes)
    return _load(subject, component, working)


def drawing_mode(
    subject: Subject, size: variants.Size, batch_size: int, num_predictions: int, asked: Mode | None = None
) -> tuple[Mode, str]:
    """The mode in which pictures of a size in pixels are drawn, so many at a time, and why.

    asked: None for what [sample] says.
    """
    shape, element = _shape(subject, frozenset([size]), batch_size), _network_element_bytes(subject)
    compiled = memory.of_compiled_prediction(shape, element)
    asked = asked or subject.experiment.sample.mode
    return mode.choose_for_drawing(subject.target, asked, num_predictions, compiled, subject.memory_bytes)


def _drawing_bytes(subject: Subject, size: variants.Size, settings: Prior | Sampling, count: int, kept: int) -> int:
    """What the transformer takes to draw so many pictures.  kept: blocks whose outputs are kept for another model."""
    batches = -(-count // settings.batch_size)
    batch_size = -(-count // max(1, batches))
    shape, element = _shape(subject, frozenset([size]), batch_size), _network_element_bytes(subject)
    chosen, _ = drawing_mode(subject, size, batch_size, batches * settings.num_inference_steps)
    if chosen == "jit" and subject.target == "CPU":
        return memory.of_compiled_prediction(shape, element)
    return memory.of_prediction(shape, kept, subject.target, element)


def _network_element_bytes(subject: Subject) -> int:
    return BYTES[subject.policy(subject.family.network).compute_on_device]


def _drawing_prior(subject: Subject) -> Load:
    """Of the network alone, at the largest resolution."""
    settings, largest = subject.experiment.prior, variants.squares(subject.experiment.data)[-1]
    working = _drawing_bytes(subject, largest, settings, settings.num_images, 0)
    return _load(subject, subject.family.network, working)


def _drawing(subject: Subject) -> Load:
    frozen, trained, settings = _frozen(subject), _trained(subject), subject.experiment.sample
    side = subject.experiment.sample_resolution
    kept = subject.method.num_blocks(subject.experiment, subject.config(subject.family.network))
    return frozen._replace(
        parameters=frozen.parameters + trained,
        weights_bytes=frozen.weights_bytes + 4 * trained,
        working_bytes=_drawing_bytes(subject, (side, side), settings, len(settings.prompts), kept),
    )


def loads(subject: Subject) -> dict[str, tuple[Callable[[Subject], Load], list[advice.Knob]]]:
    """By stage: what it loads, and which settings save memory there, in the order in which they are to be changed."""
    stages, found = subject.method.stages, {}
    for kind, encoder in subject.family.caption_encoders.items():
        found[encoder.stage] = _captions(kind), [advice.PRESET, *([advice.LENGTH] if kind == "txt" else [])]
    return found | {
        IMAGES: (_images, [advice.PRESET, advice.RESOLUTION]),
        CONTROLS: (_controls, [advice.PRESET, advice.RESOLUTION, advice.SAMPLE_RESOLUTION]),
        prior.STAGE: (_drawing_prior, [advice.PRIOR_BATCH, advice.PRESET, advice.RESOLUTION]),
        stages.draw: (_drawing, [advice.SAMPLE_BATCH, advice.PRESET, advice.SAMPLE_RESOLUTION]),
        stages.decode: (_decoding, [advice.PRESET, advice.SAMPLE_RESOLUTION]),
    }


# --- training -----------------------------------------------------------------------------------------------------


def training(subject: Subject, epoch: Epoch) -> TrainingEstimate:
    """What a training keeps: of the frozen models and of what trains, which has float32 and two moments."""
    parts = _parts(subject, epoch)

    def peak_of(other: Subject) -> int:
        is_smaller = other.experiment.data != subject.experiment.data
        sizes = frozenset(variants.squares(other.experiment.data)) if is_smaller else epoch.sizes
        return _parts(other, epoch._replace(sizes=sizes))["peak_bytes"]

    knobs = [advice.CHECKPOINTING, advice.BATCH, advice.PRESET, *advice.of_method(subject), advice.RESOLUTION]
    verdict = advice.verdict(subject, parts["peak_bytes"], knobs, peak_of)
    return {**parts, "estimated": [*ESTIMATED, *ACTIVATIONS], **verdict}


def _parts(subject: Subject, epoch: Epoch) -> Parts:
    experiment, settings = subject.experiment, subject.experiment.train
    frozen, trained = _frozen(subject), _trained(subject)
    sharing = subject.num_ranks if experiment.parallel.shard_optimizer else 1
    saved = BYTES[subject.method.saved_dtype(experiment)]
    held: memory.Held = {
        "weights_bytes": frozen.weights_bytes + 4 * trained,
        "gradients_bytes": 4 * trained * _copies_of_gradients(subject) + _exchange_bytes(subject, 4 * trained),
        "optimizer_bytes": -(-4 * trained * (_copies(settings) - 1) // sharing),
    }
    steps = settings.steps
    if settings.epochs:
        steps = max(1, settings.epochs * epoch.num_examples // (settings.batch_size * settings.accumulate))
    shape = _shape(subject, epoch.sizes, settings.batch_size)
    element_bytes = BYTES[subject.policy(subject.family.network).compute_on_device]
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
        "kept_steps_bytes": saved * trained * pictures.num_steps(experiment, steps),
    }


def _copies_of_gradients(subject: Subject) -> int:
    """What a batch gave, the sum of several, and on CPU what the optimizer steps by (`host_step`)."""
    has_sum = subject.experiment.train.accumulate > 1 or subject.experiment.has_prior
    return 1 + has_sum + (subject.target == "CPU")


def _exchange_bytes(subject: Subject, gradients_bytes: int) -> int:
    """Of what ranks exchange at a time: a bucket of each rank's, where they add up in order, else of one's own."""
    ranks = subject.num_ranks
    if ranks == 1:
        return 0
    held = 1 + (ranks if subject.experiment.parallel.reduce == "ordered" else 1)
    return held * min(gradients_bytes, BUCKET_BYTES)


def host_of_ranks(subject: Subject, training: TrainingEstimate) -> int | None:
    """What all ranks of a training take of a host, if it has all of them; None of one rank.

    On CPU: while they train, with the weights that they map from the same files once.  Elsewhere: while they load, at
    most, as nobody has measured there how much of it is shared.
    """
    if subject.num_ranks == 1:
        return None
    if subject.target != "CPU":
        return subject.num_ranks * training["host_loading_bytes"]
    shared = sum(_mapped_bytes(subject, name) for name in training["components"])
    return shared + subject.num_ranks * (training["peak_bytes"] - shared)


def _mapped_bytes(subject: Subject, component: str) -> int:
    """Of a component's weights, what stays in the pages of their files: all or, of another dtype, nothing."""
    size, kept = subject.file_bytes(component), _load(subject, component, 0).weights_bytes
    return kept if size >= kept > 0.9 * size else 0


def _frozen(subject: Subject) -> Load:
    """The models that a training, or drawing with its result, loads and does not change."""
    loaded = [_load(subject, each, 0) for each in subject.method.frozen(subject.experiment, subject.family)]
    return Load(
        tuple(component for load in loaded for component in load.components),
        sum(load.parameters for load in loaded),
        sum(load.weights_bytes for load in loaded),
        0,
    )


def _shape(subject: Subject, sizes: frozenset[variants.Size], batch_size: int) -> memory.Shape:
    """Of the largest batch, of pictures of these sizes in pixels."""
    family, experiment = subject.family, subject.experiment
    network, vae = subject.config(family.network), subject.config(family.image_encoder)
    size = family.network_size(network)
    tokens = max(family.num_tokens(vae, *each) for each in sizes) + experiment.data.max_sequence_length
    return memory.Shape(batch_size, tokens, size.width, size.heads, num_blocks(subject))


def num_blocks(subject: Subject) -> int:
    """How many blocks a step goes through: those of the network and those of the method."""
    network = subject.config(subject.family.network)
    return subject.family.network_size(network).blocks + subject.method.num_blocks(subject.experiment, network)


def checkpoints_bytes(trained_bytes: int, settings: Train) -> int:
    """The most that a run's checkpoints take at one time: those that are kept, and one that is being written.

    Where the run's length is in epochs, as many as that are taken to be written.
    """
    every = settings.checkpoint_every or settings.steps
    written = settings.keep_checkpoints + 1 if settings.epochs else -(-settings.steps // every)
    return trained_bytes * _copies(settings) * min(settings.keep_checkpoints + 1, written)


def _copies(settings: Train) -> int:
    """Of the trained parameters in a checkpoint: themselves, two moments, and their moving average."""
    return 4 if settings.ema_decay else 3


def checkpoint_bytes(subject: Subject) -> int:
    """Of one checkpoint."""
    return 4 * _trained(subject) * _copies(subject.experiment.train)


def _trained(subject: Subject) -> int:
    return subject.method.num_trained(subject.experiment, subject.family, subject.config)
