"""A method and a family that no product file knows work as those that come with the package."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from biases import BIASES, FILE
from commands import ROOT, TASK_FAILED, command, environment, ran, stages_under, wait_until
from safetensors.numpy import load_file

from cache import find_garbage
from cache.core.needs import needs_of_runs
from pipeline.flux.family import Flux
from pipeline.methods import LORA
from pipeline.plan import families
from pipeline.plan.plan import resolve
from pipeline.training import loop


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """The environment of a command that finds `biases` as an installed package that brings a method."""
    folder = tmp_path / "installed" / "biases-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: biases\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[pipeline.methods]\nbiases = biases:BIASES\n")
    paths = ROOT, Path(__file__).parent, folder.parent
    return environment() | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def luigi(lab, variables) -> subprocess.CompletedProcess:
    return subprocess.run(command("SampleBiases", lab), env=variables, capture_output=True, text=True, timeout=300)


def test_a_method_of_another_package_is_trained_resumed_saved_sampled_and_collected(encoded, installed, tmp_path):
    """Its training is killed once, and run alone the next time, as any other is."""
    lab = encoded.copy(tmp_path / "lab").set("train", steps=40, checkpoint_every=1, mode="pynative")
    lab.set("sample", prompts=[lab.captions()[0]["text"]], num_inference_steps=2)
    run = resolve(lab.experiment, BIASES).run
    process = subprocess.Popen(command("SampleBiases", lab), env=installed, stderr=subprocess.PIPE, text=True)
    wait_until(run.list_checkpoints)
    (training,) = stages_under(process.pid)
    os.kill(training, signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == TASK_FAILED and not run.result.exists()
    assert "TrainBiases failed (killed by SIGKILL; perhaps the machine had no memory left" in said
    assert "Traceback" not in said
    second = luigi(lab, installed)
    assert second.returncode == 0, second.stderr
    assert ran(second.stderr) == ["TrainBiases", "SampleBiasesLatents", "SampleBiases"]
    assert "going on from step" in second.stdout
    saved = load_file(run.path / FILE)
    assert sum(array.size for array in saved.values()) == json.loads(run.result.read_text())["trained_parameters"]
    listing = json.loads(run.samples_list.read_text())
    pictures = [(run.path / listing["pictures"][0][name]).read_bytes() for name in ("base", "trained")]
    assert pictures[0] != pictures[1]
    store = lab.folder / "store"
    assert not any(find_garbage(store, needs_of_runs(lab.folder / "runs"), 0))
    run.needs.write_text('{"needs": []}')
    assert any(each.items for each in find_garbage(store, needs_of_runs(lab.folder / "runs"), 0))


class Twice(Flux):
    """The network sees the photo itself too, unnoised, behind what it denoises."""

    def sequence(self, x, height, width, photos):
        x, ids = super().sequence(x, height, width, photos)
        if photos is None:
            return x, ids
        return np.concatenate([x, photos], axis=1), np.concatenate([ids, ids + np.float32([1, 0, 0])])

    def prediction(self, **networks):
        predict = super().prediction(**networks)
        return lambda x, *inputs: predict(x, *inputs)[:, : x.shape[1] // 2]


@pytest.mark.parametrize("mode", ["pynative", pytest.param("jit", marks=pytest.mark.slow)])
def test_a_family_that_adds_tokens_to_the_sequence_is_trained_and_resumed(encoded, tmp_path, monkeypatch, mode):
    monkeypatch.setitem(families.FAMILIES, "FluxTwicePipeline", Twice())
    lab = encoded.copy(tmp_path / "lab", own_model=True).set("train", mode=mode, checkpoint_every=1)
    index = lab.model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxTwicePipeline"}))
    lengths, gradients = [], loop.Training.gradients

    def seen(self, batches, scale=1.0):
        lengths.append((batches[0][0].shape[1], batches[0][1].shape[1], len(batches[0][5])))
        return gradients(self, batches, scale)

    monkeypatch.setattr(loop.Training, "gradients", seen)
    lab.run("TrainLoRA")
    assert set(lengths) == {(8, 4, 8)}  # tokens, targets, positions
    run = resolve(lab.experiment, LORA).run
    before = load_file(run.path / LORA.result_files[0])
    for path in (run.result, run.checkpoint(3)):
        path.unlink()
    lab.run("TrainLoRA")
    after = load_file(run.path / LORA.result_files[0])
    assert len(lengths) == 4 and all(np.array_equal(before[name], after[name]) for name in before)
