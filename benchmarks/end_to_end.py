"""``python -m benchmarks.end_to_end --torch PYTHON --script FILE``: photos to a LoRA, beside diffusers' script.

PYTHON: an interpreter with torch, torchvision, diffusers 0.35, peft and accelerate.  FILE: diffusers'
examples/dreambooth/train_dreambooth_lora_flux.py of that version.  Both sides train a LoRA of the same rank on the same
model, photos, prompt, steps and batches, in float32 on all cores; the script caches its latents (``--cache_latents``).
Timed is what a user waits for, from the first process's start to the last one's end: for one learning rate, and for
six.  Ours begins with an empty store and nothing compiled: for one, luigi's TrainLoRA; for six, one sweep.  The script
runs once for each.  "more" is one more learning rate after the first.

By default the small model of the package is trained: starts are everything.  ``--real`` takes CLIP-L, FLUX.1-dev's VAE,
T5 at its width with four layers, and photos of 512 pixels; the transformer stays small.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.processes import run
from pipeline.synthetic import shapes

RATES = ("1e-4", "2e-4", "3e-4", "5e-4", "1e-3", "2e-3")
RANK = 4
PROMPT = "a coloured shape"
EXPERIMENT = """
name = "own"
paths = {{store = "store", runs = "runs"}}
model = {{path = "{model}"}}
data = {{images = "photos", resolution = {resolution}, max_sequence_length = {length}, prompt = "{prompt}"}}
lora = {{rank = {rank}, alpha = {rank}}}
train = {{steps = {steps}, batch_size = {batch_size}, learning_rate = {rate}}}
"""
SMALL = {"photos": 40, "resolution": 64, "length": 24, "steps": 100, "batch_size": 4}
REAL = {"photos": 12, "resolution": 512, "length": 512, "steps": 100, "batch_size": 1}
NARROW = {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
REAL_PARTS = {
    "text_encoder": {},
    "text_encoder_2": {"num_layers": 4},
    "vae": {},
    "transformer": {"num_layers": 2, "num_single_layers": 2, **NARROW},
}
"""Components of FLUX.1-dev's size, and what of their configs is changed."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", required=True, metavar="PYTHON", help="the interpreter that has torch")
    parser.add_argument("--script", required=True, type=Path, metavar="FILE", help="diffusers' LoRA script")
    parser.add_argument("--real", action="store_true", help="CLIP-L, the real VAE, T5 at its width, 512 px")
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    for _ in range(options.turns):
        for name, ours, theirs in timed(options.torch, options.script, options.real):
            print(f"{name:5}{ours:8.1f} s {theirs:8.1f} s, the script   ratio {ours / theirs:.2f}", flush=True)


def figures(rounds: int, torch: str, script: Path, real: bool = False) -> Iterator[Figure]:
    turns = [list(timed(torch, script, real)) for _ in range(rounds)]
    for rows in zip(*turns):
        yield Figure.of(rows[0][0], "the script's", *zip(*[row[1:] for row in rows]))


def timed(torch: str, script: Path, real: bool) -> Iterator[tuple[str, float, float]]:
    """(what of, seconds of ours, seconds of the script)."""
    sizes = REAL if real else SMALL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", real)
        shapes.draw_shapes(folder / "photos", sizes["photos"], size=sizes["resolution"])
        (folder / "photos" / "metadata.jsonl").unlink()  # the script opens whatever is in the folder as a picture
        for label, rates in (("one", RATES[:1]), ("more", RATES[1:2]), ("six", RATES)):
            if label != "more":
                forget(folder)
            ours = seconds(train, folder, model, sizes, rates)
            yield label, ours, seconds(train_by_script, folder, model, sizes, rates, torch, script)


def write_model(folder: Path, real: bool) -> Path:
    from pipeline.flux import sized
    from pipeline.settings.experiment import EMBEDDED

    shutil.copytree(EMBEDDED, folder)
    for component, changed in REAL_PARTS.items() if real else ():
        shutil.rmtree(folder / component)
        sized.write(folder, component, **changed)
    return folder


def seconds(work: Callable, *arguments) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    for made in ("store", "runs", "cache"):
        shutil.rmtree(folder / made, ignore_errors=True)


def train(folder: Path, model: Path, sizes: dict, rates: Sequence[str]) -> None:
    path = folder / "own.toml"
    path.write_text(EXPERIMENT.format(model=model, rank=RANK, prompt=PROMPT, rate=rates[0], **sizes))
    if len(rates) > 1:
        run(folder, sys.executable, "-m", "tasks", "sweep", path, "--set", f"train.learning_rate={','.join(rates)}")
    else:
        run(folder, sys.executable, "-m", "luigi", "--module", "tasks", "TrainLoRA", "--experiment", path)


def train_by_script(folder: Path, model: Path, sizes: dict, rates: Sequence[str], torch: str, script: Path) -> None:
    given = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": folder / "photos",
        "instance_prompt": PROMPT,
        "resolution": sizes["resolution"],
        "max_sequence_length": sizes["length"],
        "rank": RANK,
        "lora_alpha": RANK,
        "train_batch_size": sizes["batch_size"],
        "max_train_steps": sizes["steps"],
        "checkpointing_steps": 10 * sizes["steps"],
        "mixed_precision": "no",
        "seed": 0,
    }
    words = [f"--{name}={value}" for name, value in given.items()]
    for rate in rates:
        out = [f"--learning_rate={rate}", f"--output_dir={folder / 'script'}", "--cache_latents"]
        run(folder, torch, script, *words, *out)
        shutil.rmtree(folder / "script")


if __name__ == "__main__":
    main()
