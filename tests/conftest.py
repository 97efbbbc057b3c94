import pytest

SLOWEST = ("test_resume", "test_tasks", "test_sample", "test_controlnet", "test_pipeline", "test_cpu_models")
"""Files that take minutes: begun first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOWEST)  # stable: all else stays in order


@pytest.fixture(scope="session")
def cpu():
    """MindSpore and mindone in this process, set up for CPU once: the import takes eight seconds."""
    from pipeline import device

    device.use("CPU")


@pytest.fixture(scope="session")
def tiny_model(cpu, tmp_path_factory):
    """A tiny FLUX.1-dev-format checkpoint, shared by all tests: copy it before changing a byte."""
    from pipeline.synthetic import tiny

    return tiny.write_tiny_model(tmp_path_factory.mktemp("checkpoint") / "tiny")


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
