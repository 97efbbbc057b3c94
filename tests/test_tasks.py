"""Luigi and the stages' processes, for real: what runs, what is left alone, and that nothing outlives Luigi."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import luigi
import pytest
from commands import TASK_FAILED, command, environment, is_alive, ran, run_luigi, stages_under, wait_until
from lab import Lab

import tasks
import tasks.__main__
from pipeline import afterwards, stage_table
from pipeline.process import children
from pipeline.process.children import GRACE_SECONDS
from tasks.process import StageFailed


@pytest.fixture
def lab(encoded, tmp_path) -> Lab:
    return encoded.copy(tmp_path / "lab")


def test_from_photos_to_a_loras_pictures_and_luigi_never_imports_mindspore(tiny_model, tmp_path):
    """The whole chain through the real command line, started in another folder than the packages'."""
    lab = Lab(tmp_path / "lab", tiny_model).set("sample", prompts=["a red circle"], num_inference_steps=2)
    script = (
        "import sys, atexit\n"
        "heavy = ('mindspore', 'mindone', 'transformers')\n"
        "loaded = lambda: sorted(m for m in sys.modules if m.split('.')[0] in heavy)\n"
        "atexit.register(lambda: print('IMPORTED', loaded()))\n"
        "from luigi.cmdline import luigi_run\n"
        f"luigi_run({command('Sample', lab)[3:]!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "IMPORTED []" in result.stdout
    encoders = ["EncodeCLIP", "EncodeT5", "EncodeImages"]
    assert ran(result.stderr) == ["CheckData", "CheckRoom", *encoders, "TrainLoRA", "SampleLatents", "Sample"]
    assert lab.done("TrainLoRA") and lab.done("Sample") and (lab.run_folder / "samples.png").is_file()
    assert not [said for said in (str(lab.path), "Execution Summary", "PyTorch") if said in result.stderr]
    assert all(len(line) < 80 for line in result.stderr.splitlines() if line.startswith("INFO: "))
    again = run_luigi("Sample", lab)
    assert again.returncode == 0 and ran(again.stderr) == []
    folder = os.path.relpath(lab.run_folder, tmp_path)
    for said in (result.stdout.replace("IMPORTED []\n", ""), again.stdout.replace(str(lab.run_folder), folder)):
        end = said[said.index("Sample(lab) is done, in ") :]
        assert end.splitlines()[0] == f"Sample(lab) is done, in {folder}/"
        for file in ("pytorch_lora_weights.safetensors", "samples.png", "samples/", "metrics.jsonl", "tensorboard/"):
            assert f"\n  {file} " in end and (lab.run_folder / file).exists()
        assert f"tensorboard --logdir {folder}\n" in end and "luigi --module tasks Report --experiment" in end


def test_sampling_asks_for_new_prompts_and_conditions_where_the_training_is_done_already(lab):
    """Luigi looks at nothing behind a task that is complete."""
    for task, names in (
        (tasks.SampleLatents, ["EncodePrompts", "TrainLoRA"]),
        (tasks.SampleControlNetLatents, ["EncodePrompts", "EncodeControls", "TrainControlNet"]),
    ):
        assert [each.task_family for each in luigi.task.flatten(task(str(lab.path)).requires())] == names


def test_another_learning_rate_runs_the_training_alone(lab):
    lab.set("train", learning_rate=5e-4)
    result = run_luigi("TrainLoRA", lab)
    assert result.returncode == 0 and ran(result.stderr) == ["TrainLoRA"]


def start_training(lab: Lab, *options: str) -> tuple[subprocess.Popen, int]:
    """Luigi in the middle of a training: some steps done, many to go.  Returns Luigi and the stage's process id."""
    lab.set("train", steps=100_000, mode="pynative")
    arguments = [*command("TrainLoRA", lab), *options]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (stage,) = wait_until(lambda: stages_under(process.pid))
    metrics = lab.run_folder / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    assert process.poll() is None, process.stderr.read().decode()
    return process, stage


@pytest.mark.parametrize(
    "number, workers",
    [
        ("SIGINT", 1),
        pytest.param("SIGTERM", 1, marks=pytest.mark.slow),
        pytest.param("SIGKILL", 1, marks=pytest.mark.slow),
        ("SIGKILL", 2),
    ],
)
def test_no_stage_outlives_luigi(lab, number, workers):
    process, stage = start_training(lab, "--workers", str(workers))
    process.send_signal(signal.Signals[number])
    output = process.communicate(timeout=GRACE_SECONDS + 60)[1].decode()
    assert process.returncode != 0
    assert workers > 1 or "Traceback" not in output
    wait_until(lambda: not is_alive(stage), 20)


@pytest.mark.slow
def test_no_encoding_outlives_a_killed_luigi(encoded, tmp_path):
    """The other way a stage ends: it catches the signal, commits, and exits by itself."""
    lab = Lab(tmp_path / "lab", encoded.model, num_pictures=90)
    lab.run("CheckData", "EncodeCLIP", "EncodeT5")
    arguments = command("EncodeImages", lab)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (stage,) = wait_until(lambda: stages_under(process.pid))
    wait_until(lambda: list(lab.folder.glob("store/entries/latents-*/writing/*/*")) or not is_alive(stage))
    process.kill()
    process.wait(10)
    wait_until(lambda: not is_alive(stage), 20)
    photos = lab.plan.photos
    assert len(lab.latents.missing(photo.digest for photo in photos)) < len(photos)


def test_a_stage_killed_while_it_encodes_keeps_what_was_committed(encoded, tmp_path):
    """SIGTERM: the batch is finished and committed, and the next run goes on from there."""
    lab = Lab(tmp_path / "lab", encoded.model, num_pictures=90)
    lab.run("CheckData")
    arguments = [sys.executable, "-m", "pipeline", "run", "EncodeImages", "--experiment", str(lab.path)]
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE)
    wait_until(lambda: process.poll() is not None or list(lab.folder.glob("store/entries/latents-*/writing/*/*")))
    process.terminate()
    output = process.communicate(timeout=GRACE_SECONDS + 60)[1].decode()
    assert process.returncode == 143 and "what was finished is kept" in output
    photos = lab.plan.photos
    missing = lab.latents.missing(photo.digest for photo in photos)
    assert 0 < len(missing) < len({photo.digest for photo in photos})
    assert lab.encode()["EncodeImages"] == len(missing)


