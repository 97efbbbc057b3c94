"""Settings that are allowed and yet seldom meant: a learning rate of 500, a warmup longer than the training.

Nothing here is an error: whoever means it goes on.
"""

from collections.abc import Iterator

from pipeline.settings.fields import Lora, Sampling, Settings, Train

UNUSUAL = {
    "learning_rate": (0, 1e-2, "1e-5 to 1e-3"),
    "text_encoder_lr": (0, 1e-3, "1e-6 to 1e-4"),
    "weight_decay": (0, 1, "0 to 0.1"),
    "adam_epsilon": (0, 1e-4, "1e-8"),
    "adam_beta1": (0.5, 1, "0.9"),
    "adam_beta2": (0.9, 1, "0.95 to 0.999"),
    "ema_decay": (0.9, 1, "0 (off) or 0.99 to 0.9999"),
    "max_grad_norm": (1e-2, 1e30, "0 (off) or about 1"),
    "caption_dropout": (0, 0.5, "0 to 0.2"),
    "guidance_scale": (0, 30, "1 to 4"),
}
"""Of [train]: what is asked about unless it is 0 or from the first number to the second; the third is what is usual."""

LARGE_RANK = 256
"""LoRA ranks above this approach full matrices: FLUX.1-dev's are 3072 wide."""

MANY_STEPS = 200
"""FLUX.1's pictures change little after 50 sampling steps."""


def questions(settings: Settings, method: str) -> list[str]:
    """What may not be meant, a line each that begins with the field.  method: the name of what is trained."""
    return [
        *_of_train(settings.train),
        *_of_sampling(settings.sample),
        *(_of_lora(settings.lora) if method == "lora" else ()),
    ]


def _of_train(train: Train) -> Iterator[str]:
    for name, (low, high, usual) in UNUSUAL.items():
        value = getattr(train, name)
        if value and not low <= value <= high:
            yield f"train.{name} = {value:g}: is that meant? Usual is {usual}"
    if not train.epochs and train.lr_warmup_steps >= train.steps and train.lr_scheduler != "constant":
        yield (
            f"train.lr_warmup_steps = {train.lr_warmup_steps}: is that meant? The training has {train.steps} steps, so "
            "its learning rate is never reached"
        )


def _of_sampling(sample: Sampling) -> Iterator[str]:
    if sample.prompts and sample.num_inference_steps > MANY_STEPS:
        yield f"sample.num_inference_steps = {sample.num_inference_steps}: is that meant? Usual is 20 to 50"


def _of_lora(lora: Lora) -> Iterator[str]:
    if lora.rank > LARGE_RANK:
        yield f"lora.rank = {lora.rank}: is that meant? Usual is 4 to 128"
    if lora.alpha != lora.rank:
        yield (
            f"lora.alpha = {lora.alpha:g}: with rank = {lora.rank} the LoRA is scaled by {lora.alpha / lora.rank:.4g} "
            f"(alpha / rank); alpha does not follow rank, set alpha = {lora.rank} for a scale of 1"
        )
