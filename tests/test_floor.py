"""What an older version left is found by this one: entries, runs, pictures; and what it had begun goes on.

floor/lab.tar.gz was written by the version of 2026-11-28; floor/write.py says how.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from floor_lab import unpack, write_model
from safetensors.numpy import load_file

from cache import find_garbage, needs_text
from cache.core.needs import needs_of_runs
from pipeline import stage_table, stages
from pipeline.devices import device
from pipeline.methods import CONTROLNET, LORA
from pipeline.plan import needs
from pipeline.plan.plan import resolve
from pipeline.plan.survey import Survey
from pipeline.settings.experiment import Experiment

WEIGHTS = {LORA: "pytorch_lora_weights.safetensors", CONTROLNET: "controlnet/diffusion_pytorch_model.safetensors"}
TRAIN = {LORA: "TrainLoRA", CONTROLNET: "TrainControlNet"}
NEVER_DONE = {"MeasureLoss", "MeasureControlNet", "Report", "ReportControlNet"}


@pytest.fixture(scope="module")
def labs(cpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("floor")
    labs = unpack(folder, write_model(tmp_path_factory.mktemp("floor-model") / "model"))
    for lab in labs.values():
        lab.settle()
    return labs


def contents(lab) -> dict:
    files = [path for part in ("store", "runs") for path in (lab.folder / part).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if "facts.sqlite" not in path.name and path.name != ".lock"}


def only_run(lab, trains):
    plan = resolve(lab.experiment, trains)
    return plan.run.path


def test_finished_stages_of_an_older_version_are_found_finished(labs):
    lab = labs["finished"]
    before = contents(lab)
    lab.run("GetModel", "CheckData", "CheckControls")
    survey = Survey(lab.experiment)
    assert {name for name in stage_table.STAGES if not stages.is_done(name, survey)} == NEVER_DONE
    lab.run(*(name for name in stage_table.STAGES if name not in NEVER_DONE))
    assert contents(lab) == before


@pytest.mark.parametrize("trains", [LORA, CONTROLNET], ids=str)
def test_what_a_run_of_an_older_version_needs_is_what_it_said(labs, trains):
    lab = labs["finished"].run("CheckData", "CheckControls")
    plan = resolve(lab.experiment, trains)
    folder = only_run(lab, trains)
    assert folder.is_dir()
    found = needs.needed(plan)
    said = {row["id"]: row for row in json.loads((folder / "needs.json").read_text())["needs"]}
    assert {row["id"]: row for row in json.loads(needs_text(found))["needs"]} == said


def test_nothing_that_the_runs_of_an_older_version_need_is_garbage(labs):
    lab = labs["finished"]
    assert not any(find_garbage(lab.folder / "store", needs_of_runs(lab.folder / "runs"), 0))


@pytest.mark.parametrize("trains", [LORA, CONTROLNET], ids=str)
def test_an_interrupted_run_of_an_older_version_goes_on(labs, trains, capsys):
    lab, finished = labs["interrupted"], labs["finished"]
    if not (lab.folder / "store").exists():
        for part in ("store", "pictures", "lab.toml"):
            copy = shutil.copytree if (finished.folder / part).is_dir() else shutil.copy2
            copy(finished.folder / part, lab.folder / part)
    lab.run("CheckData", "CheckControls")
    folder = only_run(lab, trains)
    assert (folder / "checkpoints/step-000002.safetensors").is_file()
    lab.run(TRAIN[trains])
    said = capsys.readouterr().out
    assert "going on from step 2" in said and "the steps up to 2 were computed by numerics 1" in said
    result = json.loads((folder / "result.json").read_text())
    assert result["numerics"] == [[0, 1], [2, device.numerics()]]
    found, wanted = (load_file(only_run(each, trains) / WEIGHTS[trains]) for each in (lab, finished))
    assert found.keys() == wanted.keys()
    for name in wanted:  # the last bits are the kernels'
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)


def with_another_setting(table: str, default: int):
    """The class of all settings, with one in a table that no version has yet."""
    own = {field.name: field for field in dataclasses.fields(Experiment)}[table].type
    extended = dataclasses.make_dataclass(
        own.__name__, [("twist", int, dataclasses.field(default=default))], bases=(own,), frozen=True
    )
    fields = [(table, extended, dataclasses.field(default=extended()))]
    return dataclasses.make_dataclass("Experiment", fields, bases=(Experiment,), frozen=True)


@pytest.mark.parametrize(
    "trains, table", [(LORA, "train"), (LORA, "lora"), (LORA, "data"), (CONTROLNET, "controlnet")], ids=str
)
def test_a_new_setting_at_its_default_changes_no_identity(labs, trains, table):
    lab = labs["finished"].run("CheckData", "CheckControls")
    plan = resolve(lab.experiment, trains)
    values = {field.name: getattr(plan.experiment, field.name) for field in dataclasses.fields(plan.experiment)}
    cls, own = with_another_setting(table, 7), vars(getattr(plan.experiment, table))
    kind = {field.name: field for field in dataclasses.fields(cls)}[table].type
    at_default, changed = (cls(**values | {table: kind(**own, **more)}) for more in ({}, {"twist": 8}))
    assert dataclasses.replace(plan, experiment=at_default).run_id == plan.run_id
    assert dataclasses.replace(plan, experiment=changed).run_id != plan.run_id
