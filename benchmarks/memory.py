"""``python -m benchmarks.memory``: what gradient checkpointing saves in memory, and what it costs in time.

Each line is a process of its own, which takes a few steps; its peak is that of resident memory over what the loaded
model and the libraries took before the first step.  Compiling has memory of its own: with --compiled, lines for it too.
The gradients of all lines must be equal; how far they differ is printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.step import add_shape, prepare

STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    add_shape(parser)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # mode, "yes" or "no", where gradients go
    options = parser.parse_args()
    if options.child:
        mode, checkpointing, path = options.child
        print(json.dumps(measure(options, mode, checkpointing == "yes", path)))
        return
    modes = ("pynative", "jit") if options.compiled else ("pynative",)
    print(f"{'mode':<10}{'checkpointing':>14}{'peak MiB':>10}{'step ms':>10}   gradients differ by (relative)")
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for number, (mode, checkpointing) in enumerate((mode, answer) for mode in modes for answer in ("no", "yes")):
            path = f"{folder}/{number}.npy"
            found = run_child([mode, checkpointing, path])
            gradients = np.load(path)
            reference = gradients if reference is None else reference
            difference = np.linalg.norm(gradients - reference) / np.linalg.norm(reference)
            peak, milliseconds = found["peak_bytes"] / 2**20, found["step_seconds"] * 1e3
            print(f"{mode:<10}{checkpointing:>14}{peak:>10.0f}{milliseconds:>10.0f}   {difference:.1e}", flush=True)


def run_child(arguments: list[str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--child", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options, mode: str, checkpointing: bool, path: str) -> dict:
    from pipeline.devices import device

    device.use("CPU")
    training, arguments, _ = prepare(options, mode, checkpointing)
    before = resident_bytes("VmRSS")
    taken = []
    for _ in range(STEPS):
        began = time.perf_counter()
        training.advance([arguments]).read()
        taken.append(time.perf_counter() - began)
    peak = resident_bytes("VmHWM") - before
    _, gradients = training.gradients([arguments])
    np.save(path, np.concatenate([gradient.asnumpy().ravel() for gradient in gradients]))
    return {"peak_bytes": peak, "step_seconds": float(np.median(taken))}


def resident_bytes(field: str) -> int:
    """Of this process, from Linux: ``VmRSS`` is now, ``VmHWM`` the highest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