def test_bad_photos_stop_luigi_before_anything_is_encoded(encoded, tmp_path):
    lab = Lab(tmp_path / "lab", encoded.model)
    (lab.pictures / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (lab.pictures / "00002.png").write_bytes(b"")
    result = run_luigi("TrainLoRA", lab)
    assert result.returncode == TASK_FAILED and ran(result.stderr) == ["CheckData"]
    assert result.stderr.splitlines()[-1] == (
        "TrainLoRA(lab) is not done: CheckData failed; "
        "CheckRoom, EncodeCLIP, EncodeImages, EncodeT5, TrainLoRA not run, as what they need failed"
    )
    assert "00000.png: " in result.stderr and "00002.png: empty file" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_experiment_file_is_refused_before_anything_is_scheduled(lab):
    lab.set("train", steps=0, learning_rate="fast").set("precision", preset="fp64")
    result = run_luigi("TrainLoRA", lab)
    assert result.returncode == 1 and ran(result.stderr) == []
    assert "3 problems" in result.stderr and "train.steps" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "task, settings, said",
    [
        ("Sample", {}, "sample.prompts: nothing to sample"),
        ("SampleControlNet", {"prompts": ["a"]}, "sample.conditions: a ControlNet needs an image file for each prompt"),
        (
            "SampleControlNet",
            {"prompts": ["a"], "conditions": ["gone.png"]},
            "sample.conditions: not there\n  gone.png",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_scheduled(lab, task, settings, said):
    result = run_luigi(task, lab.set("sample", **settings))
    assert result.returncode == 1 and ran(result.stderr) == []
    assert f"error: {lab.path}: {said}" in result.stderr and "Traceback" not in result.stderr


def test_a_misspelt_task_is_one_line_and_those_that_there_are(lab):
    result = run_luigi("trainlora", lab)
    first, second, *listed = result.stderr.splitlines()
    assert result.returncode == 1 and first == "error: there is no task trainlora; did you mean TrainLoRA?"
    assert second == "tasks:" and [line.split()[0] for line in listed] == list(tasks.table.TASKS)  # a line each


def test_without_a_task_they_are_listed():
    result = subprocess.run(
        [sys.executable, "-m", "luigi", "--module", "tasks"], env=environment(), capture_output=True, text=True
    )
    first, second, *listed = result.stderr.splitlines()
    assert result.returncode == 1 and (first, second) == ("error: no task is named", "tasks:")
    assert [line.split()[0] for line in listed] == list(tasks.table.TASKS)


def test_a_misspelt_option_is_one_line(lab):
    result = run_luigi("TrainLoRA", lab, "--experimnt", "my.toml")
    assert result.returncode == 2 and result.stderr.startswith(
        "error: there is no option --experimnt; did you mean --experiment? "
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_the_tasks_are_listed_in_a_line_each(arguments, capsys):
    assert tasks.__main__.main(arguments) == 0
    *listed, empty, how = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(tasks.table.TASKS)
    assert max(map(len, [*listed, how])) <= 80


def test_after_an_encoding_the_end_says_where_the_tensors_are_and_to_train(lab):
    found = afterwards.of_stage("EncodePrompts", tasks.table.survey_anew(str(lab.path)), "luigi {}".format)
    assert [about for _, about in found.files] == ["3 pooled tensors", "3 txt tensors"]
    assert all(Path(path).is_dir() for path, _ in found.files)
    assert found.todo == [("train a LoRA:", "luigi TrainLoRA")]


def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_scheduled(lab):
    lab.set("precision", preset="bf16")
    result = run_luigi("TrainLoRA", lab)
    assert result.returncode == 1 and ran(result.stderr) == []
    assert "CPU does not compute bf16" in result.stderr and "Traceback" not in result.stderr


def test_a_stage_without_output_is_a_failure(lab):
    class Forgetful(tasks.CheckData):
        task_family = "CheckData"

        def complete(self):
            return False

    with pytest.raises(StageFailed, match="output is missing"):
        Forgetful(str(lab.path)).run()
    assert not luigi.build([Forgetful(str(lab.path))], local_scheduler=True)


@pytest.mark.parametrize("text", ["seed = 77\n", "seed = [\n"])
def test_an_experiment_file_that_is_edited_while_a_stage_runs_is_said_to_have_changed(lab, text):
    class Edited(tasks.CheckData):
        task_family = "CheckData"

        def complete(self):
            return False

        def _started(self, *arguments):
            child = super()._started(*arguments)
            children.waited_for(child)
            lab.path.write_text(text + lab.path.read_text())
            return child

    said = "has changed since" if text == "seed = 77\n" else "now .* not valid TOML"
    with pytest.raises(StageFailed, match=f"CheckData is done as .* was when it began; .*{said}"):
        Edited(str(lab.path)).run()


def test_a_folder_of_the_same_name_in_the_working_directory_is_not_run(lab, tmp_path, monkeypatch, capfd):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "CheckData", "--experiment", str(lab.path)]
    lab.set("data", images="nowhere")
    assert children.run(arguments) == 1  # the right package fails in the right way, for there is no such folder
    assert "nowhere: no such folder" in capfd.readouterr().err
    lab.set("data", images="pictures")
    assert children.run(arguments) == 0
    assert "3 captioned photos, all can be used" in capfd.readouterr().out


def test_luigis_help_and_the_pipelines_tell_the_same_of_every_stage():
    of_luigi, of_pipeline = (
        subprocess.run(
            [sys.executable, "-m", *words, "--help"], env=environment(), capture_output=True, text=True
        ).stdout
        for words in (("luigi", "--module", "tasks"), ("pipeline", "run"))
    )
    told = stage_table.described(with_groups=False)
    assert told in of_luigi and told in of_pipeline and "EncodePrompts" in of_luigi
    assert all(f"  {name} " in told for name in stage_table.STAGES) and max(map(len, told.splitlines())) <= 80
