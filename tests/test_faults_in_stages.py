"""As test_faults.py, of a stage that encodes and of a training: they are run again and again in one process, which
has loaded MindSpore."""

import pytest
from faults import Jobs, each_fault, every, reason_why_not
from kills import Killed, kill_at
from lab import Lab
from test_faults import assert_ends_clearly, assert_nothing_half_written, report

from pipeline.plan.run_folder import RunFolder
from pipeline.training import checkpoint

SETUP = """
from pipeline.commands import main
from pipeline.devices import device
device.use("CPU")

def run(stage, folder):
    return main(["run", stage, "--experiment", f"{folder}/lab.toml"])
"""
pytestmark = [pytest.mark.usefixtures("cpu"), pytest.mark.slow]


@pytest.fixture(scope="module")
def jobs():
    if reason := reason_why_not():
        pytest.skip(reason)
    with Jobs(SETUP) as jobs:
        yield jobs


def there(folder, lab: Lab) -> Lab:
    """The lab as it is in another folder."""
    other = object.__new__(Lab)
    other.folder, other.model, other.settings = folder, lab.model, lab.settings
    return other


def test_a_stage_that_encodes_captions(jobs, encoded, tmp_path):
    lab = encoded.copy(tmp_path / "start")
    before = lab.plan.pooled
    known = {item: before.read(item) for item in lab.plan.captions.items}
    lab.write_captions([row | {"text": f"a new one, {row['text']}"} for row in lab.captions()[:2]])
    lab.settle()
    lab.run("CheckData")
    right: dict = {}

    def check(root, done):
        assert_ends_clearly(done, root, most_lines=5)
        plan = there(root, lab).plan
        pooled = plan.pooled
        assert pooled.missing(known) == [] and all((pooled.read(item) == known[item]).all() for item in known)
        again = jobs.run(f"run('EncodeCLIP', {str(root)!r})", root) if done.status else done
        assert again.status == 0, again.err
        assert pooled.missing(plan.captions.items) == []
        found = {item: pooled.read(item).tobytes() for item in plan.captions.items}
        assert right.setdefault("bytes", found) == found
        assert (pooled.path / "records/EncodeCLIP.json").exists()
        assert_nothing_half_written(root / "store")

    report(each_fault(jobs, lambda root: f"run('EncodeCLIP', {str(root)!r})", lab.folder, tmp_path, check, every))


def test_a_training(jobs, encoded, tmp_path, monkeypatch):
    lab = encoded.copy(tmp_path / "start").set("train", steps=2, batch_size=1, checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, [2])
        lab.run("TrainLoRA")
    run_id = lab.run_folder.relative_to(lab.folder)
    assert checkpoint.newest(RunFolder(lab.run_folder), 2).step == 1
    right: dict = {}

    def check(root, done):
        assert_ends_clearly(done, root, most_lines=5)
        run = RunFolder(root / run_id)
        newest = checkpoint.newest(run, 2)
        assert newest is not None and not list(run.checkpoints.glob("*.damaged"))
        again = jobs.run(f"run('TrainLoRA', {str(root)!r})", root) if done.status else done
        assert again.status == 0, again.err
        assert there(root, lab).plan.is_trained  # facts that were lost cost time alone
        found = (run.path / "pytorch_lora_weights.safetensors").read_bytes()
        assert right.setdefault("bytes", found) == found
        assert checkpoint.newest(run, 2).step == 2
        assert not list(root.rglob("*.tmp"))

    report(each_fault(jobs, lambda root: f"run('TrainLoRA', {str(root)!r})", lab.folder, tmp_path, check, every))
