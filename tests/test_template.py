"""The process that stages' processes are forks of: what they are given, and that none outlives another."""

import os
import signal
import subprocess

import pytest
from commands import is_alive, wait_until

from pipeline.process import children
from pipeline.process.template import Template


@pytest.fixture(scope="module")
def template():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads, which can be forked
        found = Template()
    yield found
    found.end()


def test_a_fork_computes_and_ends_with_its_own_code(template, encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab").set("train", steps=1, mode="pynative")
    for arguments, code in ((["run", "TrainLoRA", "--experiment", str(lab.path)], 0), (["run", "nothing"], 2)):
        fork = template.start(arguments)
        assert children.waited_for(fork) == code
        assert not is_alive(fork.pid)
    assert (lab.run_folder / "pytorch_lora_weights.safetensors").is_file()


def test_a_fork_has_the_environment_and_the_files_of_who_starts_it(template, encoded, tmp_path, monkeypatch, capfd):
    """The file is whatever the stage is to take for photos; what is in it is refused, so it was read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "no survey").write_text("of nothing")
    with open(tmp_path / "no survey") as file:
        place = f"/dev/fd/{file.fileno()}"
        arguments = ["run", "EncodeT5", "--experiment", str(encoded.path), "--survey", place]
        assert children.waited_for(template.start(arguments, [file.fileno()])) == 1
    assert f"error: {place}" in capfd.readouterr().err
    lab = encoded.copy(tmp_path / "lab").set("train", steps=1, mode="jit")
    assert children.waited_for(template.start(["run", "TrainLoRA", "--experiment", str(lab.path)])) == 0
    assert len(os.listdir(tmp_path / "caches" / "mindspore-flux-finetune" / "graphs")) == 1


def test_mindspore_has_no_threads_before_a_stage_computes(template):
    template.start(["run", "nothing"]).wait()
    assert len(os.listdir(f"/proc/{template._process.pid}/task")) == 1


@pytest.mark.parametrize("victim", ["stage", "template"])
def test_whichever_is_killed_the_stage_is_gone_and_its_code_says_so(encoded, tmp_path, victim):
    template = Template()
    lab = encoded.copy(tmp_path / "lab").set("train", steps=100_000, mode="pynative")
    stage = template.start(["run", "TrainLoRA", "--experiment", str(lab.path)])
    wait_until(lab.plan.run.metrics.exists)
    with pytest.raises(subprocess.TimeoutExpired):
        stage.wait(0)
    assert template.start(["run", "nothing"]) is None  # it has one stage at a time, whether or not somebody waits
    os.kill(stage.pid if victim == "stage" else template._process.pid, signal.SIGKILL)
    assert stage.wait(30) == -signal.SIGKILL
    wait_until(lambda: not is_alive(stage.pid), 30)
    template.end()
    assert (template.start([]) is None) if victim == "template" else True


def test_code_that_has_changed_since_is_not_forked(tmp_path, monkeypatch):
    """To compile, MindSpore reads a function's lines in its file again."""
    (tmp_path / "mindone_extras.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import mindone_extras")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    template = Template()
    assert template.start(["run", "nothing"]).wait() == 2
    (tmp_path / "mindone_extras.py").write_text("changed = True")
    assert template.start(["run", "nothing"]) is None
    assert template.start(["run", "nothing"]) is None


def test_where_nothing_can_be_imported_there_is_no_fork(tmp_path, monkeypatch):
    broken = tmp_path / "mindspore"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Template().start(["run", "EncodeCLIP"]) is None
