"""``python -m tasks sweep``: what is asked for, the files of its experiments, and one graph that encodes once."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from commands import TASK_FAILED, environment, ran
from lab import Lab
from test_page import Seen

import tasks
import tasks.__main__
from pipeline.errors import UserError
from pipeline.methods import LORA, method_of
from pipeline.plan import needs
from pipeline.plan.plan import resolve
from pipeline.settings.experiment import Experiment
from pipeline.settings.fields import Data, Lora, Model, Paths, Sampling, Train
from pipeline.settings.reading import load_experiment
from pipeline.settings.written import as_toml, moved
from pipeline.sweep import files, shared
from pipeline.sweep.asked import axes
from pipeline.sweep.combinations import asked_about, combinations


def asked(*words: str):
    """Each begins with "--with " where it is no --set."""
    return axes([("--with", word[7:]) if word.startswith("--with ") else ("--set", word) for word in words])


def of(*words: str, experiment: Experiment | None = None) -> list:
    return combinations(experiment or Experiment(name="cat"), asked(*words))


def refused(*words: str) -> list[str]:
    with pytest.raises(UserError) as refusal:
        of(*words)
    head, *problems = str(refusal.value).splitlines()
    assert head == f"{len(problems)} problem{'s' * (len(problems) > 1)} in what is to be swept"
    return [line.strip() for line in problems]


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, values",
    [
        ("train.learning_rate=1e-4,3e-4", [1e-4, 3e-4]),
        ("train.lr_scheduler = cosine, 'linear'", ["cosine", "linear"]),
        ("data.flip=true,false", [True, False]),
        ("data.resolution=512,[512, 768]", [512, [512, 768]]),
        ('data.prompt="a cat, sleeping",[],""', ["a cat, sleeping", [], ""]),
        ('precision.vae={params = "fp32", compute = "fp32"},{}', [{"params": "fp32", "compute": "fp32"}, {}]),
    ],
)
def test_values_are_toml_and_commas_inside_brackets_and_quotes_do_not_split(text, values):
    (axis,) = asked(text)
    assert [value for (value,) in axis.rows] == values


def test_every_combination_is_made_and_says_in_its_name_what_it_sets():
    found = of("train.learning_rate=1e-4,0.003", "lora.rank=4,16", "--with lora.alpha=4,16")
    assert [each.name for each in found] == [
        "learning_rate=1e-4,rank=4,alpha=4",
        "learning_rate=1e-4,rank=16,alpha=16",
        "learning_rate=3e-3,rank=4,alpha=4",
        "learning_rate=3e-3,rank=16,alpha=16",
    ]
    last = found[-1].experiment
    assert (last.name, last.train.learning_rate, last.lora.rank, last.lora.alpha) == (
        *("cat-learning_rate=3e-3,rank=16,alpha=16", 0.003, 16, 16.0),
    )


def test_names_stay_short_and_apart_whatever_the_values_are():
    long = [f'["{"a photo of a cat, " * 9}{number}"]' for number in range(3)]
    found = of(f"sample.prompts={','.join(long)}", "lora.targets=all-linear,['to_q','to_k']")
    names = [each.experiment.name for each in found]
    assert (
        names[1].endswith(",targets=to_q+to_k")
        and len(set(names)) == 6
        and max(len(name.encode()) for name in names) <= 100
    )
    assert [each.experiment.name for each in of(f"sample.prompts={long[1]}", "lora.targets=all-linear")] == names[2:3]


def test_all_that_is_wrong_with_names_is_said_at_once():
    assert refused(
        *("learning_rat=1", "lora.rank=4,4", "--with lora.alpha=1,2,3", "data.crops=[1", "seed", "seed=1", "seed=2"),
        *("name=a", "train.steps=,", "precision.vea.params=fp32"),
    ) == [
        "--set learning_rat: there is no such setting; did you mean train.learning_rate?",
        "--set lora.rank: names 4 twice",
        "--set data.crops: [1: not valid TOML: Unclosed array (at end of document)",
        "--set seed: has no values; write them behind it, as --set lora.rank=4,16",
        "--set seed: is there twice; give it all its values at once, separated by commas",
        "--set name: is set by the sweep itself; change it in the experiment file",
        '--set train.steps: has an empty value; write "" for an empty text',
        "--set precision.vea.params: there is no such setting; did you mean precision.vae?",
    ]
    assert refused("--with lora.alpha=4") == [
        "--with lora.alpha: comes before any --set; it says what changes together with the --set before it"
    ]
    assert refused("lora.rank=4,8", "--with lora.alpha=4") == [
        "--with lora.alpha: 1 values for the 2 of lora.rank; each of these needs one"
    ]


def test_all_that_is_wrong_with_values_is_said_at_once_and_once():
    assert refused("train.learning_rate=abc,1e-4", "lora.rank=4,-1", "precision.vae.comput=fp32") == [
        "precision.vae.comput: unknown field; did you mean compute?",
        "train.learning_rate: must be a number, found 'abc'",
        "lora.rank: must be at least 1, found -1",
    ]
    (line,) = refused("train.lr_warmup_steps=0,10")
    assert line.startswith("train.lr_warmup_steps: constant has none")


def test_an_alpha_that_stays_while_the_rank_changes_is_asked_about():
    (line,) = asked_about(of("lora.rank=4,16"))
    assert line.startswith("lora.alpha stays 4 while lora.rank changes") and "--with lora.alpha=4,16" in line
    assert asked_about(of("lora.rank=4,16", "--with lora.alpha=4,16")) == []


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_in_another_folder_says_the_same_experiment(tmp_path):
    (tmp_path / "model").mkdir()
    experiment = Experiment(
        name="cat",
        paths=Paths(store=("store", "/team/store")),
        model=Model(path="model", transformer="~/flux.safetensors"),
        data=Data(images="photos", resolution=(64, 32)),
        lora=Lora(init_from="other/lora.safetensors"),
        train=Train(learning_rate=3e-4),
        sample=Sampling(prompts=("a", "b"), conditions=("a.png", "/b.png")),
        folder=tmp_path,
        tables=("data", "controlnet"),
    )
    path = tmp_path / "cat-sweep" / "one.toml"
    path.parent.mkdir()
    path.write_text(as_toml(moved(experiment, path.parent)))
    found = load_experiment(path)
    for name in ("stores", "runs", "model_path", "model_weights", "images", "lora_init_from"):
        assert getattr(found, name) == getattr(experiment, name), name
    assert list(found.sample_conditions.values()) == list(experiment.sample_conditions.values())
    assert method_of(found).name == "controlnet"
    same = ("name", "seed", "precision", "train", "prior", "device", "parallel")
    assert all(getattr(found, name) == getattr(experiment, name) for name in same)
    on_the_hub = replace(experiment, model=Model(path="black-forest-labs/FLUX.1-dev"))
    assert moved(on_the_hub, path.parent).model.path == "black-forest-labs/FLUX.1-dev"


# --- the graph ------------------------------------------------------------------------------------------------------


def graph_of(lab: Lab, *words: str) -> tuple[list[str], dict]:
    """The names of all tasks of a sweep, each as often as it is there; and the experiment files."""
    several = of(*words, experiment=lab.experiment)
    found = files.write(lab.experiment, several, ["TrainLoRA"])
    seen, todo = {}, [tasks.Sweep(str(found.path))]
    while todo:
        task = todo.pop()
        if task.task_id not in seen:
            seen[task.task_id] = task
            todo += task.deps()
    return [task.task_family for task in seen.values()], found.experiments


def test_what_comes_before_the_trainings_is_there_once_for_all_that_need_the_same(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab")
    names, experiments = graph_of(lab, "train.learning_rate=1e-4,1e-3", "lora.rank=2,4,8", "seed=1,2")
    assert names.count("TrainLoRA") == len(experiments) == 12
    assert sorted(set(names) - {"Sweep", "TrainLoRA"}) == sorted(
        set(tasks.table.stage_table.BEFORE_TRAINING) & set(names)
    )
    assert all(names.count(name) == 1 for name in set(names) - {"TrainLoRA"})
    assert {"CheckData", "GetModel", "CheckRoom", "EncodePrompts", "EncodeT5", "EncodeImages"} <= set(names)


@pytest.mark.parametrize("words", ["data.flip=true,false", "train.caption_dropout=0,0.1", "data.resolution=32,48"])
def test_experiments_that_need_other_encodings_have_tasks_of_their_own(encoded, tmp_path, words):
    names, _ = graph_of(encoded.copy(tmp_path / "lab"), words, "lora.rank=2,4")
    assert (names.count("EncodeT5"), names.count("EncodeImages"), names.count("TrainLoRA")) == (2, 2, 4)


def test_experiments_that_share_their_encodings_need_the_same_of_the_store(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab")
    several = of("train.learning_rate=1e-4,1e-3", "lora.rank=2,8", "seed=1,2", experiment=lab.experiment)
    assert len({shared.key(each.experiment) for each in several}) == 1
    plans = [resolve(each.experiment, LORA) for each in several]
    asked = {repr([(need.recipe, need.items) for need in needs.encoded(plan)]) for plan in plans}
    assert len(asked) == 1 and len({plan.run_id for plan in plans}) == 8


def test_what_a_shared_check_has_learnt_is_known_to_all_that_share_it(tiny_model, tmp_path):
    lab = Lab(tmp_path / "lab", tiny_model)
    several = of("lora.rank=2,4", experiment=lab.experiment)
    found = tasks.Sweep(str(files.write(lab.experiment, several, ["TrainLoRA"]).path))
    assert not found.complete()
    known = [tasks.table.survey(str(path)) for path in found.files.experiments]
    assert [survey.photos(LORA) for survey in known] == [None, None]
    tasks.CheckData(str(found.files.experiments[0])).run()
    photos = [tasks.table.survey(str(path)).photos(LORA) for path in found.files.experiments]
    assert photos[0] == photos[1] and len(photos[0]) == 3


# --- the command ----------------------------------------------------------------------------------------------------


def sweep(lab: Lab, *words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tasks", "sweep", str(lab.path), *words]
    return subprocess.run(
        command, env=environment(), cwd=lab.folder, capture_output=True, text=True, timeout=900, **options
    )


def run_names(lab: Lab) -> list[str]:
    return sorted(path.name[:-13] for path in (lab.folder / "runs").iterdir())


def test_a_combination_that_fails_stops_no_other_and_the_end_compares_those_that_are_done(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab")
    words = ["--set", "lora.targets=['nothing'],attention", "--set", "lora.rank=2"]
    listed = sweep(lab, *words, "--dry-run")
    assert listed.returncode == 0 and listed.stdout.count("to do") == 2 and not (lab.folder / "lab-sweep").exists()
    first = sweep(lab, *words)
    assert first.returncode == TASK_FAILED, first.stderr
    assert ran(first.stderr).count("TrainLoRA") == 2 and "lora.targets: no linear layer" in first.stderr
    assert "Execution Summary" not in first.stderr and "Traceback" not in first.stderr
    end = first.stdout[first.stdout.index("lab-sweep: 1 of 2 are done") :]
    assert "1 not done: what failed has said why above" in end and "lab-sweep/report.html" in end
    done, undone = end.splitlines()[2:4]
    assert done.startswith("targets=attention,rank=2 ") and done.endswith(" done")
    assert undone.startswith("targets=nothing+,rank=2 ") and undone.endswith(" not done")
    assert "lab-targets=attention,rank=2" in Seen((lab.folder / "lab-sweep/report.html").read_text()).text
    again = sweep(lab, *words[:1], "lora.targets=attention", *words[2:])
    assert again.returncode == 0 and ran(again.stderr) == [] and "1 of 1 are done" in again.stdout
    assert "lab-targets=attention,rank=2" in run_names(lab)
    alone = lab.folder / "lab-sweep/targets=attention,rank=2.toml"
    assert tasks.TrainLoRA(str(alone)).complete()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [[], ["--devices", "0-1"]], ids=["one", "two"])
def test_a_sweep_of_four_encodes_once_and_ends_in_one_comparison(tiny_model, tmp_path, devices):
    lab = Lab(tmp_path / "lab", tiny_model)
    words = ["--set", "train.learning_rate=1e-4,1e-3", "--set", "lora.rank=2,4", "--with", "lora.alpha=2,4", *devices]
    done = sweep(lab, *words, "--task", "MeasureLoss")
    assert done.returncode == 0, done.stderr
    started = ran(done.stderr.replace("device 0: ", "").replace("device 1: ", ""))
    assert [started.count(name) for name in ("CheckData", "EncodeCLIP", "EncodeT5", "EncodeImages")] == [1] * 4
    assert started.count("TrainLoRA") == started.count("MeasureLoss") == len(run_names(lab)) == 4
    assert "lab-sweep: 4 of 4 are done" in done.stdout and "loss after" in done.stdout
    records = [json.loads(path.read_text()) for path in (lab.folder / "store").rglob("records/Encode*.json")]
    assert [record["outcome"]["encoded"] for record in records] == [3, 3, 3]
    seen = Seen((lab.folder / "lab-sweep/report.html").read_text()).text
    assert all(name.removeprefix("lab-").replace(",", ", ") in seen for name in run_names(lab))
    again = sweep(lab, *words, "--task", "MeasureLoss")
    assert again.returncode == 0 and ran(again.stderr) == [] and "4 of 4 are done" in again.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "nothing to sweep; say it as --set"),
        (["--set", "lora.rnak=3"], "did you mean lora.rank?"),
        (["--set", "lora.rank=2", "--task", "Sample"], "sample.prompts: nothing to sample"),
        (["--set", "lora.rank=2", "--task", "MeasureLoss", "--task", "TrainControlNet"], "are of different methods"),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_anything_runs(encoded, capsys, words, said):
    assert tasks.__main__.main(["sweep", str(encoded.path), *words]) == 1
    caught = capsys.readouterr()
    assert said in caught.err and caught.err.startswith("error: ") and not (encoded.folder / "lab-sweep").exists()
