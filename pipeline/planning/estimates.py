"""What each model of an experiment takes, from configs alone: parameters, bytes, memory.  Imports no MindSpore."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pipeline import checkpoints, device
from pipeline.data import variants
from pipeline.errors import UserError
from pipeline.networks import controlnet, lora
from pipeline.planning import counts, memory
from pipeline.precision import Precision
from pipeline.recipes import CONTROLNET, LORA
from pipeline.settings import LORA_TARGETS, Experiment, Train

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


def encoders(configs: Path, experiment: Experiment, policies: Precision, target: str) -> dict[str, dict]:
    """Parameters, bytes of the weights and peak memory of the models that encode, by component.

    Of the VAE the encoder alone computes, but all of it is loaded.
    """
    clip, t5, vae = (checkpoints.checked_config(configs, name) for name in ("text_encoder", "text_encoder_2", "vae"))
    largest = variants.squares(experiment.data)[-1]
    captions = {
        "text_encoder": (
            clip["max_position_embeddings"],
            clip["intermediate_size"],
            clip["num_attention_heads"],
        ),
        "text_encoder_2": (experiment.data.max_sequence_length, t5["d_ff"], t5["num_heads"]),
    }
    parameters = {
        "text_encoder": counts.text_encoder(clip),
        "text_encoder_2": counts.text_encoder_2(t5),
        "vae": sum(counts.vae(vae)),
    }
    found = {}
    for name, number in parameters.items():
        policy = getattr(policies, name)
        size = BYTES["fp32" if target == "CPU" else policy.compute]
        taken = memory.of_picture(vae, *largest, size) if name == "vae" else memory.of_caption(*captions[name], size)
        found[name] = _weights(number, policy.params_on_device)
        found[name]["peak_bytes"] = memory.peak_bytes(found[name]["weights_bytes"], taken, target)
    return found


def training(
    configs: Path, experiment: Experiment, policies: Precision, target: str, trains: str, sizes: Sequence[variants.Size]
) -> dict:
    """What a training keeps: of the frozen models and of what trains, which has float32 and two moments.

    target: the device.  sizes: of the samples of an epoch, in pixels.
    checkpoints_bytes: at most at one time, while a new one is written.  memory_bytes: what the device has.
    """
    settings = experiment.train
    frozen = _frozen(configs, experiment, policies, trains)
    trained = _trained(configs, experiment, trains)
    copies = 4 if settings.ema_decay else 3
    saved = BYTES[experiment.controlnet.save_dtype] if trains == CONTROLNET else 4
    held = {
        "weights_bytes": frozen["weights_bytes"] + 4 * trained,
        "gradients_bytes": 4 * trained * (1 + (settings.accumulate > 1)),
        "optimizer_bytes": 4 * trained * (copies - 1),
    }
    steps = settings.steps
    if settings.epochs:
        steps = max(1, settings.epochs * len(sizes) // (settings.batch_size * settings.accumulate))
    shape, element_bytes = _shape(configs, experiment, trains, sizes), BYTES[policies.transformer.compute_on_device]
    known = dataclasses.replace(settings, steps=steps)
    return {
        "parameters": frozen["parameters"] + trained,
        "trained_parameters": trained,
        **held,
        **memory.of_training(held, shape, known, target, element_bytes, len(set(sizes))),
        "memory_bytes": device.memory_bytes(target, experiment.device.memory_gb),
        "num_shapes": len(set(sizes)),
        "checkpoints_bytes": checkpoints_bytes(4 * trained, settings),
        "result_bytes": saved * trained,
    }


def _frozen(configs: Path, experiment: Experiment, policies: Precision, trains: str) -> dict:
    """Parameters and bytes of the models that a training loads and does not change."""
    found = [_weights(counts.transformer(_transformer(configs)), policies.transformer.params_on_device)]
    if trains == LORA and experiment.lora.train_text_encoder:
        number = counts.text_encoder(checkpoints.checked_config(configs, "text_encoder"))
        found.append(_weights(number, policies.text_encoder.params_on_device))
    return {key: sum(each[key] for each in found) for key in found[0]}


def _shape(configs: Path, experiment: Experiment, trains: str, sizes: Sequence[variants.Size]) -> memory.Shape:
    own = _transformer(configs)
    blocks = own["num_layers"] + own["num_single_layers"]
    blocks += sum(controlnet.depths(experiment)) if trains == CONTROLNET else 0
    pixels = 2 ** len(checkpoints.checked_config(configs, "vae")["block_out_channels"])  # of a token, which is 2 x 2
    tokens = max(width * height for width, height in sizes) // pixels**2 + experiment.data.max_sequence_length
    heads = own["num_attention_heads"]
    return memory.Shape(experiment.train.batch_size, tokens, heads * own["attention_head_dim"], heads, blocks)


def _transformer(configs: Path) -> dict:
    return checkpoints.checked_config(configs, "transformer")


def checkpoints_bytes(trained_bytes: int, settings: Train) -> int:
    """The most that a run's checkpoints take at one time: those that are kept, and one that is being written.

    Where the run's length is in epochs, as many as that are taken to be written.
    """
    every = settings.checkpoint_every or settings.steps
    written = settings.keep_checkpoints + 1 if settings.epochs else -(-settings.steps // every)
    copies = 4 if settings.ema_decay else 3  # the parameters, two moments, and their moving average
    return trained_bytes * copies * min(settings.keep_checkpoints + 1, written)


def _trained(configs: Path, experiment: Experiment, trains: str) -> int:
    own = _transformer(configs)
    if trains == CONTROLNET:
        controlnet.check(experiment, own)
        return counts.controlnet(own, *controlnet.depths(experiment))
    wanted, layers = LORA_TARGETS.get(experiment.lora.targets, experiment.lora.targets), counts.transformer_layers(own)
    for target in wanted:
        if not any(counts.is_meant(name, target) for name in layers):
            raise UserError(f"lora.targets: no linear layer of the transformer is named {target}")
    trained = counts.lora(layers, experiment.lora.rank, wanted)
    if experiment.lora.train_text_encoder:
        layers = counts.text_encoder_layers(checkpoints.checked_config(configs, "text_encoder"))
        trained += counts.lora(layers, experiment.lora.rank, lora.TEXT_ENCODER_TARGETS)
    return trained


def _weights(parameters: int, dtype: str) -> dict:
    return {"parameters": parameters, "weights_bytes": parameters * BYTES[dtype]}
