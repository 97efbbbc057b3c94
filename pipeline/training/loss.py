"""The loss of a training on cached tensors: the models' part of it; `batches` has drawn all that is random."""

import functools
from collections.abc import Callable

import numpy as np

from pipeline.flux import models
from pipeline.plan.plan import Plan
from pipeline.training.batches import Batch


def flow_loss(transformer, text_encoder=None, controlnet=None, conditioning_scale: float = 1.0) -> Callable:
    """The mean squared error of the predicted velocity, weighted by item, float32, of the tensors of one batch."""
    item_losses = item_loss(transformer, text_encoder, controlnet, conditioning_scale)

    def loss(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control=None):
        each = item_losses(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control)
        return (each * weight).mean()

    return loss


def item_loss(transformer, text_encoder=None, controlnet=None, conditioning_scale: float = 1.0) -> Callable:
    """As `flow_loss`, of each item by itself and unweighted: (batch,)."""
    import mindspore as ms

    predict = prediction(transformer, text_encoder, controlnet, conditioning_scale)

    def losses(x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control=None):
        found = predict(x, txt, pooled, timestep, img_ids, txt_ids, guidance, control)
        error = found.astype(ms.float32) - target
        return (error * error).mean(axis=(1, 2))

    return losses


def prediction(transformer, text_encoder=None, controlnet=None, conditioning_scale: float = 1.0) -> Callable:
    """The predicted velocity, (batch, tokens, channels), in the transformer's dtype.

    With a text encoder that trains, ``pooled`` are CLIP's tokens, (batch, length), of which it makes the pooled output.
    With a ControlNet, ``control`` is the condition, whose block samples go into the transformer.
    """
    for_transformer = transformer.config.guidance_embeds
    for_controlnet = controlnet is not None and controlnet.config.guidance_embeds

    def predict(x, txt, pooled, timestep, img_ids, txt_ids, guidance, control=None):
        if text_encoder is not None:
            pooled = text_encoder(pooled)[1].astype(x.dtype)
        own = guidance if for_transformer else None
        if controlnet is None:
            return transformer(x, txt, pooled, timestep, img_ids, txt_ids, own)[0]
        double, single = controlnet(
            x,
            control,
            None,
            conditioning_scale,
            txt,
            pooled,
            timestep,
            img_ids,
            txt_ids,
            guidance if for_controlnet else None,
        )
        return transformer(x, txt, pooled, timestep, img_ids, txt_ids, own, None, double, single)[0]

    return predict


def tensors_of(plan: Plan, *networks) -> Callable[[Batch], tuple]:
    """How a batch becomes the arguments of `flow_loss`: inputs in the transformer's dtype, the target in float32.

    networks: the models that predict.  Where none has a guidance embedding (FLUX.1-schnell's), there is no guidance.
    """
    import mindspore as ms

    cast = functools.partial(models.as_input, policy=plan.precision.transformer)
    scale = plan.experiment.train.guidance_scale if any(each.config.guidance_embeds for each in networks) else None

    def to_tensors(batch: Batch) -> tuple:
        arrays = [array for array in vars(batch).values() if array is not None]
        x, target, txt, pooled, timestep, img_ids, txt_ids, weight, *control = map(ms.Tensor, arrays)
        guidance = None if scale is None else cast(ms.Tensor(np.full(timestep.shape, scale, np.float32)))
        if pooled.dtype != ms.int32:  # else CLIP's tokens
            pooled = cast(pooled)
        inputs = cast(x), target, cast(txt), pooled, cast(timestep), img_ids, txt_ids, weight, guidance
        return *inputs, *map(cast, control)

    return to_tensors
