"""What a training has gained: the loss before and after it over the same pairs of noise and noise level."""

import json
from collections.abc import Callable

import numpy as np

from cache import write_atomically
from pipeline.data import conditions, variants
from pipeline.plan.method import Trainee, untrained
from pipeline.plan.pictures import check_trained
from pipeline.plan.plan import Plan
from pipeline.process.progress import Progress, say
from pipeline.training.batches import Batches
from pipeline.training.loss import item_loss, tensors_of

NUM_EVALUATED, SIZE = 64, 8


def measure_to_file(plan: Plan) -> dict:
    """`measure`, said and written to the run's loss.json.  Raises UserError where nothing is trained yet."""
    check_trained(plan, "to measure")
    result = measure(plan)
    write_atomically(plan.run.loss, json.dumps(result, indent=2) + "\n")
    figures = "{before:.4f} before, {after:.4f} after, a gain of {gain:.4f} +- {standard_error:.4f}".format(**result)
    say(f"loss: {figures}; in {plan.run.loss}")
    return result


def measure(plan: Plan) -> dict:
    """The loss without and with what the run has trained, over fixed pairs of noise and level on the plan's photos.

    Returns both means, and the mean and standard error of the paired difference (before - after); where the method
    reads conditions also with_other_conditions, the mean loss where each photo has a condition that is not its own;
    None where all are alike.
    """
    frozen, batches = plan.load_frozen(), Batches(plan)
    base = untrained(plan, frozen)
    before = _losses("loss before", item_loss(base.predict), _tensors(plan, base, batches))
    trainee = plan.method.load(plan, frozen, plan.run.path)
    losses, several = item_loss(trainee.predict), _tensors(plan, trainee, batches)
    found = _gain(before, _losses("loss after", losses, several))
    if plan.method.reads_conditions:
        found["with_other_conditions"] = _with_others(losses, several, other_conditions(plan, batches))
    return found


def _with_others(losses: Callable, several: list[tuple], others: list[list[int]]) -> float | None:
    """The mean loss of the rows that have another's condition."""
    mistaken = [(*inputs, control[order]) for (*inputs, control), order in zip(several, others)]
    differ = np.concatenate([np.array(order) != np.arange(SIZE) for order in others])
    found = _losses("loss with other conditions", losses, mistaken)[differ]
    return float(found.mean()) if len(found) else None


def other_conditions(plan: Plan, batches: Batches) -> list[list[int]]:
    """For each row of each batch, the next one around whose condition differs; itself where there is none."""
    settings, found = plan.experiment.data, []
    for index in range(NUM_EVALUATED // SIZE):
        items = [
            conditions.item(example.photo, variants.of_size(settings, example.size)[0])
            for example in batches.evaluated(index, SIZE)
        ]
        around = [[(row + step) % SIZE for step in range(SIZE)] for row in range(SIZE)]
        found.append([next((each for each in turn if items[each] != items[turn[0]]), turn[0]) for turn in around])
    return found


def _tensors(plan: Plan, trainee: Trainee, batches: Batches) -> list[tuple]:
    """The arguments of `item_loss` for NUM_EVALUATED items."""
    to_tensors = tensors_of(plan, *trainee.networks.values())
    return [to_tensors(batches.evaluation(index, SIZE)) for index in range(NUM_EVALUATED // SIZE)]


def _losses(label: str, losses: Callable, batches: list[tuple]) -> np.ndarray:
    found = []
    with Progress(label, len(batches) * SIZE, "pair") as progress:
        for batch in batches:
            found.append(losses(*batch).asnumpy())
            progress.advance(SIZE)
    return np.concatenate(found)


def _gain(before: np.ndarray, after: np.ndarray) -> dict:
    gain = before - after
    return {
        "pairs": len(gain),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "gain": float(gain.mean()),
        "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
    }
