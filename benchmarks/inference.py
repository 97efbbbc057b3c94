"""``python -m benchmarks.inference``: the memory that `plan` estimates for work without gradients, and what it takes.

The VAE has FLUX.1-dev's size, transformers its kinds of blocks and heads; weights are random.  Each line is a process
of its own; its peak is that of resident memory over what the model and the libraries took before.  At 1024 px the VAE
takes several minutes, and 9 GB.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.memory import resident_bytes
from pipeline.estimate import memory
from pipeline.estimate.model import CONFIGS
from pipeline.flux import pretrained

ROOT = Path(__file__).parents[1]
CASES = {f"{what} {side} px": [what, side] for side in (256, 512, 768, 1024) for what in ("encode", "decode")}
CASES |= {f"encode, compiled, {side} px": ["encode, compiled", side] for side in (256, 512)}
TRANSFORMERS = ((4, 1, 288, 2), (4, 4, 288, 2), (4, 1, 1152, 2), (4, 1, 1152, 4), (8, 2, 1152, 2), (2, 1, 3200, 1))
"""Heads of 128, pictures at a time, tokens, of which an eighth, or 32, are text; and blocks of each kind."""
VAE_BYTES = 320 << 20
"""Of the VAE's weights in float32, which are there once more where it is compiled."""
PREDICTING = ("predict", "compiled")
CASES |= {f"{what} {' '.join(map(str, each))}": [what, *each] for what in PREDICTING for each in TRANSFORMERS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a case's name
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(*CASES[options.child])))
        return
    print(f"{'MiB':<24}{'estimated':>10}{'measured':>10}{'off by':>8}")
    for name in (name for name in CASES if options.only in name):
        expected, found = (each / 2**20 for each in (estimated(*CASES[name]), run_child(name)))
        print(f"{name:<24}{expected:>10.0f}{found:>10.0f}{expected / found - 1:>8.1%}", flush=True)


def estimated(what: str, *sizes: int) -> int:
    if what in PREDICTING:
        heads, batch, tokens, blocks = sizes
        shape = memory.Shape(batch, tokens, heads * 128, heads, 2 * blocks)
        compiled = memory.of_compiled_prediction(shape, 4)
        return compiled if what == "compiled" else memory.of_prediction(shape, 0, "CPU", 4)
    tensors = memory.DECODED if what == "decode" else memory.ENCODED
    plain = memory.of_picture(tensors, pretrained.config(CONFIGS / "FLUX.1-dev", "vae"), sizes[0], sizes[0], "CPU", 4)
    return int(memory.COMPILED_ENCODER * plain) + VAE_BYTES if what == "encode, compiled" else plain


def run_child(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.inference", "--child", name]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(what: str, *sizes: int) -> int:
    """The bytes that this process, a fresh one, takes for the work."""
    from pipeline.devices import device

    device.use("CPU")
    work = prediction(*sizes, what == "compiled") if what in PREDICTING else vae_work(what, *sizes)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def vae_work(what: str, side: int):
    from mindone.diffusers import AutoencoderKL

    from pipeline.devices import device

    config = pretrained.config(CONFIGS / "FLUX.1-dev", "vae")
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae = frozen(AutoencoderKL(**{key: value for key, value in config.items() if key != "_class_name"} | blocks))
    pixels, latents = tensor(1, 3, side, side), tensor(1, 16, side // 8, side // 8)
    if what == "decode":
        return lambda: vae.decode(latents)[0].asnumpy()

    def encode(pixels):
        return vae.encode(pixels)[0]

    run = encode if what == "encode" else device.compiled(encode, vae.get_parameters())
    return lambda: run(pixels).asnumpy()


def prediction(heads: int, batch: int, tokens: int, blocks: int, is_compiled: bool):
    from mindone.diffusers import FluxTransformer2DModel

    from pipeline.devices import device

    sizes = {"num_layers": blocks, "num_single_layers": blocks, "num_attention_heads": heads, "attention_head_dim": 128}
    inputs = {"in_channels": 64, "joint_attention_dim": 256, "pooled_projection_dim": 64, "guidance_embeds": True}
    transformer = frozen(FluxTransformer2DModel(**sizes, **inputs))
    text = max(32, tokens // 8)
    arguments = [tensor(batch, tokens - text, 64), tensor(batch, text, 256), tensor(batch, 64), tensor(batch)]
    arguments += [tensor(tokens - text, 3), tensor(text, 3), tensor(batch)]

    def predict(*arguments):
        return transformer(*arguments)[0]

    run = device.compiled(predict) if is_compiled else predict
    return lambda: [run(*arguments).asnumpy() for _ in range(2)]


def frozen(cell):
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
    return cell.set_train(False)


def tensor(*shape: int):
    import mindspore as ms

    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


if __name__ == "__main__":
    main()
