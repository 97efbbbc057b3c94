"""5,000 steps: memory, and what metrics and checkpoints cost, stay what they were.  Slow."""

import json

import numpy as np
import pytest
from lab import Lab

from pipeline.flux import tiny

pytestmark = [pytest.mark.usefixtures("cpu"), pytest.mark.slow]

STEPS = 5000
MIB = 1 << 20


@pytest.fixture(scope="module")
def smallest(cpu, tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("long")
    lab = Lab(folder / "lab", tiny.write_tiny_model(folder / "model", blocks=(1, 1), width=32), num_pictures=2)
    lab.set("train", steps=STEPS, batch_size=1, checkpoint_every=50)
    lab.encode()
    return lab


@pytest.mark.parametrize("mode", ["jit", "pynative"])
def test_memory_and_the_cost_of_a_step_are_flat(smallest, tmp_path, mode):
    lab = smallest.copy(tmp_path / "lab").set("train", mode=mode).run_process("TrainLoRA")
    lines = [json.loads(line) for line in (lab.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    memory = [line["peak_memory_bytes"] for line in lines]
    seconds = np.array([line["step_seconds"] for line in lines])  # with what metrics and checkpoints take between steps
    early, late = seconds[500:1500], seconds[-1000:]
    rise = memory[-1] - memory[499]
    print(f"{mode}: {1e3 * np.median(early):.1f} and {1e3 * np.median(late):.1f} ms, {rise / MIB:.0f} MiB more")
    assert rise < 16 * MIB
    assert np.median(late) < 1.3 * np.median(early)
    assert np.mean(np.sort(late)[:950]) < 1.3 * np.mean(np.sort(early)[:950])
