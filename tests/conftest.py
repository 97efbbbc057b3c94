import os
import shutil
from pathlib import Path

import pytest

from pipeline.process import cores

SLOWEST = (
    "test_resume",
    "test_tasks",
    "test_denoise",
    "test_pictures",
    "test_controlnet",
    "test_pipeline",
    "test_train",
    "test_cpu_models",
)
"""Files that take minutes: begun first, so that no process is left alone with one of them at the end."""


def pytest_configure(config):
    if worker := getattr(config, "workerinput", None):
        cores.keep_to_own(int(worker["workerid"].removeprefix("gw")), worker["workercount"])


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOWEST)  # stable: all else stays in order


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Compiled graphs are kept for this run of the tests, all its processes, and not in the home of who runs them."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


@pytest.fixture(scope="session")
def cpu():
    """MindSpore and mindone in this process, set up for CPU once: the import takes eight seconds."""
    from pipeline.devices import device

    device.use("CPU")


@pytest.fixture(scope="session")
def tiny_model(cpu, tmp_path_factory):
    """A tiny FLUX.1-dev-format checkpoint, shared by all tests: copy it before changing a byte."""
    from pipeline.flux import tiny

    return tiny.write_tiny_model(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A copy of ``tiny_model`` of one's own."""
    return Path(shutil.copytree(tiny_model, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def schnell_model(cpu, tmp_path_factory):
    """As ``tiny_model``, in FLUX.1-schnell's format, with the same encoders."""
    from pipeline.flux import tiny

    return tiny.write_tiny_model(tmp_path_factory.mktemp("schnell") / "tiny", guidance_embeds=False)


@pytest.fixture(scope="session")
def encoded(cpu, tiny_model, tmp_path_factory):
    """The plain lab: three photos, encoded: copy it before changing a byte."""
    from lab import Lab

    lab = Lab(tmp_path_factory.mktemp("encoded") / "lab", tiny_model)
    assert lab.encode() == {"EncodeCLIP": 3, "EncodeT5": 3, "EncodeImages": 3}
    return lab


@pytest.fixture(scope="session")
def plainly_trained(encoded, tmp_path_factory):
    """As ``encoded``, with a LoRA: copy it before changing a byte."""
    return encoded.copy(tmp_path_factory.mktemp("trained") / "lab").run("TrainLoRA")


@pytest.fixture(scope="session")
def five_photos(cpu, tiny_model, tmp_path_factory):
    """The lab that `recipe` recomputes, encoded: copy it before changing a byte."""
    from recipe import five_photos_lab

    return five_photos_lab(tmp_path_factory.mktemp("five") / "lab", tiny_model)


@pytest.fixture(scope="session")
def paired(cpu, tiny_model, tmp_path_factory):
    """A lab of photos with conditions, nothing encoded: copy it before changing anything."""
    from pairs import paired_lab

    return paired_lab(tmp_path_factory.mktemp("paired") / "lab", tiny_model)


@pytest.fixture(scope="session")
def encoded_pairs(paired, tmp_path_factory):
    """As ``paired``, all of it encoded."""
    from pairs import encode

    lab = paired.copy(tmp_path_factory.mktemp("encoded-pairs") / "lab")
    encode(lab)
    return lab


@pytest.fixture(scope="session")
def lora_trained(tiny_model, tmp_path_factory):
    """A lab with a LoRA, trained, and two prompts, encoded; nothing is drawn yet: copy it before changing anything."""
    from drawn import trained_lab

    return trained_lab(tmp_path_factory.mktemp("lora-trained") / "lab", tiny_model)


@pytest.fixture(scope="session")
def lora_sampled(lora_trained, tmp_path_factory):
    """As ``lora_trained``, all of it drawn; ``loaded``: the models that each stage loaded."""
    from drawn import sampled_lab

    return sampled_lab(lora_trained, tmp_path_factory.mktemp("lora-sampled") / "lab")
