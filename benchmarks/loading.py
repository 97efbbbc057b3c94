"""``python -m benchmarks.loading``: what it takes to load a transformer of FLUX.1's width, in time and memory.

A checkpoint of random weights is written in float16, in three shards.  Then processes, one after the other, read the
files, load the model as the stages do, and load it with mindone's ``from_pretrained``; with ``--torch PYTHON``, an
interpreter with torch and diffusers, also with diffusers'.  The files are in the page cache.  A process's memory is
counted over what it had before it began; pages of a mapped file count once they are read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure, in_child

ROOT = Path(__file__).parents[1]
BLOCKS, SHARDS = (2, 4), 3
TORCH = """
import sys, time, torch
from diffusers import FluxTransformer2DModel
began = time.perf_counter()
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--blocks", type=int, nargs=2, default=BLOCKS, help="double and single ones (2 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", metavar="PYTHON")
    parser.add_argument("--folder", type=Path, help="where the weights go for a while (default: TMPDIR or /tmp)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return print(json.dumps(PARTS[options.part](options.folder)))
    with tempfile.TemporaryDirectory(prefix="benchmark-loading-", dir=options.folder) as folder:
        size = write(Path(folder), options.blocks)
        found = {name: [run(name, folder) for _ in range(options.rounds)] for name in PARTS}
        print(table(size, found))
        if found["our loading"][0]["digest"] != found["from_pretrained"][0]["digest"]:
            sys.exit("the two models have different weights")
        if options.torch:
            timed = [subprocess.check_output([options.torch, "-c", TORCH, f"{folder}/transformer"]) for _ in range(3)]
            print(f"{'diffusers, PyTorch':<20}{np.median([float(each) for each in timed]):>8.2f}")


def figures(rounds: int, blocks: tuple[int, int]) -> Iterator[Figure]:
    """What loading costs by reading the files into memory, and the memory by the size of the weights."""
    with tempfile.TemporaryDirectory(prefix="benchmark-loading-") as folder:
        size = in_child(write, Path(folder), blocks)
        rows = [[run(name, folder) for name in ("our loading", "reading the files")] for _ in range(rounds)]
    yield Figure.of("time", "reading", *([each["seconds"] for each in side] for side in zip(*rows)))
    yield Figure.of("memory, all read", "the weights", (own["peak"] for own, _ in rows), [size] * rounds)


def write(folder: Path, blocks: tuple[int, int]) -> int:
    """Write the transformer, and return the bytes of its weights."""
    from pipeline.devices import device
    from pipeline.flux import sized

    device.use("CPU")
    depths = {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    return 2 * sized.write(folder, "transformer", SHARDS, "float16", **depths)


def run(part: str, folder: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.loading", "--part", part, "--folder", folder]
    return json.loads(subprocess.check_output(command, cwd=ROOT).splitlines()[-1])


def read(folder: Path) -> dict:
    """Read the files into memory that is there already, as fast as that goes."""
    buffer, paths = bytearray(1 << 24), sorted((folder / "transformer").glob("*.safetensors"))
    began = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def ours(folder: Path) -> dict:
    from pipeline.flux import models

    return _loaded(lambda: models.load_model(folder, "transformer", "fp16"))


def theirs(folder: Path) -> dict:
    import mindspore as ms
    from mindone.diffusers import FluxTransformer2DModel

    return _loaded(
        lambda: FluxTransformer2DModel.from_pretrained(str(folder / "transformer"), mindspore_dtype=ms.float16)
    )


def _loaded(load) -> dict:
    """The seconds until the model is there, and until every weight was read once; and the rise of memory by then."""
    import hashlib

    from pipeline.devices import device
    from pipeline.flux.weights import name_in_file

    device.use("CPU")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = device.peak_resident_bytes(), time.perf_counter()
    model = load()
    loaded = time.perf_counter() - began
    peak_loaded = device.peak_resident_bytes() - before
    digest = hashlib.blake2b()
    for parameter in sorted(model.get_parameters(), key=lambda parameter: name_in_file(parameter.name)):
        digest.update(memoryview(parameter.asnumpy().reshape(-1).view(np.uint8)))
    peak = device.peak_resident_bytes() - before
    return {"seconds": loaded, "peak_loaded": peak_loaded, "peak": peak, "digest": digest.hexdigest()}


PARTS = {"reading the files": read, "our loading": ours, "from_pretrained": theirs}


def table(size: int, found: dict) -> str:
    lines = [f"{size / 1e9:.2f} GB of weights      s, median   peak / weights   after all were read"]
    for name, runs in found.items():
        line = f"{name:<20}{np.median([run['seconds'] for run in runs]):>8.2f}"
        if "peak" in runs[0]:
            peaks = (np.median([run[key] for run in runs]) / size for key in ("peak_loaded", "peak"))
            line += "".join(f"{peak:>17.2f}" for peak in peaks)
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
