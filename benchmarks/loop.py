"""``python -m benchmarks.loop EXPERIMENT``: what a training step spends outside forward, backward and optimizer.

Trains the experiment, whose entries must be in the store (``make demo`` leaves examples/cat.toml so), in a temporary
folder.  "device" is the time in which the step's computations are started and waited for; "batches" that of waiting
for the store; "loop" all the rest: making tensors, metrics, TensorBoard, the bar, choosing what comes next.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.methods import LORA

FIRST = 10
"""Steps that do not count: compiling, first reads."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mode", choices=("jit", "pynative"), default="jit")
    options = parser.parse_args()
    from pipeline.devices import device
    from pipeline.plan.plan import resolve
    from pipeline.settings.reading import load_experiment

    device.use("CPU")
    experiment = load_experiment(options.experiment)
    settings = dataclasses.replace(experiment.train, steps=options.steps, mode=options.mode, epochs=0)
    print(table(measure(resolve(dataclasses.replace(experiment, train=settings), LORA))))


def measure(plan) -> np.ndarray:
    """Seconds of every step but the first ones: (steps, 3), of the device, of waiting for batches, and whole."""
    from pipeline.process import ahead
    from pipeline.training import loop, metrics, train

    spent = {"device": 0.0, "batches": 0.0}
    rows = []

    @contextlib.contextmanager
    def counted(name):
        began = time.perf_counter()
        yield
        spent[name] += time.perf_counter() - began

    def timed(owner, method, name):
        original = getattr(owner, method)

        def call(*args):
            with counted(name):
                return original(*args)

        setattr(owner, method, call)

    timed(loop.Training, "advance", "device")
    timed(metrics.Outcome, "read", "device")
    timed(ahead.Ahead, "next", "batches")
    due = loop._is_checkpoint_due

    def at_the_end_of_a_step(step, settings):
        rows.append((spent["device"], spent["batches"], time.perf_counter()))
        return due(step, settings)

    loop._is_checkpoint_due = at_the_end_of_a_step
    with tempfile.TemporaryDirectory() as folder:
        runs = dataclasses.replace(plan.experiment.paths, runs=folder)
        train.train(dataclasses.replace(plan, experiment=dataclasses.replace(plan.experiment, paths=runs)))
    return np.diff(np.array(rows), axis=0)[FIRST:]


def table(rows: np.ndarray) -> str:
    device, batches, whole = rows.sum(axis=0)
    lines = [f"{len(rows)} steps of {1e3 * np.median(rows[:, 2]):.1f} ms (median); shares of all of their time:"]
    shares = {"device": device, "batches": batches, "loop": whole - device - batches}
    return "\n".join([*lines, *(f"  {name:<8}{100 * value / whole:7.2f} %" for name, value in shares.items())])


if __name__ == "__main__":
    main()
