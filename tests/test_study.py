"""Two precisions compared on real models.  Children's work is mostly done in this process: an import takes seconds."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lab import Lab
from safetensors.numpy import load_file, save_file
from terminals import terminal
from test_page import Seen

from cache.terminal.output import show
from pipeline.commands import main
from pipeline.devices.precision import Policy
from pipeline.flux.prediction import prediction
from pipeline.process import children
from pipeline.study import figures, page, parts, report, study
from pipeline.study.subject import AGAINST, COMPONENTS, OWN, Job, evenly, label, plans_of
from pipeline.training.batches import Batches
from pipeline.training.loss import item_loss, tensors_of

ROOT = Path(__file__).resolve().parent.parent
ITEMS = 3


@pytest.fixture(scope="module")
def started():
    """The jobs that children were started for, (component, side, inputs); done here instead."""
    jobs = []

    def start(arguments, stdout=None, stderr=None, variables=None):
        job = Job.read(arguments[1])
        jobs.append((job.component, job.side, *job.inputs))
        with contextlib.redirect_stdout(sys.stderr if stdout == children.STDERR else sys.stdout):
            parts.compute(job)
        return subprocess.Popen(["true"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "start", start)
        yield jobs


@pytest.fixture(autouse=True)
def nothing_started(started):
    started.clear()


@pytest.fixture(scope="module")
def lab(tiny_model, tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("study") / "lab", tiny_model, ITEMS).run("CheckData")
    return lab.set("precision", preset="fp16")


@pytest.fixture(scope="module")
def found(lab, started) -> study.Study:
    return study.study(str(lab.path), "fp32", ITEMS)


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def files(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(lab: Lab, *options: str, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "precision", str(lab.path), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_half_precision_costs_what_its_ten_bits_say(lab, found):
    captions = {row["text"] for row in lab.captions()}
    photos = {row["file_name"] for row in lab.captions()}
    for name, row in found.report["components"].items():
        error, cosine = row["relative_error"], row["cosine"]
        assert 1e-4 < error["mean"] <= error["worst"] < 1e-2
        assert 1 - 1e-3 < cosine["worst"] <= cosine["mean"] < 1
        assert cosine["worst"] == pytest.approx(1 - error["worst"] ** 2 / 2, abs=1e-5)
        assert error["worst_item"] in (captions if name.startswith("text") else photos)
        assert row["not_finite"] == {side: {"items": 0, "values": 0} for side in (OWN, AGAINST)}
        assert row["weights_bytes"][AGAINST] == 2 * row["weights_bytes"][OWN]
        assert row["items"] == len(row["by_item"]) == ITEMS
    assert 40 < found.report["components"]["vae"]["psnr_db"]["worst"] < 90
    assert found.report["components"]["text_encoder_2"]["item_bytes"] == {OWN: 16 * 96 * 2, AGAINST: 16 * 96 * 4}
    assert found.report["problems"] == []


def test_the_reference_s_loss_is_that_of_training_from_the_store(lab, found, tmp_path):
    other = lab.copy(tmp_path / "lab").set("precision", preset="fp32")
    other.encode()
    plan = other.plan
    batches = Batches(plan)
    transformer = plan.load("transformer")
    losses, to_tensors = item_loss(prediction(transformer)), tensors_of(plan, transformer)
    each = [float(losses(*to_tensors(batches.evaluation(number, 1))).asnumpy()[0]) for number in range(ITEMS)]
    loss = found.report["loss"]
    assert loss["against"] == pytest.approx(np.mean(each), rel=1e-6)
    assert loss["change"] == pytest.approx(loss["own"] - loss["against"], abs=1e-6)
    assert 0 < abs(loss["change"]) < 0.01 * loss["against"] and loss["standard_error"] < 0.01


def test_nothing_is_written_but_the_memory_of_digests(lab, found):
    assert {path.name for path in files(lab.folder / "store")} == {"facts.sqlite"}
    assert not (lab.folder / "runs").exists()


def test_the_table_has_every_figure_and_the_json_is_strict(found):
    with terminal() as seen:
        show(*report.parts(found.report))
    assert max(map(len, seen.lines)) <= 80
    table = " ".join(map(str, report.parts(found.report)))
    for row in found.report["components"].values():
        assert f"{row['relative_error']['worst']:.2e}" in table and row["relative_error"]["worst_item"] in table
    assert "changes by" in table and "PSNR" in table
    odd = found.report | {"odd": [float("nan"), -float("inf"), 1.5]}
    assert strict(figures.as_json(odd))["odd"] == [None, None, 1.5]
    assert strict(figures.as_json(found.report))["loss"] == found.report["loss"]


def test_the_same_policy_is_said_and_computes_nothing(lab, tmp_path, started, capsys):
    other = lab.copy(tmp_path / "lab").set("precision", preset="fp32")
    before = files(other.folder)
    assert main(["precision", str(other.path)]) == 0
    assert capsys.readouterr().out.count("same policy") == len(COMPONENTS)
    assert started == [] and files(other.folder) == before


def test_a_component_of_the_same_policy_is_computed_once(lab, tmp_path, started):
    other = lab.copy(tmp_path / "lab").set("precision", preset="fp16-text-fp32")
    report = study.study(str(other.path), "fp32", 1).report
    assert started == [
        ("text_encoder", AGAINST),
        ("text_encoder_2", AGAINST),
        ("vae", OWN),
        ("vae", AGAINST),
        ("transformer", AGAINST, AGAINST),
        ("transformer", OWN, AGAINST, OWN),
    ]
    assert {name for name, row in report["components"].items() if row["same_policy"]} == {
        "text_encoder",
        "text_encoder_2",
    }
    assert "relative_error" not in report["components"]["text_encoder"] and report["loss"]["change"]


def test_only_a_simulated_encoder_changes_the_loss_through_its_tensors(lab, tmp_path, started):
    other = lab.copy(tmp_path / "lab").set("precision", preset="fp32", simulate=True)
    other.path.write_text(other.path.read_text() + '[precision.vae]\nparams = "bf16"\ncompute = "bf16"\n')
    report = study.study(str(other.path), "fp32", 1).report
    assert started[-1] == ("transformer", AGAINST, AGAINST, OWN)
    vae = report["components"]["vae"]
    assert vae["policies"] == {OWN: "bf16 simulated", AGAINST: "fp32"}
    assert 1e-3 < vae["relative_error"]["mean"] < 5e-2 and report["loss"]["change"]
    assert vae["weights_bytes"][OWN] * 2 == vae["weights_bytes"][AGAINST]


def test_what_overflows_in_half_precision_is_counted_and_named_with_what_to_try(lab, tmp_path, capsys):
    other = lab.copy(tmp_path / "lab", own_model=True)
    path = other.model / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"][5] = 1e6  # one channel; float16 ends at 65504
    save_file(weights, path, {"format": "pt"})
    path = tmp_path / "new" / "page.html"
    capsys.readouterr()
    assert main(["precision", str(other.path), "--items", "2", "--json", "--page", str(path)]) == 0
    found = strict(capsys.readouterr().out)
    row = found["components"]["text_encoder_2"]
    assert row["not_finite"] == {OWN: {"items": 2, "values": 2 * 16}, AGAINST: {"items": 0, "values": 0}}
    assert row["relative_error"] == {"mean": None, "worst": None, "worst_item": None}
    assert found["components"]["vae"]["relative_error"]["worst"] < 1e-2
    assert found["loss"] is None
    (problem,) = found["problems"]
    assert problem == ('text_encoder_2, fp16: 2 of 2 items are not finite; try [precision] preset = "fp16-text-fp32"')
    assert "training loss: none, as not everything is finite" in report.parts(found)
    assert found["components"]["transformer"]["relative_error"]["worst"] > 0.5  # it clips such input, and says nothing
    seen = Seen(path.read_text())
    assert "text_encoder_2: of 2 items not drawn: 2 not finite" in seen.texts and problem in seen.texts
    assert "text_encoder_2" not in [plot["name"] for plot in json.loads(seen.inline[1])]


@pytest.mark.parametrize(("preset", "against"), [("bf16", "fp32"), ("fp16", "bf16")])
def test_a_policy_that_the_device_cannot_run_is_refused_before_a_child_starts(
    preset, against, lab, tmp_path, started, capsys
):
    other = lab.copy(tmp_path / "lab").set("precision", preset=preset)
    capsys.readouterr()
    assert main(["precision", str(other.path), "--against", against]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: precision: preset 'bf16' and its overrides do not fit")
    assert "vae: CPU does not compute bf16" in said and said.count("error:") == 1
    assert started == []


def test_a_failing_child_s_own_message_is_what_is_said(lab, tmp_path):
    other = lab.copy(tmp_path / "lab", own_model=True)
    path = other.model / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    process = command(other, "--json", TMPDIR=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert err.splitlines()[-1].startswith(f"error: {path}: damaged or cut short") and err.count("error:") == 1
    assert not list(tmp_path.glob("precision-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_with_its_child_and_leaves_nothing(number, lab, tmp_path):
    process = command(lab, TMPDIR=str(tmp_path))
    below = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (child := below.read_text().split()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted; nothing of it is kept\n"
    assert not list(tmp_path.iterdir())
    deadline = time.monotonic() + 60  # a child that had just been forked ends by itself, once it looks for its parent
    while Path(f"/proc/{child[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_the_whole_command_in_processes_of_their_own(lab, tmp_path):
    other = lab.copy(tmp_path / "lab")
    process = command(other, "--items", "2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    path = other.folder / "runs" / "lab-precision.html"
    assert f"page: {path}" in out and "training loss" in out
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_parent_imports_no_mindspore(lab, tmp_path):
    other = lab.copy(tmp_path / "lab").set("precision", preset="fp32")
    code = "import sys; from pipeline.commands import main; main(sys.argv[1:]); print('mindspore' in sys.modules)"
    arguments = [sys.executable, "-c", code, "precision", str(other.path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_sample_is_even_and_always_the_same():
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(10), 3) == [0, 3, 6]
    assert evenly(range(2), 16) == [0, 1]


def test_a_photo_is_looked_at_in_its_first_variant(lab, tmp_path):
    other = lab.copy(tmp_path / "lab").set("data", resolution=[64, 32], crops=3, flip=True, repeats=2)
    plan = plans_of(other.experiment, "fp32", tmp_path / "store")[OWN]
    photos = plan.photos
    (need,) = plan.image_needs
    assert need.variant == min(other.plan.variants(photos[0])) and len(plan.examples) == ITEMS
    assert not (tmp_path / "store").exists()


def test_a_job_survives_its_file(lab, tmp_path):
    photos = lab.plan.photos
    job = Job(str(lab.path), "fp32", photos, 2, tmp_path, "vae", OWN, (AGAINST, OWN))
    read = Job.read(job.write())
    assert read.photos == photos and tuple(read.inputs) == job.inputs and read.folder == tmp_path


def test_policies_are_named_for_people():
    assert label(Policy("fp16", "fp16", "fp16")) == "fp16"
    assert label(Policy("fp32", "fp32", "bf16")) == "fp32, kept as bf16"
    assert label(Policy("bf16", "bf16", "bf16", simulated=True)) == "bf16 simulated"


def test_the_page_has_histograms_all_figures_and_the_images_where_there_are_any(found):
    seen = Seen(page.of_study(found))
    plots = json.loads(seen.inline[1])
    rows = found.report["components"]
    assert [plot["name"] for plot in plots] == list(COMPONENTS) and all(plot["logX"] for plot in plots)
    for plot in plots:
        (bars,) = plot["lines"]
        errors = [item["relative_error"] for item in rows[plot["name"]]["by_item"]]
        assert bars["kind"] == "bars" and sum(bars["ys"]) == sum(error > 0 for error in errors)
        for error in filter(None, errors):
            place = np.searchsorted(bars["xs"], error, "right") - 1
            assert bars["ys"][place] > 0
    assert len({tuple(plot["lines"][0]["xs"]) for plot in plots}) == 1  # one axis
    cells = [str(cell) for table in report.tables(found.report) for row in table.rows for cell in row]
    assert set(filter(None, cells)) <= set(seen.texts)
    assert len([each for each in seen.named("img") if "src" in each]) == 3
    assert not [each for each in Seen(page.of_study(study.Study(found.report))).named("img") if "src" in each]


def test_long_names_are_cut_inside():
    name = "x" * 80 + " number 4.png"
    assert report.short("a.png") == "a.png" and report.short("") == "(the empty caption)"
    assert len(report.short(name)) == 60 and report.short(name).endswith("number 4.png")


def test_differences_are_amplified_as_far_as_they_stay_in_range():
    assert page.amplification(np.array([0.5, -1.2])) == 100
    assert page.amplification(np.array([200.0])) == 1
    assert page.amplification(np.array([12.0])) == 10


@pytest.mark.slow
def test_on_two_devices_at_a_time_the_figures_are_the_same(lab, tmp_path):
    other = lab.copy(tmp_path / "lab")
    several = [command(other, "--items", "2", "--json", *more) for more in ([], ["--devices", "0-1"])]
    (one, _), (two, said) = (process.communicate(timeout=500) for process in several)
    assert [process.returncode for process in several] == [0, 0], said
    assert strict(one) == strict(two) and {"device 0: ", "device 1: "} == {line[:10] for line in said.splitlines()}
