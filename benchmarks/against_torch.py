"""``python -m benchmarks.against_torch --torch PYTHON``: a LoRA step, compiled by MindSpore and by PyTorch diffusers.

PYTHON: an interpreter with torch, diffusers 0.35, peft 0.17 and safetensors, none of which the project itself needs.
Both sides run the same transformer, weights, batch, LoRA and optimizer (AdamW with clipping) in float32 on all cores,
each in a process of its own, in turns: whatever else slows the machine slows both.  Read the ratios, MindSpore's time
by PyTorch's, rather than the milliseconds; the range is that of single turns.

"forward" records nothing for a gradient.  The losses before training are printed: both sides' must be equal.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure
from benchmarks.step import LEARNING_RATE, add_shape, parts_of, prepare, random_batch, random_transformer

PARTS = ("forward", "forward and backward", "optimizer", "step")
RANK = 4
SHAPE = {
    "attention_head_dim": 32,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 14, 14),
}
"""What `pipeline.flux.tiny.transformer` has whatever its size; here for PyTorch's."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_torch", description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", required=True, metavar="PYTHON", help="the interpreter that has torch")
    parser.add_argument("--turns", type=int, default=7, help="how often each side has its turn at each part")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per turn; a turn counts with their median")
    add_shape(parser)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # a child's name, and the file of the weights
    options = parser.parse_args()
    if options.side:
        name, weights = options.side
        serve({"mindspore": mindspore_parts, "torch": torch_parts}[name](options, weights), options.rounds)
        return
    print(table(*measure(options.torch, options.turns, sys.argv[1:])))


def figures(rounds: int, torch: str, **shape) -> Iterator[Figure]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    times, _ = measure(torch, rounds, ["--torch", torch, *options])
    for part, rows in times.items():
        yield Figure.of(part, "PyTorch's", *rows.T)


def measure(torch: str, turns: int, arguments: Sequence[str]) -> tuple[dict[str, np.ndarray], list[float]]:
    """Seconds of each part, ours and PyTorch's: (turns, 2); and both losses.  arguments: a child's command line."""
    with tempfile.TemporaryDirectory() as folder:
        # the first writes the weights that the second one reads
        pythons = {"mindspore": sys.executable, "torch": torch}
        sides = [Side(name, python, folder, arguments) for name, python in pythons.items()]
        times = {part: np.array([[s.seconds(part) for s in sides] for _ in range(turns)]) for part in PARTS}
        for side in sides:
            side.process.stdin.close()
            side.process.wait()
    return times, [side.loss for side in sides]


class Side:
    """A child process that times its parts when told to; ``loss`` is its first."""

    def __init__(self, name: str, python: str, folder: str, arguments: Sequence[str]):
        command = [python, "-m", "benchmarks.against_torch", *arguments, "--side", name, f"{folder}/weights"]
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loss = self._answer()

    def seconds(self, part: str) -> float:
        print(part, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> float:
        for line in self.process.stdout:
            if line.startswith("= "):
                return float(line[2:])
        sys.exit(f"{self.process.args[0]} ended with exit code {self.process.wait()}; see its message above")


def table(times: dict, losses: list[float]) -> str:
    lines = [f"{'milliseconds, medians':<24}{'MindSpore':>10}{'PyTorch':>10}{'ratio':>8}   of single turns"]
    for part, rows in times.items():
        ours, theirs = 1e3 * np.median(rows, axis=0)
        ratios = rows[:, 0] / rows[:, 1]
        spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
        lines.append(f"{part:<24}{ours:>10.1f}{theirs:>10.1f}{np.median(ratios):>8.2f}   {spread}")
    return "\n".join([*lines, f"loss: MindSpore {losses[0]:.6f}, PyTorch {losses[1]:.6f}"])


# --- in the children ----------------------------------------------------------------------------------------------


def serve(parts: tuple, rounds: int) -> None:
    """Print the loss, then the median seconds of each part whose name comes in, until there are no more."""
    parts = dict(zip(PARTS, parts))
    loss = parts["forward"]()
    for part in ("forward and backward", "optimizer", "step"):
        parts[part]()
    print("=", loss, flush=True)
    for line in sys.stdin:
        part, taken = parts[line.strip()], []
        part()  # brings caches and threads back to it
        for _ in range(rounds):
            began = time.perf_counter()
            part()
            taken.append(time.perf_counter() - began)
        print("=", np.median(taken), flush=True)


def mindspore_parts(options, weights: str) -> tuple:
    from pipeline.devices import device

    device.use("CPU")
    from safetensors.numpy import save_file

    from pipeline.flux.weights import name_in_file

    transformer = random_transformer(options)
    save_file({name_in_file(p.name): p.asnumpy() for p in transformer.get_parameters()}, weights)
    parts = parts_of(*prepare(options, "jit"))
    return tuple(parts[name] for name in PARTS)


def torch_parts(options, weights: str) -> tuple:
    import torch
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig
    from safetensors.torch import load_file

    heads, blocks = options.width // SHAPE["attention_head_dim"], options.blocks
    transformer = FluxTransformer2DModel(
        num_layers=blocks, num_single_layers=blocks, num_attention_heads=heads, guidance_embeds=True, **SHAPE
    )
    transformer.load_state_dict(load_file(weights))
    transformer.eval().requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    x, target, txt, pooled, timestep, img_ids, txt_ids, _, guidance = map(torch.from_numpy, random_batch(options))
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE)

    def loss():
        error = transformer(x, txt, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0] - target
        return (error * error).mean()

    def forward():
        with torch.no_grad():
            return loss().item()

    def differentiate():
        optimizer.zero_grad()
        loss().backward()

    def update():
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return forward, differentiate, update, lambda: (differentiate(), update())


if __name__ == "__main__":
    main()
