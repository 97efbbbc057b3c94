"""``python -m benchmarks.against_torch --torch PYTHON``: a LoRA step, compiled by MindSpore and by PyTorch diffusers.

PYTHON: an interpreter with torch, diffusers 0.35, peft 0.17 and safetensors, none of which the project itself needs.
Both sides run the same transformer, weights, batch, LoRA and optimizer (AdamW with clipping) in float32 on all cores,
each in a process of its own, in turns: whatever else slows the machine slows both.  Read the ratios, MindSpore's time
by PyTorch's, rather than the milliseconds; the range is that of single turns.

"forward" records nothing for a gradient.  The losses before training are printed: both sides' must be equal.
"""

import argparse
import sys
from collections.abc import Iterator

from benchmarks import sides
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
    sides.add_to(parser)
    add_shape(parser)
    options = parser.parse_args()
    if options.side:
        name, folder = options.side
        parts = {"mindspore": mindspore_parts, "torch": torch_parts}[name](options, f"{folder}/weights")
        sides.serve(dict(zip(PARTS, parts)), options.rounds)
        return
    times, losses = sides.measure(__spec__.name, options.torch, options.turns, sys.argv[1:], PARTS)
    print(f"{sides.table(times)}\nloss: MindSpore {losses[0]:.6f}, PyTorch {losses[1]:.6f}")


def figures(rounds: int, torch: str, **shape) -> Iterator[Figure]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    times, _ = sides.measure(__name__, torch, rounds, ["--torch", torch, *options], PARTS)
    for part, rows in times.items():
        yield Figure.of(part, "PyTorch's", *rows.T)


# --- in the children ----------------------------------------------------------------------------------------------


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
