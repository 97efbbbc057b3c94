"""``python -m pipeline runs``, and what a training says of the runs beside it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from lab import Lab
from nobody import as_nobody, open_folder

from pipeline.commands import main
from pipeline.methods import LORA
from pipeline.plan.run_folder import RunFolder
from pipeline.runs.beside import why_anew
from pipeline.runs.reading import DAMAGED, FINISHED, FOREIGN, UNFINISHED, read_run, runs_in
from pipeline.training.checkpoint import identity_of


@pytest.fixture
def lab(plainly_trained, tmp_path) -> Lab:
    return plainly_trained.copy(tmp_path / "lab")


@pytest.fixture
def run(plainly_trained, tmp_path) -> RunFolder:
    """A finished run, without the lab that it is of."""
    shutil.copytree(plainly_trained.folder / "runs", tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    return RunFolder(path)


def another(lab: Lab, capsys, **train) -> tuple[RunFolder, str]:
    """A second run, trained with other settings, and what that training said."""
    capsys.readouterr()
    lab.set("train", **train).run("TrainLoRA")
    return lab.plan.run, capsys.readouterr().out


def test_a_finished_run_is_read_with_its_settings_and_numbers(lab):
    (run,) = runs_in(lab.folder / "runs")
    assert (run.state, run.problem, run.name, run.method) == (FINISHED, "", "lab", LORA)
    assert (run.step, run.steps, run.checkpoint) == (3, 3, 3)
    assert run.loss == lab.record("TrainLoRA")["outcome"]["loss"] == run.metrics[-1]["loss"]
    assert run.settings["train"]["learning_rate"] == 1e-3 and len(run.photos) == 3


def test_runs_of_one_name_show_only_the_settings_in_which_they_differ(lab, capsys):
    other, _ = another(lab, capsys, learning_rate=5e-4)
    assert main(["runs", str(lab.path)]) == 0
    first, its_settings, second, others_settings = capsys.readouterr().out.splitlines()
    assert first.split()[0] != second.split()[0] == other.path.name
    assert (its_settings.strip(), others_settings.strip()) == ("learning_rate 0.001", "learning_rate 0.0005")
    assert "finished, 3 steps" in second and f"loss {read_run(other.path).loss:.4f}" in second
    assert max(map(len, (first, second))) <= 80


def test_json_has_all_settings_and_what_differs(lab, capsys):
    another(lab, capsys, steps=4)
    assert main(["runs", str(lab.folder / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["differs"] for row in found] == [{"steps": 3}, {"steps": 4}]
    assert found[0]["settings"]["lora"]["rank"] == 4 and found[0]["trains"] == "lora"


def test_a_run_that_has_not_ended_says_how_far_it_is(run, capsys):
    run.result.unlink()
    run.path.joinpath("pytorch_lora_weights.safetensors").unlink()
    (found,) = runs_in(run.path.parent)
    assert (found.state, found.step, found.steps, found.method) == (UNFINISHED, 3, 3, LORA)
    main(["runs", str(run.path)])
    assert "at step 3 of 3" in capsys.readouterr().out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: run.result.write_text("{"), "result.json: cannot be read"),
        (lambda run: run.result.write_text('{"version": "new"}'), "result.json: cannot be read: version 'new'"),
        (lambda run: run.result.write_text('{"version": 99}'), "result.json: format 99 of a newer version"),
        (lambda run: run.experiment.write_text("[]"), "experiment.json: has no settings"),
        (lambda run: run.experiment.unlink(), "experiment.json: missing"),
        (lambda run: run.needs.write_text('{"needs": 1}'), "needs.json: damaged"),
        (lambda run: cut(run.path / "pytorch_lora_weights.safetensors"), "weights.safetensors: missing or damaged"),
        (lambda run: (run.path / "pytorch_lora_weights.safetensors").unlink(), "safetensors: missing or damaged"),
    ],
)
def test_a_damaged_run_is_listed_with_what_is_wrong(run, capsys, damage, said):
    damage(run)
    assert read_run(run.path).state == DAMAGED
    assert main(["runs", str(run.path.parent)]) == 0
    first, *more = capsys.readouterr().out.splitlines()
    assert first.startswith(run.path.name) and first.endswith("damaged") or "damaged  " in first
    assert said in " ".join(line.strip() for line in more)


@pytest.mark.parametrize("value", ['"x"', "[]", "null", "1e999", '{"a": []}'])
@pytest.mark.parametrize("field", ["steps", "loss", "precision"])
def test_values_of_the_wrong_kind_are_no_traceback(run, capsys, field, value):
    run.result.write_text(f'{{"{field}": {value}}}')
    run.metrics.write_text(f'{{"step": {value}, "loss": {value}, "step_seconds": 0.5}}\n')
    settings = json.loads(run.experiment.read_text())
    settings["train"]["steps"] = settings["data"] = "\x1b[2J"
    run.experiment.write_text(json.dumps(settings))
    assert main(["runs", str(run.path)]) == main(["runs", "--json", str(run.path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_folders_that_are_no_runs_are_a_line_and_other_files_are_none(run, capsys):
    runs = run.path.parent
    (runs / "thesis").mkdir()
    (runs / "lab-precision.html").write_bytes(b"")
    (runs / ".hidden").mkdir()
    assert [run.state for run in runs_in(runs)] == [FINISHED, FOREIGN]
    main(["runs", str(runs)])
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == ["thesis", "not a run"]


def test_a_run_that_nobody_may_look_into_is_a_line():
    with open_folder() as folder:
        theirs = folder / "lab-0123456789ab"
        theirs.mkdir()
        with as_nobody(folder):
            theirs.chmod(0)
            (found,) = runs_in(folder)
            assert why_anew(RunFolder(folder / "lab-000000000000"), {}) == ""
    assert (found.state, found.problem) == (DAMAGED, f"{theirs.name}: cannot be read: Permission denied")


@pytest.mark.parametrize(
    "place, said", [("nowhere", "no such folder of runs, and no experiment file"), ("no.toml", "cannot read the exp")]
)
def test_a_place_without_runs_is_one_line(capsys, place, said):
    assert main(["runs", place]) == 1
    assert f"error: {place}: {said}" in capsys.readouterr().err


def test_before_the_first_training_there_is_one_line(encoded, tmp_path, capsys):
    lab = encoded.copy(tmp_path / "lab")
    assert main(["runs", str(lab.path)]) == 1
    assert "runs: no runs yet; a training makes the folder" in capsys.readouterr().err


def test_runs_are_listed_without_mindspore(run):
    script = "import sys; from pipeline.commands import main; main(sys.argv[1:]); print('mindspore' in sys.modules)"
    command = [sys.executable, "-c", script, "runs", str(run.path)]
    said = subprocess.run(command, env=environment(), capture_output=True, text=True).stdout.splitlines()
    assert said[0].startswith("lab-") and said[-1] == "False"


# --- a training beside others -------------------------------------------------------------------------------------


def test_a_training_that_starts_anew_says_what_differs_from_the_run_beside_it(lab, capsys):
    first = lab.plan.run.path.name
    _, said = another(lab, capsys, steps=4, learning_rate=5e-4)
    (line,) = [line for line in said.splitlines() if line.startswith("starts anew")]
    assert f"{first}: learning_rate 0.001 there, 0.0005 here; steps 3 there, 4 here" in line


def test_a_photo_more_is_said_as_that(lab, capsys):
    rows = lab.captions()
    (lab.pictures / "more.png").write_bytes((lab.pictures / rows[0]["file_name"]).read_bytes() + b"\0")
    lab.write_captions([*rows, rows[0] | {"file_name": "more.png"}])
    lab.settle()
    lab.encode()
    _, said = another(lab, capsys, steps=4)
    assert "3 photos there, 4 here (1 added); steps 3 there, 4 here" in said


def test_a_training_that_goes_on_or_is_the_first_says_nothing_of_it(lab, capsys):
    run, said = another(lab, capsys, steps=4)
    assert "going on from step 3 of a shorter run" in said and "anew" not in said
    lab.set("train", steps=9).path.write_text(lab.path.read_text().replace('"lab"', '"other"'))
    assert why_anew(lab.plan.run, identity_of(lab.plan.decisive)) == ""


def test_fewer_steps_than_any_checkpoint_has_is_said_as_that(lab, capsys):
    first = lab.plan.run.path.name
    _, said = another(lab, capsys, steps=2)
    assert f"{first} has no checkpoint of so few steps, its newest is of 3" in said


def test_runs_that_cannot_be_read_stop_no_training(lab, capsys):
    (lab.plan.run.needs).write_text("{")
    (lab.folder / "runs" / "lab-000000000000" / "checkpoints").mkdir(parents=True)
    run, said = another(lab, capsys, learning_rate=5e-4)
    assert read_run(run.path).state == FINISHED and "learning_rate 0.001 there, 0.0005 here" in said
