"""What a training has gained: the loss before and after it over the same pairs of noise and noise level."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.data import conditions, indexing, variants
from pipeline.flux import checkpoints, models
from pipeline.methods import controlnet, lora
from pipeline.plan.plan import CONTROLNET, Plan
from pipeline.training.batches import Batches
from pipeline.training.loss import item_loss, tensors_of
from pipeline.training.train import clip_tokens, load_frozen

LOSS_NAME = "loss.json"
NUM_EVALUATED, SIZE = 64, 8


def measure(plan: Plan, photos: Sequence[indexing.IndexedPhoto], folder: Path) -> dict:
    """The loss without and with what the run has trained, over fixed pairs of noise and level on the plan's photos.

    Returns both means, and the mean and standard error of the paired difference (before - after); of a ControlNet also
    with_other_conditions, the mean loss where each photo has a condition that is not its own; None where all are alike.
    """
    return (_of_controlnet if plan.trains == CONTROLNET else _of_lora)(plan, photos, folder)


def _of_lora(plan: Plan, photos: Sequence[indexing.IndexedPhoto], folder: Path) -> dict:
    cells = load_frozen(plan)
    adapted = lora.Adapted(cells, plan.experiment.lora, plan.precision.trained, plan.experiment.seed)
    batches = _batches(plan, photos, cells[lora.TRANSFORMER])
    before = _losses(item_loss(**cells), batches)  # B is still zero: this is the base model
    adapted.load(folder / lora.WEIGHTS_NAME)
    return _gain(before, _losses(item_loss(**cells), batches))


def _of_controlnet(plan: Plan, photos: Sequence[indexing.IndexedPhoto], folder: Path) -> dict:
    transformer, policy = load_frozen(plan)[lora.TRANSFORMER], plan.precision.trained
    trained = models.load_model(folder / controlnet.FOLDER, checkpoints.CONTROLNET, policy.params)
    controlnet.use_precision(trained, policy)
    batches, others = _batches(plan, photos, transformer, trained), other_conditions(plan, photos)
    scale = plan.experiment.controlnet.conditioning_scale
    with_control = item_loss(transformer, controlnet=trained, conditioning_scale=scale)
    found = _gain(_losses(item_loss(transformer), batches), _losses(with_control, batches))
    mistaken = [(*inputs, control[order]) for (*inputs, control), order in zip(batches, others)]
    differ = np.concatenate([np.array(order) != np.arange(SIZE) for order in others])
    losses = _losses(with_control, mistaken)[differ]
    return found | {"with_other_conditions": float(losses.mean()) if len(losses) else None}


def other_conditions(plan: Plan, photos: Sequence[indexing.IndexedPhoto]) -> list[list[int]]:
    """For each row of each batch, the next one around whose condition differs; itself where there is none."""
    batches, settings, found = Batches(plan, photos), plan.experiment.data, []
    for index in range(NUM_EVALUATED // SIZE):
        items = [
            conditions.item(sample.photo, variants.of_size(settings, sample.size)[0])
            for sample in batches.evaluated(index, SIZE)
        ]
        around = [[(row + step) % SIZE for step in range(SIZE)] for row in range(SIZE)]
        found.append([next((each for each in turn if items[each] != items[turn[0]]), turn[0]) for turn in around])
    return found


def _batches(plan: Plan, photos: Sequence[indexing.IndexedPhoto], *networks) -> list[tuple]:
    """The arguments of `item_loss` for NUM_EVALUATED items."""
    batches, to_tensors = Batches(plan, photos, clip_tokens(plan, photos)), tensors_of(plan, *networks)
    return [to_tensors(batches.evaluation(index, SIZE)) for index in range(NUM_EVALUATED // SIZE)]


def _losses(losses: Callable, batches: list[tuple]) -> np.ndarray:
    return np.concatenate([losses(*batch).asnumpy() for batch in batches])


def _gain(before: np.ndarray, after: np.ndarray) -> dict:
    gain = before - after
    return {
        "pairs": len(gain),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "gain": float(gain.mean()),
        "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
    }
