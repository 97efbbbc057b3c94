"""The report of a run, whole, damaged or unfinished, and of several runs side by side."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn import PROMPTS
from lab import Lab
from test_page import EVIL, Seen

from pipeline import stage_table
from pipeline.commands import main
from pipeline.errors import UserError
from pipeline.flux import noise_levels, pretrained
from pipeline.plan.run_folder import RunFolder
from pipeline.report import curves, page
from pipeline.report.run import read_run
from pipeline.settings.experiment import EMBEDDED
from pipeline.training.weighting import drawn_levels
from tasks import table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lab(lora_sampled, tmp_path) -> Lab:
    return lora_sampled.copy(tmp_path / "lab")


@pytest.fixture
def run(lab) -> RunFolder:
    return lab.plan.run


def seen(*paths: Path) -> Seen:
    return Seen(page.report(list(paths)))


def change(path: Path, edit) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def copied(run: RunFolder, name: str, **train) -> Path:
    """The run once more, with other settings."""
    path = Path(shutil.copytree(run.path, run.path.parent / name))
    change(path / "experiment.json", lambda settings: settings["train"].update(train))
    return path


def test_the_stage_leaves_a_page_with_pictures_curves_stages_and_the_way_to_make_it_again(lab, run):
    assert not lab.done("Report")
    lab.run("Report")
    assert lab.done("Report") and not (run.path / "records/Report.json").exists()
    found = Seen(run.report.read_text())
    assert all(prompt in found.text for prompt in PROMPTS)
    pictures = [each["src"] for each in found.named("img") if "src" in each]
    assert len(pictures) == 4 + 2 and all(uri.startswith("data:image/webp") for uri in pictures)  # samples and photos
    assert {row["text"] for row in lab.captions()} <= set(found.texts)
    drawn = {plot["name"]: plot for plot in json.loads(found.inline[1])}
    assert {"loss", "lr", "grad_norm", "step_seconds"} == set(drawn)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    assert drawn["loss"]["lines"][0]["ys"] == pytest.approx(losses, rel=1e-4)
    for stage in ("EncodeCLIP", "EncodeT5", "EncodeImages", "TrainLoRA", "SampleLatents", "Sample"):
        assert stage in found.texts
    assert "luigi --module tasks Report --experiment lab.toml" in found.text
    assert "learning_rate = 0.1" in found.text and "float32" in found.text


def test_the_file_on_the_page_is_the_experiment(lab, run, tmp_path):
    from pipeline.report.origin import experiment_file
    from pipeline.settings.experiment import settings_of
    from pipeline.settings.reading import load_experiment

    again = tmp_path / "again.toml"
    again.write_text(experiment_file(read_run(run.path)))
    assert settings_of(load_experiment(again)) == settings_of(lab.experiment)


def test_a_page_is_made_again_once_the_loss_is_measured(lab, run):
    lab.run("Report")
    run.loss.write_text(json.dumps({"pairs": 64, "before": 2.0, "after": 1.5, "gain": 0.5, "standard_error": 0.1}))
    assert not lab.done("Report")
    lab.run("Report")
    assert lab.done("Report") and "2 → 1.5" in run.report.read_text()
    run.report.write_bytes(run.report.read_bytes()[:-50])
    assert not lab.done("Report")


def test_pictures_come_before_the_report_only_where_the_experiment_asks_for_some(lab):
    def before(name):
        return {task.stage for task in table.TASKS[name](str(lab.path)).requires()}

    assert before("Report") == {"TrainLoRA", "Sample"}
    lab.set("sample", prompts=[])
    assert before("Report") == {"TrainLoRA"}


def test_the_command_writes_where_it_is_told_and_imports_no_mindspore(run, tmp_path):
    code = "import sys; from pipeline.commands import main; main(sys.argv[1:]); print('mindspore' in sys.modules)"
    arguments = [sys.executable, "-c", code, "report", str(run.path), "--out", str(tmp_path / "new" / "page.html")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(tmp_path / "new" / "page.html"), "False"], done.stderr
    assert "a red circle" in Path(done.stdout.split()[0]).read_text()


def test_text_of_others_is_escaped_wherever_it_comes_from(run, lab):
    def spoil(settings):
        settings["sample"]["prompts"], settings["data"]["images"], settings["model"]["path"] = [EVIL], EVIL, EVIL
        settings["folder"] = EVIL

    change(run.experiment, spoil)
    change(run.samples_list, lambda listing: [row.update(prompt=EVIL, base=EVIL) for row in listing["pictures"]])
    change(run.path / "records/TrainLoRA.json", lambda record: record.update(device=EVIL, stage=EVIL, finished=EVIL))
    copy = run.path.with_name("<i>first")
    shutil.move(run.path, copy)
    for paths in ([copy], [copy, shutil.copytree(copy, copy.with_name("<i>second"))]):
        found = seen(*paths)
        assert len(found.named("script")) == 2 and not found.named("i")
        assert not [each for each in found.named("img") if each.get("src") == "x"]
        assert "alert(1)" in found.text and "onerror" not in {key for _, each in found.elements for key in each}


def test_the_page_says_what_checkdata_notices_in_the_photos_that_it_knows(lab, run):
    change(run.experiment, lambda settings: settings.update(folder=str(lab.folder)))  # that of the copied lab
    rows = [{**row, "text": f"number {number}"} for number, row in enumerate(lab.captions())]
    lab.write_captions(rows)
    assert "Nothing: no caption is cut" in seen(run.path).text
    long, same = lab.pictures / "long.png", lab.pictures / "same.png"
    for copy in (long, same):
        shutil.copyfile(lab.pictures / "00000.png", copy)
    lab.write_captions([*rows, {"file_name": long.name, "text": f"{EVIL} " * 20}, {**rows[1], "file_name": same.name}])
    found = seen(run.path)
    assert "Not known: 2 photos are new or changed; `python -m pipeline data EXPERIMENT.toml`" in found.text
    lab.settle()
    lab.run("CheckData")
    found = seen(run.path)
    assert "captions cut by T5" in found.texts and "photos more than once" in found.texts
    assert "long.png" in found.texts and len([text for text in found.texts if text.startswith("16 of ")]) == 1
    assert "photos enlarged" not in found.texts and "Not known" not in found.text
    change(run.experiment, lambda settings: settings["model"].update(path="nobody/nothing"))
    assert "whether captions are cut: the model is not on this machine" in seen(run.path).text
    (lab.folder / "store/facts.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    assert "What CheckData notices: the store knows none of the photos" in seen(run.path).text


def test_what_is_damaged_or_missing_is_named_and_the_rest_is_shown(run):
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("{nonsense}\n" + "".join(lines))
    next(run.samples.glob("*base*")).write_bytes(b"\x89PNG")
    (run.path / "records/Sample.json").write_text("[1, 2]")
    run.loss.write_text('{"pairs": "many"}')
    found = seen(run.path)
    assert "metrics.jsonl: 1 of its 3 lines cannot be read" in found.text
    assert "loss.json: damaged" in found.text and "Sample.json: damaged" in found.text
    assert "damaged or truncated" in found.text
    assert "TrainLoRA" in found.texts and json.loads(found.inline[1])


@pytest.mark.parametrize("name", ["experiment.json", "samples.json", "needs.json", "metrics.jsonl", "result.json"])
def test_any_file_of_a_run_may_hold_anything(name, run):
    for content in (b"", b"null", b"[]", b'{"needs": 3, "pictures": [7], "train": []}', b"\xff\xfe"):
        (run.path / name).write_bytes(content)
        assert seen(run.path).named("main")


def test_a_run_that_has_not_ended_says_how_far_it_is(run):
    for path in (run.result, run.samples_list, run.path / "pytorch_lora_weights.safetensors"):
        path.unlink()
    found = seen(run.path)
    assert "not finished: step 2 of 2; newest checkpoint: step 2" in found.text
    assert "TrainLoRA goes on from its newest checkpoint" in found.text


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no run's folder")
    with pytest.raises(UserError, match="no such folder"):
        page.report([tmp_path / "absent"])


def test_samples_json_cannot_lead_out_of_the_run(run, lab):
    outside = lab.pictures / "00000.png"
    change(run.samples_list, lambda listing: listing["pictures"][0].update(base=str(outside)))
    change(run.experiment, lambda settings: settings.pop("folder"))  # no photos on the page
    assert len([each for each in seen(run.path).named("img") if "src" in each]) == 3


def test_four_runs_show_only_what_differs_on_one_axis(run, capsys):
    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    paths = [copied(run, f"rate{number}-{'0' * 12}", learning_rate=rate) for number, rate in enumerate(rates)]
    assert main(["report", *map(str, paths)]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == run.path.parent / "report.html"
    found = Seen(out.read_text())
    assert [label for label in found.texts if label in ("rate0", "rate1", "rate2", "rate3")][:4] == [
        f"rate{number}" for number in range(4)
    ]
    assert "learning_rate" in found.texts and {"0.0001", "0.0003", "0.001", "0.003"} <= set(found.texts)
    assert "batch_size" not in found.texts
    loss = next(plot for plot in json.loads(found.inline[1]) if plot["name"] == "loss")
    assert [line["label"] for line in loss["lines"]] == [f"rate{number}" for number in range(4)]
    assert len({line["colour"] for line in loss["lines"]}) == 4
    assert len([each for each in found.named("img") if "src" in each]) == len(PROMPTS) * (1 + 4)


def test_one_training_at_several_lengths_gets_a_slider_over_its_pictures(run):
    paths = []
    for steps in (30, 10, 20):
        paths.append(copied(run, f"lab-{steps:012}", steps=steps))
        change(paths[-1] / "result.json", lambda result, steps=steps: result.update(steps=steps))
    found = seen(*paths)
    (timeline,) = [each for tag, each in found.elements if "timeline" in each.get("class", "")]
    assert json.loads(timeline["data-steps"]) == [10, 20, 30]
    (slider,) = found.named("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    placed = [each for each in found.named("img") if "data-place" in each]
    assert len(placed) == 3 * len(PROMPTS)
    assert [each["data-place"] for each in placed if "hidden" not in each] == ["2"] * len(PROMPTS)


def test_training_levels_are_those_of_the_scheduler(cpu, tmp_path):
    for settings in ({}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True, "num_train_timesteps": 500}):
        folder = tmp_path / f"{len(settings)}" / "scheduler"
        folder.mkdir(parents=True)
        (folder / "scheduler_config.json").write_text(json.dumps(settings))
        expected, _ = noise_levels.scheduler_sigmas(folder.parent)
        assert noise_levels.training_sigmas(settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_by_noise_level_is_found_from_the_losses_of_whole_steps(batch_size, run):
    steps = 4000
    change(run.experiment, lambda settings: settings["train"].update(batch_size=batch_size, accumulate=2, steps=steps))
    change(run.experiment, lambda settings: settings["model"].update(path=str(EMBEDDED)))
    known = read_run(run.path).experiment
    sigmas = noise_levels.training_sigmas(pretrained.config(EMBEDDED, "scheduler"))
    with open(run.metrics, "w") as file:
        for step in range(1, steps + 1):
            batches = [
                drawn_levels(known.train, known.seed, number, len(sigmas)) for number in (2 * step - 2, 2 * step - 1)
            ]
            loss = float(np.mean([np.floor(sigmas[batch] * 10 - 1e-9) + step / steps for batch in batches]))
            file.write(json.dumps({"step": step, "loss": loss, "step_seconds": 0.1}) + "\n")
    (plot,) = curves.loss_by_level({"run": read_run(run.path)})
    first, second = plot.lines
    assert first.xs == pytest.approx(np.arange(0.05, 1, 0.1))
    assert first.ys == pytest.approx(np.arange(10) + 0.25, abs=0.1)
    assert second.ys == pytest.approx(np.arange(10) + 0.75, abs=0.1)


def test_reports_of_both_methods_are_stages():
    assert {"Report", "ReportControlNet"} <= set(stage_table.STAGES)
