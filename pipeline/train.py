"""Training on cached tensors: the transformer is the only model in the process."""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cache import write_atomically
from pipeline import data, loop, lora, metrics, models, resume
from pipeline.batches import Batch, Batches
from pipeline.errors import UserError
from pipeline.experiment import Train
from pipeline.recipes import Plan
from pipeline.schedules import depends_on_total

RESULT_NAME = "result.json"
LOSS_NAME = "loss.json"
NUM_EVALUATED = 64
STEPS_THAT_REPAY_COMPILING = 100
"""On CPU, for each size of batch: three to ten times what ``benchmarks.step`` gives, so that it is repaid surely."""


def train_lora(plan: Plan, photos: Sequence[data.IndexedPhoto], folder: Path) -> dict:
    """Train a LoRA on the photos' cached tensors; the weights and, last of all, result.json go to ``folder``.

    Goes on from the run's newest checkpoint, or from that of a run that differs in nothing but its length.  Returns
    what result.json says.  Raises UserError where the loss is not finite, where a frozen weight has changed, or where
    another process trains this run.
    """
    experiment = plan.experiment
    batches = Batches(plan, photos, clip_tokens(plan, photos))
    settings = settle(plan, batches)
    with loop.locked(folder):
        cells = load_cells(plan)
        before = frozen_digests(cells)
        adapted = lora.Adapted(cells, experiment.lora, plan.precision.trained, experiment.seed)
        print(describe(cells, adapted.trained), flush=True)
        _check_room(folder, adapted.trained, settings)
        if settings.gradient_checkpointing:
            models.recompute_blocks(cells[lora.TRANSFORMER])
        dropouts = adapted.add_dropout()
        training = loop.Training(
            flow_loss(**cells), adapted.trained, settings, _is_scaled(plan), adapted.groups, dropouts.reseed
        )
        identity = resume.identity_of(plan.decisive(photos) | {"mode": settings.mode})
        go_on(training, folder, identity, settings)
        to_tensors = tensors_of(plan, cells[lora.TRANSFORMER])
        result = loop.run(training, batches.training, to_tensors, settings, folder, identity)
        path = adapted.save(folder, training.result, _lineage(plan, photos, settings))
        _check_frozen_or_discard(cells, before, path)
        result |= {"steps": settings.steps, "trained_parameters": sum(parameter.size for parameter in adapted.trained)}
        result |= {"mode": settings.mode, "parameters_by_dtype": _parameters_by_dtype(cells)}
        write_atomically(folder / RESULT_NAME, json.dumps(result, indent=2) + "\n")
    print(f"LoRA: {path}", flush=True)
    return result


def load_cells(plan: Plan) -> dict:
    """The models that the LoRA goes into, by the prefix of their diffusers keys."""
    variant, policy = plan.experiment.model.variant, plan.precision
    cells = {lora.TRANSFORMER: models.load_model(plan.checkpoint, "transformer", policy.transformer.params, variant)}
    if plan.experiment.lora.train_text_encoder:
        encoder = models.load_model(plan.checkpoint, "text_encoder", policy.text_encoder.params, variant)
        cells[lora.TEXT_ENCODER] = encoder
    return cells


def _is_scaled(plan: Plan) -> bool:
    return "fp16" in (plan.precision.transformer.compute, plan.precision.trained.compute)


def clip_tokens(plan: Plan, photos: Sequence[data.IndexedPhoto]) -> Callable | None:
    """Where CLIP trains: its tokens, (length,), int32, by a caption's address, made when they are asked for."""
    if not plan.experiment.lora.train_text_encoder:
        return None
    captions = {source.item: source.key for source in plan.captions(photos)}
    tokenizer, length = models.load_tokenizer(plan.checkpoint, "tokenizer"), plan.pooled.recipe["max_length"]

    def tokens(item: str) -> np.ndarray:
        found = tokenizer(captions[item], padding="max_length", max_length=length, truncation=True)
        return np.array(found.input_ids, np.int32)

    return tokens


