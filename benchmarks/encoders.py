"""``python -m benchmarks.encoders --torch PYTHON``: CLIP, T5 and the VAE beside PyTorch's, one item at a time.

PYTHON: as for `benchmarks.against_torch`.  Both sides encode the same item with the same weights in float32 on all
cores; ours also by a compiled model.  By default they are the small model's; ``--real`` takes CLIP-L, T5 at its width
with four layers and 512 tokens, and FLUX.1-dev's VAE with random weights.  The mean magnitude of CLIP's pooled vector
is printed: both sides' must be equal.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import sides
from benchmarks.figures import Figure

ENCODERS = "CLIP", "T5", "VAE"
SMALL = {"tokens": 24, "pixels": 64}
REAL = {"tokens": 512, "pixels": 512}
REAL_PARTS = {"text_encoder": {}, "text_encoder_2": {"num_layers": 4}, "vae": {}}
"""Components of FLUX.1-dev's size, and what of their configs is changed."""

CLIP_TOKENS = 77
NUM_WORDS = 200
"""Token ids are below this: the small model's vocabulary has more."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoders", description=__doc__.partition("\n")[0])
    sides.add_to(parser)
    parser.add_argument("--real", action="store_true", help="FLUX.1-dev's sizes")
    parser.add_argument("--pixels", type=int, help="the picture's side")
    options = parser.parse_args()
    if options.side:
        name, folder = options.side
        encoders = {"mindspore": mindspore_encoders, "torch": torch_encoders}[name](options.real, Path(folder))
        items = inputs(options.real, options.pixels)
        timed = {part: functools.partial(encoders[part], items[part.split()[0]]) for part in parts()}
        sides.serve(timed, options.rounds)
        return
    times, means = sides.measure(__spec__.name, options.torch, options.turns, sys.argv[1:], parts())
    print(f"{sides.table(times)}\npooled vector: MindSpore {means[0]:.6f}, PyTorch {means[1]:.6f}")


def figures(rounds: int, torch: str, real: bool = False) -> Iterator[Figure]:
    arguments = ["--torch", torch, "--rounds", "3", *["--real"] * real]
    times, _ = sides.measure(__name__, torch, rounds, arguments, parts())
    for part, rows in times.items():
        yield Figure.of(part, "PyTorch's", *rows.T)


def parts() -> list[str]:
    return [*ENCODERS, *(f"{encoder} compiled" for encoder in ENCODERS)]


def inputs(real: bool, pixels: int | None) -> dict[str, np.ndarray]:
    """An item for each encoder: token ids, (1, tokens), and a picture in [-1, 1], (1, 3, height, width)."""
    sizes, generator = REAL if real else SMALL, np.random.default_rng(0)
    side = pixels or sizes["pixels"]
    return {
        "CLIP": generator.integers(1, NUM_WORDS, (1, CLIP_TOKENS)),
        "T5": generator.integers(1, NUM_WORDS, (1, sizes["tokens"])),
        "VAE": generator.uniform(-1, 1, (1, 3, side, side)).astype(np.float32),
    }


def magnitude(output: np.ndarray) -> float:
    return float(np.abs(output).mean())


# --- in the children ----------------------------------------------------------------------------------------------


def mindspore_encoders(real: bool, folder: Path) -> dict[str, Callable]:
    import mindspore as ms

    from pipeline.devices import device

    device.use("CPU")
    from pipeline.flux import models, sized
    from pipeline.settings.experiment import EMBEDDED

    for component, changed in REAL_PARTS.items() if real else ():
        sized.write(folder, component, **changed)
    clip, t5, vae = (models.load_model(folder if real else EMBEDDED, each, "fp32") for each in REAL_PARTS)

    def pooled(ids):
        return clip(ids)[1]

    def sequence(ids):
        return t5(ids)[0]

    def latents(pixels):
        return vae.encode(pixels)[0]

    computed = {"CLIP": (clip, pooled), "T5": (t5, sequence), "VAE": (vae, latents)}

    def of(function: Callable) -> Callable:
        def encode(item: np.ndarray) -> float:
            output = function(ms.Tensor(item))
            return magnitude(output.asnumpy())

        return encode

    plain = {encoder: of(function) for encoder, (_, function) in computed.items()}
    compiled = {
        f"{encoder} compiled": of(device.compiled(function, list(model.get_parameters())))
        for encoder, (model, function) in computed.items()
    }
    return plain | compiled


def torch_encoders(real: bool, folder: Path) -> dict[str, Callable]:
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, T5EncoderModel

    torch.set_grad_enabled(False)
    place = folder if real else Path(__file__).parents[1] / "pipeline" / "embedded"
    classes = dict(zip(REAL_PARTS, (CLIPTextModel, T5EncoderModel, AutoencoderKL)))
    clip, t5, vae = (each.from_pretrained(place / name).eval() for name, each in classes.items())
    computed = {"CLIP": lambda x: clip(x)[1], "T5": lambda x: t5(x)[0], "VAE": lambda x: vae.encode(x)[0].parameters}

    def of(function: Callable) -> Callable:
        return lambda item: magnitude(function(torch.from_numpy(item)).numpy())

    return {part: of(computed[part.split()[0]]) for part in parts()}


if __name__ == "__main__":
    main()
