"""The loss of a training on cached tensors: the models' part of it; `batches` has drawn all that is random."""

import functools
from collections.abc import Callable

import numpy as np

from pipeline.devices import tensors
from pipeline.plan.plan import Plan
from pipeline.training.batches import Batch


def flow_loss(predict: Callable) -> Callable:
    """The mean squared error of the predicted velocity, weighted by item, float32, of the tensors of one batch.

    predict: as of `pipeline.plan.method.Trainee`.
    """
    item_losses = item_loss(predict)

    def loss(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control=None):
        each = item_losses(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control)
        return (each * weight).mean()

    return loss


def item_loss(predict: Callable) -> Callable:
    """As `flow_loss`, of each item by itself and unweighted: (batch,)."""
    import mindspore as ms

    def losses(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control=None):
        found = predict(x, txt, pooled, timestep, img_ids, txt_ids, guidance, control)
        error = found.astype(ms.float32) - target
        return (error * error).mean(axis=(1, 2))

    return losses


def tensors_of(plan: Plan, *networks) -> Callable[[Batch], tuple]:
    """How a batch becomes the arguments of `flow_loss`: inputs in the network's dtype, the target in float32.

    networks: the models that predict.  Where none has a guidance embedding (FLUX.1-schnell's), there is no guidance.
    """
    import mindspore as ms

    cast = functools.partial(tensors.as_input, policy=plan.policy(plan.family.network))
    scale = (
        plan.experiment.train.guidance_scale
        if plan.family.is_guided([network.config for network in networks])
        else None
    )

    def to_tensors(batch: Batch) -> tuple:
        arrays = [array for array in vars(batch).values() if array is not None]
        x, target, txt, pooled, timestep, img_ids, txt_ids, weight, *control = map(ms.Tensor, arrays)
        guidance = None if scale is None else cast(ms.Tensor(np.full(timestep.shape, scale, np.float32)))
        if pooled.dtype != ms.int32:  # else CLIP's tokens
            pooled = cast(pooled)
        inputs = cast(x), target, cast(txt), pooled, cast(timestep), img_ids, txt_ids, weight, guidance
        return *inputs, *map(cast, control)

    return to_tensors