def settle(plan: Plan, batches: Batches) -> Train:
    """The settings with what they leave open decided: the number of steps, and the mode, which is said."""
    settings = plan.experiment.train
    if settings.epochs:
        steps = max(1, batches.order.steps_in_epochs(settings.epochs) // settings.accumulate)
        settings = dataclasses.replace(settings, steps=steps)
    if settings.mode == "auto":
        mode, reason = _choose_mode(plan.device, settings, batches.num_shapes)
        print(f"mode: {mode}, {reason}", flush=True)
        return dataclasses.replace(settings, mode=mode)
    if settings.gradient_checkpointing and settings.mode == "jit" and plan.device == "CPU":
        print('gradient_checkpointing saves no memory in compiled steps on CPU; mode = "pynative" does', flush=True)
    return settings


def _choose_mode(device: str, settings: Train, num_shapes: int) -> tuple[str, str]:
    if device != "CPU":
        return "pynative", f'as nobody has measured compiled training on {device}; mode = "jit" compiles'
    if settings.gradient_checkpointing:
        return "pynative", "as gradient checkpointing saves memory there alone"
    steps = settings.steps
    repaid = STEPS_THAT_REPAY_COMPILING * num_shapes
    if steps >= repaid:
        return "jit", f"as {steps} steps repay compiling for {num_shapes} size{'s' * (num_shapes > 1)} of batches"
    return "pynative", f"as compiling is repaid by about {repaid} steps, and there are {steps}"


def go_on(training: loop.Training, folder: Path, identity: dict, settings: Train) -> None:
    """Restore the newest checkpoint that this run can go on from, its own or another's; say so.

    Raises UserError where one of its own is of another configuration.
    """
    own = resume.newest(folder, settings.steps)
    if own is not None:
        resume.check_identity(own, identity)
        training.restore(own)
        print(f"going on from step {own.step}, {own.path}", flush=True)
        return
    shorter = resume.find_shorter(folder, identity, settings.steps)
    if shorter is None:
        return
    if depends_on_total(settings.lr_scheduler):
        print(
            f"{shorter.path} is not used: with lr_scheduler = {settings.lr_scheduler} the learning rate of each step "
            "depends on the number of steps, so this run starts anew"
        )
        return
    metrics.copy(shorter.path.parent.parent, folder, shorter.step)
    training.restore(shorter)
    print(f"going on from step {shorter.step} of a shorter run, {shorter.path}", flush=True)


def measure_lora(plan: Plan, photos: Sequence[data.IndexedPhoto], folder: Path) -> dict:
    """The loss before and after training over fixed pairs of noise and noise level on the experiment's photos.

    Returns both means, and the mean and standard error of the paired difference (before - after).
    """
    cells = load_cells(plan)
    adapted = lora.Adapted(cells, plan.experiment.lora, plan.precision.trained, plan.experiment.seed)
    batches = Batches(plan, photos, clip_tokens(plan, photos))
    to_tensors = tensors_of(plan, cells[lora.TRANSFORMER])
    item_losses = item_loss(**cells)

    def losses():
        return np.concatenate(
            [item_losses(*to_tensors(batches.evaluation(i, 8))).asnumpy() for i in range(NUM_EVALUATED // 8)]
        )

    before = losses()  # B is still zero: this is the base model
    adapted.load(folder / lora.WEIGHTS_NAME)
    after = losses()
    gain = before - after
    return {
        "pairs": NUM_EVALUATED,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "gain": float(gain.mean()),
        "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
    }


def _check_room(folder: Path, trained: list, settings: Train) -> None:
    """Raise UserError now, rather than after hours, where the disk has no room for the result and its checkpoints."""
    num_bytes, copies = sum(parameter.nbytes for parameter in trained), 4 if settings.ema_decay else 3
    needed = num_bytes * (2 + copies * (settings.keep_checkpoints + 1)) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: the result and its checkpoints need {needed:,} bytes, {free:,} are free; make room, or change "
            "[paths] runs"
        )


def flow_loss(transformer, text_encoder=None) -> Callable:
    """The mean squared error of the predicted velocity, weighted by item, float32, of the tensors of one batch."""
    item_losses = item_loss(transformer, text_encoder)

    def loss(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance):
        return (item_losses(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance) * weight).mean()

    return loss


def item_loss(transformer, text_encoder=None) -> Callable:
    """As `flow_loss`, of each item by itself and unweighted: (batch,).

    With a text encoder that trains, ``pooled`` are CLIP's tokens, (batch, length), of which it makes the pooled output.
    """
    import mindspore as ms

    def losses(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance):
        if text_encoder is not None:
            pooled = text_encoder(pooled)[1].astype(x.dtype)
        prediction = transformer(x, txt, pooled, timestep, img_ids, txt_ids, guidance)[0]
        error = prediction.astype(ms.float32) - target
        return (error * error).mean(axis=(1, 2))

    return losses


def tensors_of(plan: Plan, transformer) -> Callable[[Batch], tuple]:
    """How a batch becomes the arguments of `flow_loss`: inputs in the transformer's dtype, the target in float32.

    A checkpoint without guidance embedding (FLUX.1-schnell) gets no guidance.
    """
    import mindspore as ms

    compute = models.mindspore_dtype(plan.precision.transformer.compute)
    scale = plan.experiment.train.guidance_scale if transformer.config.guidance_embeds else None

    def to_tensors(batch: Batch) -> tuple:
        x, target, txt, pooled, timestep, img_ids, txt_ids, weight = map(ms.Tensor, vars(batch).values())
        guidance = None if scale is None else cast(ms.Tensor(np.full(timestep.shape, scale, np.float32)))
        if pooled.dtype != ms.int32:  # else CLIP's tokens
            pooled = cast(pooled)
        return cast(x), target, cast(txt), pooled, cast(timestep), img_ids, txt_ids, weight, guidance

    def cast(tensor):
        return tensor if tensor.dtype == compute else tensor.astype(compute)  # to its own dtype it takes 0.2 ms on CPU

    return to_tensors


def frozen_digests(cells: dict) -> dict[str, str]:
    """A digest of the bytes of every parameter that does not train, by its model's prefix and its name."""
    return {
        f"{prefix}.{parameter.name}": hashlib.blake2b(_bytes_of(parameter.asnumpy()), digest_size=16).hexdigest()
        for prefix, cell in cells.items()
        for parameter in cell.get_parameters()
        if not parameter.requires_grad
    }


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The array's bytes, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check_frozen_or_discard(cells: dict, before: dict[str, str], path: Path) -> None:
    """`check_frozen`, once the result is safe on disk; a result that fails it is removed."""
    try:
        check_frozen(cells, before)
    except UserError:
        path.unlink()
        raise


def check_frozen(cells: dict, before: dict[str, str]) -> None:
    """Raise UserError that names every frozen parameter whose bytes differ from ``before``."""
    after = {name.replace(".base_layer.", "."): value for name, value in frozen_digests(cells).items()}
    changed = sorted(name for name in before if after.get(name) != before[name])
    if changed:
        raise UserError(f"training changed frozen weights, so its result is refused: {', '.join(changed[:10])}")


def describe(cells: dict, trained: list) -> str:
    total = sum(parameter.size for cell in cells.values() for parameter in cell.get_parameters())
    count = sum(parameter.size for parameter in trained)
    return f"{' and '.join(cells)}: {total:,} parameters, of which {count:,} train"


def _parameters_by_dtype(cells: dict) -> dict[str, int]:
    counts = Counter()
    for cell in cells.values():
        counts.update(models.parameters_by_dtype(cell))
    return dict(counts)


def _lineage(plan: Plan, photos, settings: Train) -> dict[str, str]:
    """Where the result comes from, for its safetensors metadata.  Names no path of this machine."""
    model = plan.experiment.model
    return {
        "base_model": (model.path if isinstance(plan.experiment.model_path, str) else "") or plan.checkpoint.name,
        "base_model_revision": model.revision,
        "base_model_digest": plan.transformer_digest["weights"],
        "run_id": plan.run_id(photos),
        "recipes": json.dumps(plan.decisive(photos)["entries"]),
        "precision": json.dumps(asdict(plan.precision), sort_keys=True),
        "step": str(settings.steps),
    }
