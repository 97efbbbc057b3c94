"""What FLUX.1's networks predict together: the velocity of the picture's tokens."""

from collections.abc import Callable


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
