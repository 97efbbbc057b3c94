"""How well the checkpoint paints what it is asked for, over unseen prompts, sampled by diffusers' FluxPipeline."""

import json
from collections.abc import Callable
from pathlib import Path

import pictures
import torch
from diffusers import FluxPipeline

from pipeline.synthetic import score, shapes

STEPS, LENGTH, GUIDANCE = 20, 24, 3.5


def report(folder: Path, count: int = 100) -> None:
    """Print the shares of right colours, backgrounds and shapes, and the largest activation of each model."""
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    largest = {name: _watched(getattr(pipe, name)) for name in ("text_encoder", "text_encoder_2", "transformer", "vae")}
    asked = pictures.drawn(shapes.UNSEEN, count)
    images = paint(pipe, [picture.caption for picture in asked])
    figures = score.shares(images, asked) | {"largest": {name: round(found()) for name, found in largest.items()}}
    print(json.dumps(figures))


@torch.no_grad()
def paint(pipe: FluxPipeline, captions: list[str], first_seed: int = 0, batch: int = 20) -> list:
    """One picture for each caption, each from a seed of its own."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        seeds = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        settings = {"height": pictures.SIZE, "width": pictures.SIZE, "num_inference_steps": STEPS}
        settings |= {"guidance_scale": GUIDANCE, "max_sequence_length": LENGTH}
        images += pipe(part, generator=seeds, **settings).images
    return images


def _watched(model: torch.nn.Module) -> Callable[[], float]:
    """A function that says the largest absolute value that any of the model's layers gave since now."""
    largest = [0.0]

    def note(_module, _inputs, output):
        tensors = output if isinstance(output, tuple) else (output,)
        largest[0] = max([largest[0], *(t.abs().max().item() for t in tensors if isinstance(t, torch.Tensor))])

    for module in model.modules():
        module.register_forward_hook(note)
    return lambda: largest[0]
