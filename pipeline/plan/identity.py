"""What decides a run's weights: two runs with the same identity are the same run.

A setting that is added later must not change the identity of a run that leaves it at its default: see `settings_in`.
"""

import dataclasses
from typing import TYPE_CHECKING

from cache import Spelled
from pipeline.data import variants
from pipeline.flux import pretrained
from pipeline.plan import prior
from pipeline.settings.experiment import Experiment

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

SCHEMA = 1
"""Bump when the code that encodes or trains may compute other bytes from the same recipe; all is then made again."""

UNDECISIVE = ("log_every", "checkpoint_every", "keep_checkpoints", "tracker", "strict")
"""Settings of [train] and [data] that decide no weight."""

FIRST_SETTINGS = {
    "lora": ("rank", "alpha", "dropout", "targets", "train_text_encoder"),
    "controlnet": (
        *("init_from", "num_double_layers", "num_single_layers", "condition", "conditioning_scale", "save_dtype"),
    ),
    "train": (
        *("steps", "epochs", "batch_size", "accumulate", "learning_rate", "text_encoder_lr", "lr_scheduler"),
        *("lr_warmup_steps", "lr_num_cycles", "lr_power", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("weight_decay", "max_grad_norm", "ema_decay", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
        *("caption_dropout", "guidance_scale", "posterior", "gradient_checkpointing", "mode"),
    ),
}
"""Settings that are part of a run's identity whatever they are, by table.  Any other is part of it unless it is at its
default, so that runs of a version that did not know it are found.  Never add to these."""


DATA_ELSEWHERE = ("images", "prompt", "resolution", "buckets", "max_sequence_length", "repeats", "crops", "flip")
"""Settings of [data] that are in an identity already: by name, or in what they make of the photos and captions."""


def decisive(plan: "Plan") -> dict:
    """All that decides the weights of the plan's run, by name: no path, no logging."""
    experiment, family = plan.experiment, plan.family
    data, policies = experiment.data, {"transformer": plan.precision.transformer, "trained": plan.precision.trained}
    return {
        "schema": SCHEMA,
        "seed": experiment.seed,
        "device": plan.device,
        **({} if experiment.device.deterministic else {"deterministic": False}),
        **({} if plan.device == "CPU" or experiment.device.jit_level == "O0" else {"jit_level": "O1"}),
        "entries": plan.entry_ids,
        "data": {
            "samples": _spelled_samples(plan),
            "repeats": data.repeats,
            "crops": data.crops,
            "flip": data.flip,
            **{key: value for key, value in settings_in(experiment, "data").items() if key not in DATA_ELSEWHERE},
        },
        "transformer": plan.network_digest,
        "vae": family.scaling(plan.config(family.image_encoder)),
        "scheduler": pretrained.working_config(plan.model_folder, "scheduler"),
        "precision": {name: policy.decisive for name, policy in policies.items()},
        "train": settings_in(experiment, "train"),
        **_division(plan),
        **prior.identity(plan),
    } | plan.method.identity(plan)


def _division(plan: "Plan") -> dict:
    """How a step is divided into ranks, where that decides a bit: ``ordered`` adds up as one rank does."""
    if plan.experiment.parallel.reduce == "ordered" or plan.num_ranks == 1:
        return {}
    return {"parallel": {"reduce": "fast", "ranks": plan.num_ranks}}


def settings_in(experiment: Experiment, table: str) -> dict:
    """Those settings of a table that are part of a run's identity."""
    settings, first = getattr(experiment, table), FIRST_SETTINGS.get(table, ())
    return {
        field.name: value
        for field in dataclasses.fields(settings)
        if field.name not in UNDECISIVE
        and ((value := getattr(settings, field.name)) != field.default or field.name in first)
    }


def _spelled_samples(plan: "Plan") -> Spelled:
    """A list of [digest of the photo, address of its caption, width, height]."""
    sizes_of = variants.sizes_of(plan.experiment.data)
    rows = [
        f'["{photo.item}","{caption}",{width},{height}]'
        for photo, caption in zip(plan.photos, plan.caption_items)
        for width, height in sizes_of(photo)
    ]
    return Spelled(f"[{','.join(rows)}]")
