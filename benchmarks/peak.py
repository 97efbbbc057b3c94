"""``python -m benchmarks.peak``: the peak memory that `plan` estimates of a training, against what its process takes.

Each line is a real experiment on random weights: its stages run as processes, as Luigi starts them, and the measured
peak is the one in the record of the training.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("CheckData", "EncodeCLIP", "EncodeT5", "EncodeImages")
MODELS = {"tiny": (2, 128), "100M": (8, 512)}
"""Blocks of each kind, and width."""

CASES = {
    "tiny": ("tiny", {"resolution": 64}, {"mode": "pynative", "batch_size": 1}),
    "tiny, compiled": ("tiny", {"resolution": 128}, {"mode": "jit", "batch_size": 4}),
    "tiny, 16 of 128 px": ("tiny", {"resolution": 128}, {"mode": "pynative", "batch_size": 16}),
    "tiny, 256 px": ("tiny", {"resolution": 256}, {"mode": "pynative", "batch_size": 4}),
    "tiny, 256 px, checkpointing": (
        "tiny",
        {"resolution": 256},
        {"mode": "pynative", "batch_size": 4, "gradient_checkpointing": True},
    ),
    "100M": ("100M", {"resolution": 128}, {"mode": "pynative", "batch_size": 1}),
    "100M, 256 px": ("100M", {"resolution": 256}, {"mode": "pynative", "batch_size": 2}),
    "100M, 256 px, checkpointing": (
        "100M",
        {"resolution": 256},
        {"mode": "pynative", "batch_size": 2, "gradient_checkpointing": True},
    ),
    "100M, two sizes, accumulating": (
        "100M",
        {"resolution": [128, 256]},
        {"mode": "pynative", "batch_size": 1, "accumulate": 2, "steps": 6},
    ),
    "100M, compiled": ("100M", {"resolution": 128}, {"mode": "jit", "batch_size": 1}),
    "100M, 256 px, compiled": ("100M", {"resolution": 256}, {"mode": "jit", "batch_size": 1}),
    "tiny, ControlNet": ("tiny", {"resolution": 128}, {"mode": "pynative", "batch_size": 4}),
    "100M, ControlNet": ("100M", {"resolution": 128}, {"mode": "pynative", "batch_size": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # a model's name and its folder
    options = parser.parse_args()
    if options.make:
        return make(options.make[0], Path(options.make[1]))
    print(f"{'MiB':<32}{'estimated':>10}{'measured':>10}{'off by':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in CASES if options.only in name):
            estimated, measured = (each / 2**20 for each in run_case(name, Path(folder)))
            print(f"{name:<32}{estimated:>10.0f}{measured:>10.0f}{estimated / measured - 1:>8.1%}", flush=True)


def run_case(name: str, folder: Path) -> tuple[int, int]:
    """The estimated and the measured peak in bytes."""
    model, data, train = CASES[name]
    if not (folder / model).exists():
        run("-m", "benchmarks.peak", "--make", model, str(folder / model))
    path = folder / f"{name.replace(',', '').replace(' ', '-')}.toml"
    tables = {"model": {"path": str(folder / model)}, "paths": {"store": f"store-{model}"}}
    tables |= {"data": data | {"max_sequence_length": 32}, "train": {"steps": 4} | train}
    is_controlnet = "ControlNet" in name
    if is_controlnet:
        tables["controlnet"] = {"condition": "canny", "num_double_layers": 2}
    path.write_text("".join(f"[{table}]\n{lines(values)}" for table, values in tables.items()))
    stages = (*STAGES, *(("EncodeControls", "TrainControlNet") if is_controlnet else ("TrainLoRA",)))
    for stage in stages:
        run("-m", "pipeline", "run", stage, "--experiment", str(path))
    found = json.loads(run("-m", "pipeline", "plan", str(path), "--json"))
    record = json.loads((Path(found["training"]["run_folder"]) / "records" / f"{stages[-1]}.json").read_text())
    return found["training"]["peak_bytes"], record["peak_memory_bytes"]["process"]


def lines(values: dict) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def make(name: str, folder: Path) -> None:
    """Write a random checkpoint: the tiny one, its transformer of another size."""
    from pipeline.devices import device
    from pipeline.flux import tiny

    device.use("CPU")
    tiny.write_tiny_model(folder)
    blocks, width = MODELS[name]
    transformer = tiny.transformer(blocks, blocks, width)
    tiny.randomize(transformer, "transformer", seed=0)
    transformer.save_pretrained(str(folder / "transformer"))


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
