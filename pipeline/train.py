"""Training on cached tensors: the transformer is the only model in the process."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np

from cache import write_atomically
from pipeline import data, loop, lora, models
from pipeline.batches import Batch, Batches
from pipeline.errors import UserError
from pipeline.recipes import Plan

RESULT_NAME = "result.json"
LOSS_NAME = "loss.json"
NUM_EVALUATED = 64


def train_lora(plan: Plan, photos: Sequence[data.IndexedPhoto], folder: Path) -> dict:
    """Train a LoRA on the photos' cached tensors; the weights and, last of all, result.json go to ``folder``.

    Returns what result.json says.  Raises UserError where the loss is not finite, where a frozen weight has changed,
    or where another process trains this run.
    """
    settings, policy = plan.experiment.train, plan.precision
    with loop.locked(folder):
        transformer = models.load_model(
            plan.checkpoint, "transformer", policy.transformer.params, plan.experiment.model.variant
        )
        before = frozen_digests(transformer)
        trained = lora.inject(transformer, plan.experiment.lora, policy.trained, plan.experiment.seed)
        print(describe(transformer, trained), flush=True)
        _check_room(folder, trained)
        step = loop.make_step(flow_loss(transformer), trained, settings)
        batches, to_tensors = Batches(plan, photos), tensors_of(plan, transformer)
        result = loop.run(step, lambda number: to_tensors(batches.training(number)), settings, folder)
        path = lora.save(folder, transformer, trained, _lineage(plan, photos))
        _check_frozen_or_discard(transformer, before, path)
        result |= {"steps": settings.steps, "trained_parameters": sum(parameter.size for parameter in trained)}
        result |= {"parameters_by_dtype": models.parameters_by_dtype(transformer)}
        write_atomically(folder / RESULT_NAME, json.dumps(result, indent=2) + "\n")
    print(f"LoRA: {path}", flush=True)
    return result


def measure_lora(plan: Plan, photos: Sequence[data.IndexedPhoto], folder: Path) -> dict:
    """The loss before and after training over fixed pairs of noise and noise level on the experiment's photos.

    Returns both means, and the mean and standard error of the paired difference (before - after).
    """
    transformer = models.load_model(
        plan.checkpoint, "transformer", plan.precision.transformer.params, plan.experiment.model.variant
    )
    trained = lora.inject(transformer, plan.experiment.lora, plan.precision.trained, plan.experiment.seed)
    batches, to_tensors = Batches(plan, photos), tensors_of(plan, transformer)

    def losses():
        return np.concatenate(
            [_item_losses(transformer, to_tensors(batches.evaluation(i, 8))) for i in range(NUM_EVALUATED // 8)]
        )

    before = losses()  # B is still zero: this is the base model
    lora.load(trained, folder / lora.WEIGHTS_NAME)
    after = losses()
    gain = before - after
    return {
        "pairs": NUM_EVALUATED,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "gain": float(gain.mean()),
        "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
    }


def _check_room(folder: Path, trained: list) -> None:
    """Raise UserError now, rather than after hours, where the disk has no room for the result."""
    needed, free = 2 * sum(parameter.nbytes for parameter in trained) + (1 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: the LoRA needs {needed:,} bytes, {free:,} are free; make room, or change [paths] runs"
        )


def flow_loss(transformer) -> Callable:
    """The mean squared error of the predicted velocity, float32, as a function of the tensors of one batch."""
    import mindspore as ms

    def loss(x, target, txt, pooled, timestep, img_ids, txt_ids, guidance):
        prediction = transformer(x, txt, pooled, timestep, img_ids, txt_ids, guidance)[0]
        error = prediction.astype(ms.float32) - target
        return (error * error).mean()

    return loss


def _item_losses(transformer, tensors: tuple) -> np.ndarray:
    """`flow_loss` of each item of a batch by itself, (batch,)."""
    import mindspore as ms

    x, target, *conditions = tensors
    error = transformer(x, *conditions)[0].astype(ms.float32) - target
    return (error * error).mean(axis=(1, 2)).asnumpy()


def tensors_of(plan: Plan, transformer) -> Callable[[Batch], tuple]:
    """How a batch becomes the arguments of `flow_loss`: inputs in the transformer's dtype, the target in float32.

    A checkpoint without guidance embedding (FLUX.1-schnell) gets no guidance.
    """
    import mindspore as ms

    compute = models.mindspore_dtype(plan.precision.transformer.compute)
    scale = plan.experiment.train.guidance_scale if transformer.config.guidance_embeds else None

    def to_tensors(batch: Batch) -> tuple:
        x, target, txt, pooled, timestep, img_ids, txt_ids = (ms.Tensor(array) for array in astuple(batch))
        guidance = None if scale is None else ms.Tensor(np.full(timestep.shape, scale, np.float32)).astype(compute)
        x, txt, pooled, timestep = (tensor.astype(compute) for tensor in (x, txt, pooled, timestep))
        return x, target, txt, pooled, timestep, img_ids, txt_ids, guidance

    return to_tensors


def frozen_digests(model) -> dict[str, str]:
    """A digest of the bytes of every parameter that does not train, by name."""
    return {
        parameter.name: hashlib.blake2b(_bytes_of(parameter.asnumpy()), digest_size=16).hexdigest()
        for parameter in model.get_parameters()
        if not parameter.requires_grad
    }


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The array's bytes, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check_frozen_or_discard(model, before: dict[str, str], path: Path) -> None:
    """`check_frozen`, once the result is safe on disk; a result that fails it is removed."""
    try:
        check_frozen(model, before)
    except UserError:
        path.unlink()
        raise


def check_frozen(model, before: dict[str, str]) -> None:
    """Raise UserError that names every frozen parameter whose bytes differ from ``before``."""
    after = {name.replace(".base_layer.", "."): value for name, value in frozen_digests(model).items()}
    changed = sorted(name for name in before if after.get(name) != before[name])
    if changed:
        raise UserError(f"training changed frozen weights, so its result is refused: {', '.join(changed[:10])}")


def describe(model, trained: list) -> str:
    total = sum(parameter.size for parameter in model.get_parameters())
    count = sum(parameter.size for parameter in trained)
    return f"transformer: {total:,} parameters, of which {count:,} train"


def _lineage(plan: Plan, photos) -> dict[str, str]:
    """Where the result comes from, for its safetensors metadata.  Names no path of this machine."""
    model = plan.experiment.model
    return {
        "base_model": (model.path if isinstance(plan.experiment.model_path, str) else "") or plan.checkpoint.name,
        "base_model_revision": model.revision,
        "base_model_digest": plan.transformer_digest["weights"],
        "run_id": plan.run_id(photos),
        "recipes": json.dumps([plan.pooled.id, plan.txt.id, plan.latents.id]),
        "precision": json.dumps(asdict(plan.precision), sort_keys=True),
        "step": str(plan.experiment.train.steps),
    }
