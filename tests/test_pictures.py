"""Pictures: what is drawn again and what is not, what is shown, and what cannot be."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import PROMPTS, latents_of, listing_of, outcome
from lab import Lab
from PIL import Image

from cache import Store, collect, read_needs
from cache.core.needs import needs_of_runs
from pipeline import stages
from pipeline.errors import UserError
from pipeline.estimate import preflight
from pipeline.experiments import needs_of
from pipeline.flux import flow, models
from pipeline.methods import CONTROLNET
from pipeline.plan import pictures
from pipeline.process.stopping import Stopped
from pipeline.sampling import decode
from pipeline.settings.reading import load_experiment

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def lab(lora_sampled, tmp_path) -> Lab:
    return lora_sampled.copy(tmp_path / "lab")


# --- what is drawn again, and what is not -------------------------------------------------------------------------


def test_asked_twice_drawn_once(lab, monkeypatch):
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 2, "trained": 2}
    assert outcome(lab, "Sample")["decoded"] == 4
    assert lab.done("SampleLatents") and lab.done("Sample")
    before = {name: lab.record(name) for name in ("SampleLatents", "Sample")}
    monkeypatch.setattr(models, "load_model", None)
    lab.run("SampleLatents", "Sample")
    assert {name: lab.record(name) for name in before} == before


def test_records_name_what_was_drawn_with_and_what_was_decoded(lora_sampled):
    plan = lora_sampled.plan
    ids = [each.entries.id for each in pictures.all_series(plan)]
    latents, decoded = (lora_sampled.record(name) for name in ("SampleLatents", "Sample"))
    assert latents["outputs"] == {"entries": ids} and latents["inputs"]["transformer"] == plan.network_digest
    assert decoded["inputs"] == {"entries": ids, "vae": plan.image_encoder_digest}
    assert decoded["outputs"] == {"run": plan.run_id}
    assert lora_sampled.record("TrainLoRA")["inputs"]["entries"].keys() == {"EncodeCLIP", "EncodeT5", "EncodeImages"}


def test_each_stage_loads_one_model(lora_sampled):
    assert lora_sampled.loaded == {"SampleLatents": ["transformer"], "Sample": ["vae"]}


def test_the_plan_counts_pictures_and_has_room_for_what_is_written(lora_trained, lora_sampled):
    before, after = (preflight.of_plan(each.plan) for each in (lora_trained, lora_sampled))
    for found, missing in ((before, 4), (after, 0)):
        rows = {name: found["stages"][name] for name in ("SampleLatents", "Sample")}
        assert {(row["items"], row["missing"]) for row in rows.values()} == {(4, missing)}
    plan, folder = lora_sampled.plan, lora_sampled.run_folder
    several = pictures.all_series(plan)
    rows_bytes = sum(path.stat().st_size for each in several for path in each.entries.path.rglob("c.0*"))
    assert rows_bytes == pytest.approx(before["stages"]["SampleLatents"]["store_bytes"], rel=0.1)
    written = [*(folder / "samples").iterdir(), folder / "samples.png"]
    assert before["stages"]["Sample"]["runs_bytes"] > sum(path.stat().st_size for path in written)
    assert [disk["needed_bytes"] for disk in after["disks"]] == [0]


def test_a_new_prompt_is_encoded_and_drawn_alone_and_trains_nothing(lab):
    folder = lab.run_folder
    lab.set("sample", prompts=[*PROMPTS, "a black cup on a table"])
    assert lab.run_folder == folder and lab.done("TrainLoRA")
    assert not lab.done("SampleLatents") and not lab.done("Sample")
    assert lab.encode() == {"EncodeCLIP": 1, "EncodeT5": 1}
    lab.run("SampleLatents", "Sample")
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 1, "trained": 1}
    assert outcome(lab, "Sample")["decoded"] == 2
    assert lab.done("Sample") and len(listing_of(lab)["pictures"]) == 3
    lab.set("sample", prompts=PROMPTS)
    assert lab.done("SampleLatents") and not lab.done("Sample")
    lab.run("Sample")
    assert lab.done("Sample") and len(listing_of(lab)["pictures"]) == 2


@pytest.mark.parametrize(
    "change, drawn",
    [
        ({"num_inference_steps": 2}, {"base": 2, "trained": 2}),
        ({"guidance_scale": 1.0}, {"base": 2, "trained": 2}),
        ({"resolution": 48}, {"base": 2, "trained": 2}),
        ({"seed": 1}, {"base": 2, "trained": 2}),
        ({"prompts": PROMPTS[:1] * 2}, {"base": 1, "trained": 1}),
        ({"batch_size": 2}, {"base": 0, "trained": 0}),
        ({"base": False}, {"trained": 0}),
    ],
)
def test_what_decides_a_picture_draws_it_again(lab, change, drawn):
    lab.set("sample", **change)
    assert lab.done("TrainLoRA")
    plan = lab.plan
    assert {each.name: len(each.missing()) for each in pictures.all_series(plan)} == drawn


def test_another_training_shares_the_bases_pictures(lab):
    plan = lab.set("train", learning_rate=0.05).plan
    with pytest.raises(UserError, match="no trained LoRA to sample with yet; run TrainLoRA"):
        lab.run("SampleLatents")
    assert not lab.done("SampleLatents") and not pictures.base(plan).missing()
    assert [need.stage for need in needs_of(lab.path)[1]].count("SampleLatents") == 1  # the base alone, until then


def test_stopped_between_batches_it_goes_on_with_what_is_missing(lora_trained, tmp_path, monkeypatch):
    lab, denoised = lora_trained.copy(tmp_path / "lab"), flow.denoised

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return denoised(*args)

    monkeypatch.setattr(flow, "denoised", interrupted)
    with pytest.raises(Stopped):
        lab.run("SampleLatents")
    assert not lab.done("SampleLatents")
    monkeypatch.undo()
    lab.run("SampleLatents")
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 1, "trained": 2}


@pytest.mark.slow
def test_killed_it_goes_on_with_what_is_missing(lora_trained, tmp_path):
    prompts = [f"a {colour} dog by the sea" for colour in ("red", "green", "blue", "yellow")]
    lab = lora_trained.copy(tmp_path / "lab").set("sample", prompts=prompts, num_inference_steps=6)
    lab.encode()
    command = [sys.executable, "-m", "pipeline", "run", "SampleLatents", "--experiment", str(lab.path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL)
    written = "store/entries/samples-*/writing/*/*.journal"
    while process.poll() is None and not any(map(os.path.getsize, lab.folder.glob(written))):
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lab.run("SampleLatents")
    assert 0 < outcome(lab, "SampleLatents")["drawn"] < 2 * len(prompts) and lab.done("SampleLatents")


def test_the_collector_keeps_what_a_run_and_an_experiment_show(lab):
    plan = lab.plan
    series = pictures.all_series(plan)
    kept = read_needs(lab.run_folder / "needs.json")
    assert all(kept[each.entries.id] == set(each.pictures) for each in series)
    store, needs = needs_of(lab.path)
    assert {need.recipe["kind"] for need in needs} == {"pooled", "txt", "latents", "samples"}
    (lab.run_folder / "needs.json").write_text('{"needs": []}')
    shutil.copy(lab.folder / "lab.toml", lab.folder / "other.toml")
    lab.run("SampleLatents")
    collect(store.path, needs_of_runs(lab.experiment.runs), 0)
    assert lab.done("SampleLatents")
    collect(store.path, {}, 0)
    assert not lab.done("SampleLatents")


# --- what is shown ------------------------------------------------------------------------------------------------


def test_a_picture_is_the_vaes_own_of_the_stored_latents(lab):
    import mindspore as ms
    from mindone.diffusers import AutoencoderKL
    from mindone.diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(str(lab.model / "vae"))
    for name in ("base", "trained"):
        latents = ms.Tensor(latents_of(lab, name)[:1]) / vae.config.scaling_factor + vae.config.shift_factor
        expected = VaeImageProcessor(vae_scale_factor=16).postprocess(vae.decode(latents)[0], "np")[0]
        found = np.asarray(Image.open(lab.run_folder / listing_of(lab)["pictures"][0][name]))
        assert np.abs(found - 255 * np.asarray(expected)).max() < 0.51


def test_the_list_says_what_was_drawn_and_names_no_path_of_this_machine(lab):
    found, plan = listing_of(lab), lab.plan
    assert [(row["prompt"], row["seed"]) for row in found["pictures"]] == list(zip(PROMPTS, (0, 1)))
    assert (found["num_inference_steps"], found["guidance_scale"], found["resolution"]) == (3, 3.5, 32)
    assert found["run_id"] == plan.run_id and found["precision"]["vae"]["params"] == "fp32"
    assert not any(Path(name).is_absolute() for name in pictures.names_in(found))
    assert str(lab.folder) not in (lab.run_folder / "samples.json").read_text()


@pytest.mark.parametrize("lost", ["samples.png", "samples.json", "one picture"])
def test_what_is_lost_of_the_pictures_is_made_again(lab, lost):
    name = listing_of(lab)["pictures"][0]["base"] if lost == "one picture" else lost
    (lab.run_folder / name).unlink()
    assert not lab.done("Sample") and lab.done("SampleLatents")
    lab.run("Sample")
    assert lab.done("Sample")
    assert outcome(lab, "Sample")["decoded"] == (1 if lost == "one picture" else 4)


# --- what cannot be sampled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ('prompts = "a cat"', "sample.prompts: must be a list, found 'a cat'"),
        ('prompts = ["a", 1]', "sample.prompts[1]: must be a text, found 1"),
        ('prompts = ["a\\u0000"]', "sample.prompts[0]: must not hold a null character"),
        ("resolution = 100", "sample.resolution: must be a multiple of 16, found 100"),
        ("num_inference_steps = 0", "sample.num_inference_steps: must be at least 1"),
        ("batch_size = 0", "sample.batch_size: must be at least 1"),
        ('prompts = ["a", "b"]\nconditions = ["c.png"]', "sample.conditions: 1 for 2 prompts; name an image file for"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_file_is_read(tmp_path, settings, said):
    path = tmp_path / "my.toml"
    path.write_text(f"[sample]\n{settings}\n")
    with pytest.raises(UserError) as refusal:
        load_experiment(path)
    assert said in str(refusal.value)


def test_without_prompts_or_conditions_sampling_says_so_and_loads_nothing(lora_trained, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    lab = lora_trained.copy(tmp_path / "lab").set("sample", prompts=[])
    for name in ("SampleLatents", "Sample"):
        assert not lab.done(name)
        with pytest.raises(UserError, match="sample.prompts: nothing to sample"):
            lab.run(name)
    with pytest.raises(UserError, match="a ControlNet needs an image file for each prompt"):
        pictures.check(lab.set("sample", prompts=PROMPTS).experiment, CONTROLNET)


def test_conditions_that_are_missing_or_damaged_are_said_before_anything_is_encoded(lora_trained, tmp_path):
    lab = lora_trained.copy(tmp_path / "lab").set("controlnet", condition="canny")
    lab.set("sample", conditions=["gone.png", "damaged.png"])
    (lab.folder / "damaged.png").write_bytes(b"\x89PNG and no more")
    os.utime(lab.folder / "damaged.png", (0, 0))
    with pytest.raises(UserError, match="sample.conditions: not there\n  gone.png"):
        pictures.check(lab.experiment, CONTROLNET)
    assert not lab.done("CheckControls")
    with pytest.raises(UserError) as refusal:
        stages.run("CheckControls", lab.experiment)
    assert str(refusal.value).startswith("sample.conditions: 2 problems\n")
    assert "gone.png: no such file" in str(refusal.value) and "damaged.png: damaged" in str(refusal.value)
    assert lab.done("TrainLoRA")  # which has no conditions


def test_latents_that_were_collected_are_asked_for_by_name(lab):
    collect(Store(*lab.experiment.stores).path, {}, 0)
    (lab.run_folder / listing_of(lab)["pictures"][0]["base"]).unlink()
    with pytest.raises(Exception, match="is not there; run the stage"):
        decode.decode(lab.plan)
