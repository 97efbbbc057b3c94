"""``python -m benchmarks.sampling --torch PYTHON``: drawing, compiled, beside PyTorch diffusers' FluxPipeline.

PYTHON: as for `benchmarks.against_torch`.  Both sides take the package's model, the same prompts' tensors, noise and
steps, in float32 on all cores, from noise to final latents; what encodes and decodes is left out.  The mean of the
latents is printed: both sides' must be equal.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import sides
from benchmarks.figures import Figure

PROMPTS = ("a red circle", "a blue square on green", "a yellow star", "a purple triangle on white")
EXPERIMENT = """
paths = {{store = "store", runs = "runs"}}
data = {{images = "photos", resolution = {size}}}
sample = {{prompts = {prompts}, num_inference_steps = {steps}, batch_size = {count}, mode = "jit"}}
"""
INPUTS = "inputs.npz"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.partition("\n")[0])
    sides.add_to(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="of the pictures in pixels")
    options = parser.parse_args()
    parts = part_names(options.steps)
    if options.side:
        name, folder = options.side
        draw = {"mindspore": mindspore_draws, "torch": torch_draws}[name](options, Path(folder))
        sides.serve({part: (lambda count=count: draw(count)) for part, count in parts.items()}, options.rounds)
        return
    times, means = sides.measure(__spec__.name, options.torch, options.turns, sys.argv[1:], list(parts))
    print(f"{sides.table(times)}\nmean of the latents: MindSpore {means[0]:.6f}, PyTorch {means[1]:.6f}")


def figures(rounds: int, torch: str, steps: int = 20) -> Iterator[Figure]:
    arguments = ["--torch", torch, "--steps", str(steps)]
    times, _ = sides.measure(__name__, torch, rounds, arguments, list(part_names(steps)))
    for part, rows in times.items():
        yield Figure.of(part, "FluxPipeline's", *rows.T)


def part_names(steps: int) -> dict[str, int]:
    """What is timed, and how many pictures that draws at a time."""
    return {f"{count} at a time, {steps} steps": count for count in (len(PROMPTS), 1)}


# --- in the children ----------------------------------------------------------------------------------------------


def mindspore_draws(options, folder: Path):
    import dataclasses

    from pipeline import stages
    from pipeline.devices import device
    from pipeline.flux import flow
    from pipeline.methods import LORA, kept
    from pipeline.plan import pictures
    from pipeline.plan.plan import resolve
    from pipeline.sampling import denoise
    from pipeline.settings.reading import load_experiment
    from pipeline.synthetic import shapes

    shapes.draw_shapes(folder / "photos", 1, size=options.size)
    path, prompts = folder / "own.toml", list(PROMPTS)
    path.write_text(EXPERIMENT.format(size=options.size, prompts=prompts, steps=options.steps, count=len(prompts)))
    experiment = load_experiment(str(path))
    for stage in ("EncodeCLIP", "EncodeT5"):
        stages.run(stage, experiment)
    device.use("CPU")
    plan = resolve(experiment, LORA)
    series = pictures.base(plan)
    drawing, several = series.drawing, list(series.pictures.values())
    sigmas, noise = denoise.noise_levels(plan, drawing), denoise.noise(plan, drawing, several)
    captions = [denoise.caption_item(picture.prompt) for picture in several]
    np.savez(folder / INPUTS, noise=noise, txt=plan.txt.read_many(captions), pooled=plan.pooled.read_many(captions))
    with denoise.Models(plan, False).of(series) as (model, pooled):
        compiled = {
            count: dataclasses.replace(model, predict=kept.compiled_prediction(plan, model, lambda folder: None))
            for count in part_names(options.steps).values()
        }

    def draw(count: int) -> float:
        velocity = denoise.velocity_of(plan, drawing, compiled[count], pooled, several[:count])
        return float(flow.denoised(noise[:count], sigmas, velocity).mean())

    return draw


def torch_draws(options, folder: Path):
    import torch
    from diffusers import FluxPipeline

    embedded = Path(__file__).parents[1] / "pipeline" / "embedded"
    without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline.from_pretrained(embedded, **without)
    pipe.set_progress_bar_config(disable=True)
    with np.load(folder / INPUTS) as file:
        noise, txt, pooled = (torch.from_numpy(file[name].astype(np.float32)) for name in ("noise", "txt", "pooled"))
    given = {"height": options.size, "width": options.size, "num_inference_steps": options.steps}

    def draw(count: int) -> float:
        own = {"latents": noise[:count], "prompt_embeds": txt[:count], "pooled_prompt_embeds": pooled[:count]}
        return float(pipe(**own, **given, guidance_scale=3.5, output_type="latent").images.mean())

    return draw


if __name__ == "__main__":
    main()
