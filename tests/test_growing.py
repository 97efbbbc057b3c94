"""Pictures that are drawn while a training goes on: the same bits, drawn once, whatever interrupts it."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import ranked
from drawn import PROMPTS, listing_of
from kills import Killed, kill_at
from lab import Lab
from PIL import Image
from safetensors.numpy import load_file
from test_page import Seen

from pipeline.estimate import preflight
from pipeline.flux import flow
from pipeline.methods import CONTROLNET
from pipeline.plan import pictures
from pipeline.plan.plan import resolve
from pipeline.process.stopping import Stopped
from pipeline.sampling import growing, quick

pytestmark = pytest.mark.usefixtures("cpu")
STEPS = 5
FILE = "pytorch_lora_weights.safetensors"
AS_IT_IS = "--format", "diffusers", "--dtype", "fp32"


@pytest.fixture(scope="module")
def begun(tiny_model, tmp_path_factory) -> Lab:
    """A LoRA to be trained that keeps averages, drops inputs and has a scale that rounds; all is encoded."""
    lab = Lab(tmp_path_factory.mktemp("begun") / "lab", tiny_model)
    lab.set("train", steps=STEPS, learning_rate=0.1, ema_decay=0.5, mode="jit", checkpoint_every=2)
    lab.set("lora", alpha=3.0, dropout=0.2).set(
        "sample", prompts=PROMPTS, num_inference_steps=2, every=2, mode="pynative"
    )
    lab.encode()
    return lab


@pytest.fixture(scope="module")
def grown(begun, tmp_path_factory) -> Lab:
    return begun.copy(tmp_path_factory.mktemp("grown") / "lab").run("TrainLoRA")


@pytest.fixture
def lab(grown, tmp_path) -> Lab:
    return grown.copy(tmp_path / "lab")


def latents(plan) -> dict[str, np.ndarray]:
    """What has been drawn by now, by series."""
    return {
        each.name: each.entries.read_many(list(each.pictures)) for each in pictures.by_now(plan) if not each.missing()
    }


def redrawn(plan, stage: str, lab: Lab) -> dict[str, np.ndarray]:
    """The same, drawn anew by the stage that draws what is missing."""
    for each in pictures.by_now(plan):
        shutil.rmtree(each.entries.path, ignore_errors=True)  # the result is not drawn yet
    lab.run(stage)
    return latents(plan)


def assert_equal_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_drawing_changes_no_bit_of_the_training_and_no_identity(begun, grown, tmp_path):
    other = begun.copy(tmp_path / "lab").set("sample", every=0).run("TrainLoRA")
    assert other.run_folder.name == grown.run_folder.name
    for name in (FILE, "checkpoints/step-000004.safetensors", f"checkpoints/step-{STEPS:06}.safetensors"):
        assert (other.run_folder / name).read_bytes() == (grown.run_folder / name).read_bytes()
    assert not (other.run_folder / "steps").exists()


def test_what_is_drawn_while_it_trains_is_what_the_saved_weights_draw_later(lab):
    plan = lab.plan
    found = latents(plan)
    assert list(found) == ["base", "step-000002", "step-000004"]
    assert len({each.tobytes() for each in found.values()}) == 3
    again = redrawn(plan, "SampleLatents", lab)
    assert set(again) - set(found) == {"trained"}
    assert_equal_bits(found, {name: again[name] for name in found})
    assert lab.record("SampleLatents")["outcome"]["pictures"]["step-000002"] == 2


def test_an_interrupted_training_draws_each_step_once_and_misses_none(begun, grown, tmp_path, monkeypatch):
    """Killed before the first drawing, asked to stop in the second, killed after it."""
    lab, asked, drawn = begun.copy(tmp_path / "lab"), [], []
    draw, denoised = growing.draw, flow.denoised

    def counted(plan, model, pooled, series, missing, mode):
        drawn.extend((series.name, item) for item in missing)
        draw(plan, model, pooled, series, missing, mode)

    def interrupted(*args):
        if drawn[-1][0] == "step-000004" and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return denoised(*args)

    monkeypatch.setattr(growing, "draw", counted)
    monkeypatch.setattr(flow, "denoised", interrupted)
    kill_at(monkeypatch, kills := [2])
    with pytest.raises(Killed):
        lab.run("TrainLoRA")
    assert not kills
    with pytest.raises(Stopped):
        lab.run("TrainLoRA")
    assert len(json.loads((lab.run_folder / "quick.json").read_text())["pictures"][0]["steps"]) == 1
    lab.run("TrainLoRA")
    assert len(drawn) - 1 == len(set(drawn)) == 6  # the one of the two pictures that was asked to stop before
    assert_equal_bits(latents(lab.plan), latents(grown.plan))
    assert (lab.run_folder / FILE).read_bytes() == (grown.run_folder / FILE).read_bytes()


def test_what_cannot_be_drawn_is_said_and_stops_no_training(begun, tmp_path, monkeypatch, capsys):
    lab = begun.copy(tmp_path / "lab").set("train", steps=3, mode="pynative")
    monkeypatch.setattr(quick, "fitted", lambda plan: open("/nowhere/at/all"))
    lab.run("TrainLoRA")
    said = capsys.readouterr()
    assert "step 2: not drawn: " in said.out + said.err and lab.done("TrainLoRA")


def test_a_longer_training_takes_over_what_a_shorter_one_has_kept(lab):
    lab.set("train", steps=STEPS + 2).run("TrainLoRA")
    found = latents(lab.plan)
    assert list(found) == ["base", "step-000002", "step-000004", "step-000006"]


def test_the_plan_counts_the_pictures_and_the_weights_that_are_kept(begun, grown):
    for lab, missing in ((begun, 8), (grown, 2)):
        found = preflight.of_plan(lab.plan)
        assert (found["stages"]["SampleLatents"]["items"], found["stages"]["SampleLatents"]["missing"]) == (8, missing)
        training = found["training"]
        assert training["kept_steps_bytes"] == (0 if lab is grown else 2 * training["result_bytes"])


def test_sample_shows_every_step_and_takes_the_quick_looks_away(lab):
    folder = lab.run_folder
    looks = json.loads((folder / "quick.json").read_text())["pictures"]
    names = [looks[0]["base"], *looks[0]["steps"].values()]
    assert list(looks[0]["steps"]) == ["2", "4"] and all(Image.open(folder / name).size == (32, 32) for name in names)
    with Image.open(folder / "quick.png") as image:
        assert image.height > 3 * 192
    lab.run("SampleLatents", "Sample")
    assert lab.done("Sample") and not (folder / "quick.json").exists()
    assert not any((folder / name).exists() for name in [*names, "quick.png"])
    row = listing_of(lab)["pictures"][0]
    assert list(row) == ["prompt", "seed", "base", "trained", "steps"] and list(row["steps"]) == ["2", "4"]
    assert len({(folder / name).read_bytes() for name in (row["base"], *row["steps"].values(), row["trained"])}) == 4


def test_reports_and_lists_of_runs_show_quick_looks_marked_until_there_are_pictures(lab, capsys):
    from pipeline.commands import main
    from pipeline.report import page

    run = lab.plan.run
    assert main(["runs", str(run.path)]) == 0 and "quick.png" in capsys.readouterr().out
    before = Seen(page.report([run.path]))
    assert "A quick look is no picture" in before.text and before.texts.count(", quick look") == 2 * (1 + 2)
    lab.run("SampleLatents", "Sample")
    after = Seen(page.report([run.path]))
    assert "uick look" not in after.text and 'data-steps="[2,4,5]"' in page.report([run.path])
    assert main(["runs", str(run.path)]) == 0 and "samples.png" in capsys.readouterr().out


def test_what_is_drawn_by_now_is_decoded_while_the_training_goes_on(lab, capsys):
    from pipeline.commands import main

    (lab.run_folder / "result.json").unlink()
    assert main(["pictures", str(lab.run_folder)]) == 0
    row = listing_of(lab)["pictures"][1]
    assert list(row) == ["prompt", "seed", "base", "steps"] and list(row["steps"]) == ["2", "4"]
    shutil.rmtree(lab.run_folder / "steps")
    lab.set("sample", base=False)
    assert main(["pictures", str(lab.path)]) == 1
    assert "nothing has been drawn yet; while it trains, that begins with [sample] every = N" in capsys.readouterr().err


def test_a_quick_look_finds_colours_of_the_photos_in_their_latents(lab):
    plan = lab.plan
    colours, need = quick.fitted(plan), plan.image_needs[-1]
    seen = [quick.seen_in(plan, need, place) for place in range(len(need.items))]
    positions, wanted = (np.concatenate(each) for each in zip(*seen))
    assert np.square(positions @ colours - wanted).mean() < 0.8 * wanted.var(axis=0).mean()
    look = np.asarray(quick.picture(need.entries.read(need.items[0])[:16], colours, 32))
    assert look.shape == (32, 32, 3) and look.std() > 5


def test_a_step_with_pictures_can_be_chosen(lab, capsys):
    from pipeline.commands import main

    run = lab.run_folder
    assert main(["export", str(run), "--checkpoint", "2", "--model", str(lab.model), *AS_IT_IS]) == 0
    chosen, kept = (
        load_file(run / "step-000002-diffusers-fp32.safetensors"),
        load_file(run / "steps/step-000002" / FILE),
    )
    assert chosen.keys() == kept.keys()
    assert all(np.array_equal(chosen[name], kept[name]) for name in kept)
    assert main(["export", str(run), "--checkpoint", "3"]) == 1
    assert "no weights of step 3; there are 2, 4, 5" in capsys.readouterr().err


def test_a_controlnet_is_drawn_with_the_conditions_and_as_it_was_rounded(encoded_pairs, tmp_path):
    lab = encoded_pairs.copy(tmp_path / "lab").set("controlnet", save_dtype="bf16")
    lab.set("train", steps=3, learning_rate=0.01, mode="pynative")
    conditions = ["pictures/conditions/00000.png", "pictures/conditions/00001.png"]
    lab.set("sample", prompts=PROMPTS, conditions=conditions, num_inference_steps=2, every=2, mode="pynative")
    lab.run("CheckControls", "EncodeCLIP", "EncodeT5", "EncodeControls", "TrainControlNet")
    plan = resolve(lab.experiment, CONTROLNET)
    found = latents(plan)
    again = redrawn(plan, "SampleControlNetLatents", lab)
    assert list(found) == ["base", "step-000002"]
    assert_equal_bits(found, {name: again[name] for name in found})
    other = lab.copy(tmp_path / "other").set("sample", every=0)
    shutil.rmtree(other.folder / "runs")
    other.run("CheckControls", "TrainControlNet")
    name = "checkpoints/step-000003.safetensors"
    assert (plan.run.path / name).read_bytes() == (resolve(other.experiment, CONTROLNET).run.path / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(begun, tmp_path):
    labs = [begun.copy(tmp_path / name).set("train", accumulate=2) for name in ("one", "two")]
    labs[0].run("TrainLoRA")
    ranked.run(labs[1], ranks=2, shard_optimizer=True)
    assert_equal_bits(*(latents(lab.plan) for lab in labs))
    assert len(latents(labs[0].plan)) == 3
