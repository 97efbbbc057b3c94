"""Sampling: its arithmetic against mindone's own pipeline, what is drawn again and what is not, and what is shown."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lab import Lab
from PIL import Image
from safetensors.numpy import load_file, save_file

from cache import Store, caption_item, collect, read_needs
from cache.needs import needs_of_runs
from pipeline import checkpoints, dtypes, flow, models, recipes, stages
from pipeline.errors import UserError
from pipeline.experiment import load_experiment
from pipeline.needs import needs_of
from pipeline.networks import controlnet, lora
from pipeline.recipes import CONTROLNET
from pipeline.sampling import decode, denoise, pictures
from pipeline.stopping import Stopped
from pipeline.synthetic import tiny
from pipeline.training import train
from pipeline.training.loss import prediction

pytestmark = pytest.mark.usefixtures("cpu")

PROMPTS = ["a red circle on a blue background", "a photo of a green cat in the snow"]
DEV = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL = {"use_dynamic_shifting": False, "shift": 1.0}
STATIC = {"use_dynamic_shifting": False, "shift": 3.0}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Lab:
    """A LoRA, trained, and two prompts, encoded; nothing is drawn yet."""
    lab = Lab(tmp_path_factory.mktemp("sample") / "lab", tiny_model, num_pictures=2)
    lab.set("train", steps=2, learning_rate=0.1).set("sample", prompts=PROMPTS, num_inference_steps=3)
    lab.encode()
    return lab.run("TrainLoRA")


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory) -> Lab:
    """``loaded``: the models that each stage loaded."""
    lab = trained.copy(tmp_path_factory.mktemp("sampled") / "lab")
    lab.loaded, load = {}, models.load_model
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("SampleLatents", "Sample"):
            found = lab.loaded[stage] = []
            patch.setattr(models, "load_model", lambda *args, to=found: to.append(args[1]) or load(*args))
            lab.run(stage)
    return lab


@pytest.fixture
def lab(sampled, tmp_path) -> Lab:
    return sampled.copy(tmp_path / "lab")


def latents_of(lab: Lab, name: str) -> np.ndarray:
    """(pictures, channels, height, width), in the order of the prompts."""
    plan = lab.plan
    (series,) = (each for each in pictures.all_series(plan, plan.photos()) if each.name == name)
    return series.entries.read_many(list(series.pictures))


def outcome(lab: Lab, name: str) -> dict:
    return lab.record(name)["outcome"]


def listing_of(lab: Lab) -> dict:
    return json.loads((lab.run_folder / "samples.json").read_text())


# --- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [DEV, SCHNELL, STATIC], ids=["dev", "schnell", "static"])
@pytest.mark.parametrize("num_steps, num_tokens", [(1, 4), (4, 256), (28, 4096)])
def test_noise_levels_are_those_that_flux_pipeline_asks_the_scheduler_for(tmp_path, settings, num_steps, num_tokens):
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler
    from mindone.diffusers.pipelines.flux.pipeline_flux import calculate_shift

    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
    found = models.inference_sigmas(tmp_path, num_steps, num_tokens)
    scheduler, mu = FlowMatchEulerDiscreteScheduler(**settings), calculate_shift(num_tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    np.testing.assert_array_equal(found, scheduler.sigmas.asnumpy())
    even = np.linspace(1.0, 1 / num_steps, num_steps)
    shift = math.exp(mu) if settings["use_dynamic_shifting"] else settings["shift"]
    np.testing.assert_allclose(found[:-1], shift * even / (1 + (shift - 1) * even), rtol=1e-6)
    assert found[-1] == 0 and found.dtype == np.float32


def test_a_scheduler_that_draws_noise_at_every_step_is_refused(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"stochastic_sampling": True}))
    with pytest.raises(UserError, match="stochastic_sampling is not supported"):
        models.inference_sigmas(tmp_path, 2, 4)


def test_steps_are_those_of_the_scheduler():
    import mindspore as ms
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler

    generator = np.random.default_rng(0)
    noise, change = generator.standard_normal((2, 2, 4, 8), dtype=np.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(**STATIC)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5))
    x = ms.Tensor(noise)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x * 0.5 + ms.Tensor(change), timestep, x)[0]
    found = flow.denoised(noise, scheduler.sigmas.asnumpy(), lambda x, sigma: x * np.float32(0.5) + change)
    np.testing.assert_allclose(found, x.asnumpy(), atol=1e-6)


@pytest.mark.parametrize("is_dev", [True, False], ids=["dev", "schnell"])
def test_final_latents_are_those_of_mindones_flux_pipeline(tmp_path, tiny_model, is_dev):
    import mindspore as ms
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    folder = tiny_model if is_dev else tiny.write_tiny_model(tmp_path / "schnell", guidance_embeds=False)
    lab = Lab(tmp_path / "lab", folder, num_pictures=1).set("data", resolution=48)
    lab.set("sample", prompts=PROMPTS, num_inference_steps=4, guidance_scale=2.0, seed=7)
    lab.encode()
    plan = lab.plan
    series, frozen = pictures.base(plan), train.load_frozen(plan)
    transformer = frozen[lora.TRANSFORMER]
    configs, several = [transformer.config], list(series.pictures.values())
    model = denoise.Model(prediction(transformer), configs, frozen, {}, plan.pooled.read_many)
    denoise.draw(plan, model, series, series.missing())
    settings = checkpoints.config(folder, "scheduler")
    vae = models.load_model(folder, "vae", "fp32")
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler.from_config(settings), vae, None, None, None, None, transformer
    )
    captions = [caption_item(prompt) for prompt in PROMPTS]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=ms.Tensor(plan.txt.read_many(captions)),
        pooled_prompt_embeds=ms.Tensor(plan.pooled.read_many(captions)),
        latents=ms.Tensor(denoise.noise(plan, several)),
        height=48,
        width=48,
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="latent",
    )[0]
    found = flow.pack(series.entries.read_many(list(series.pictures)))
    np.testing.assert_allclose(found, expected.asnumpy(), atol=2e-5)
    assert series.entries.recipe["guidance_scale"] == (2 if is_dev else None)
    assert pictures.base(lab.set("sample", guidance_scale=3.0).plan).entries.id == series.entries.id or is_dev


def test_noise_is_the_seeds_alone(trained):
    plan = trained.plan
    first, second = (pictures.Picture(number, prompt, number) for number, prompt in enumerate(PROMPTS))
    both, alone = denoise.noise(plan, [first, second]), denoise.noise(plan, [second])
    np.testing.assert_array_equal(both[1], alone[0])
    np.testing.assert_array_equal(alone, denoise.noise(plan, [pictures.Picture(0, "another", 1)]))
    assert np.abs(both[0] - both[1]).max() > 1 and both.dtype == np.float32


def test_a_picture_is_the_same_in_any_batch(trained, sampled, tmp_path):
    lab = trained.copy(tmp_path / "lab").set("sample", batch_size=2).run("SampleLatents")
    for name in ("base", "trained"):
        np.testing.assert_allclose(latents_of(lab, name), latents_of(sampled, name), atol=2e-5)


def test_a_lora_changes_pictures_and_one_without_effect_does_not(lab):
    base = latents_of(lab, "base")
    assert np.abs(latents_of(lab, "trained") - base).max() > 1e-2
    path = lab.run_folder / lora.WEIGHTS_NAME
    weights = {key: array * ("lora_A" in key) for key, array in load_file(path).items()}
    save_file(weights, path)
    lab.run("SampleLatents")
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 0, "trained": 2}
    np.testing.assert_array_equal(latents_of(lab, "trained"), base)


def test_where_clip_has_a_lora_too_its_own_output_is_sampled_with(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab").set("lora", train_text_encoder=True)
    lab.set("train", text_encoder_lr=0.1, steps=1).set("sample", num_inference_steps=1, base=False)
    lab.run("TrainLoRA", "SampleLatents")
    assert outcome(lab, "SampleLatents")["precision"].keys() >= {"transformer", "text_encoder", "lora"}
    with_clip = latents_of(lab, "trained")
    path = lab.run_folder / lora.WEIGHTS_NAME
    save_file({key: array * ("text_encoder" not in key) for key, array in load_file(path).items()}, path)
    lab.run("SampleLatents")
    assert np.abs(latents_of(lab, "trained") - with_clip).max() > 1e-4


def test_simulated_bf16_draws_rounded_velocities_under_addresses_of_its_own(sampled, tmp_path, tiny_model):
    lab = Lab(tmp_path / "lab", tiny_model, num_pictures=2).set("precision", preset="bf16", simulate=True)
    lab.set("train", steps=1).set("sample", prompts=PROMPTS[:1], num_inference_steps=3)
    lab.encode()
    lab.run("TrainLoRA", "SampleLatents", "Sample")
    plan = lab.plan
    base = pictures.base(plan)
    assert base.entries.recipe["simulated"] is True and base.entries.id != pictures.base(sampled.plan).entries.id
    found = outcome(lab, "SampleLatents")["precision"] | outcome(lab, "Sample")["precision"]
    assert {found[name]["output"] for name in ("transformer", "lora", "vae")} == {dtypes.SIMULATED}
    rounded, exact = (first_velocity(each.plan) for each in (lab, sampled))
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2e-2


def first_velocity(plan) -> np.ndarray:
    """The base's, at noise level 1, which every dtype holds exactly."""
    model, first = denoise._base(plan, train.load_frozen(plan)), list(pictures.base(plan).pictures.values())[:1]
    return denoise.velocity_of(plan, model, first)(denoise.noise(plan, first), np.float32(1))


# --- what is drawn again, and what is not -------------------------------------------------------------------------


def test_asked_twice_drawn_once(lab, monkeypatch):
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 2, "trained": 2}
    assert outcome(lab, "Sample")["decoded"] == 4
    assert lab.done("SampleLatents") and lab.done("Sample")
    before = {name: lab.record(name) for name in ("SampleLatents", "Sample")}
    monkeypatch.setattr(models, "load_model", None)
    lab.run("SampleLatents", "Sample")
    assert {name: lab.record(name) for name in before} == before


def test_records_name_what_was_drawn_with_and_what_was_decoded(sampled):
    plan = sampled.plan
    photos = plan.photos()
    ids = [each.entries.id for each in pictures.all_series(plan, photos)]
    latents, decoded = (sampled.record(name) for name in ("SampleLatents", "Sample"))
    assert latents["outputs"] == {"entries": ids} and latents["inputs"]["transformer"] == plan.transformer_digest
    assert decoded["inputs"] == {"entries": ids, "vae": plan.vae_digest}
    assert decoded["outputs"] == {"run": plan.run_id(photos)}
    assert sampled.record("TrainLoRA")["inputs"]["entries"].keys() == {"EncodeCLIP", "EncodeT5", "EncodeImages"}


def test_each_stage_loads_one_model(sampled):
    assert sampled.loaded == {"SampleLatents": ["transformer"], "Sample": ["vae"]}


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
    assert {each.name: len(each.missing()) for each in pictures.all_series(plan, plan.photos())} == drawn


def test_another_training_shares_the_bases_pictures(lab):
    plan = lab.set("train", learning_rate=0.05).plan
    with pytest.raises(UserError, match="no trained LoRA to sample with yet; run TrainLoRA"):
        lab.run("SampleLatents")
    assert not lab.done("SampleLatents") and not pictures.base(plan).missing()
    assert [need.stage for need in needs_of(lab.path)[1]].count("SampleLatents") == 1  # the base alone, until then


def test_stopped_between_batches_it_goes_on_with_what_is_missing(trained, tmp_path, monkeypatch):
    lab, denoised = trained.copy(tmp_path / "lab"), flow.denoised

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
def test_killed_it_goes_on_with_what_is_missing(trained, tmp_path):
    prompts = [f"a {colour} dog by the sea" for colour in ("red", "green", "blue", "yellow")]
    lab = trained.copy(tmp_path / "lab").set("sample", prompts=prompts, num_inference_steps=6)
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
    series = pictures.all_series(plan, plan.photos())
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
    assert found["run_id"] == plan.run_id(plan.photos()) and found["precision"]["vae"]["params"] == "fp32"
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


# --- a ControlNet -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(sampled, tmp_path_factory) -> Lab:
    """The LoRA's experiment, and a ControlNet's training for it, on edges; everything is encoded, nothing sampled."""
    lab = sampled.copy(tmp_path_factory.mktemp("guided") / "lab")
    lab.set("controlnet", condition="canny", num_double_layers=1, num_single_layers=1)
    lab.set("sample", conditions=["pictures/00000.png", "square.png"])
    draw_square(lab.folder / "square.png", 12)
    return lab.run("CheckControls", "EncodeControls", "TrainControlNet")


def draw_square(path: Path, margin: int) -> None:
    picture = Image.new("RGB", (64, 64))
    picture.paste("white", (margin, margin, 64 - margin, 64 - margin))
    picture.save(path)
    os.utime(path, (time.time() - 3600,) * 2)


def guided_plan(lab: Lab):
    return recipes.resolve(lab.experiment, CONTROLNET)


def guided_folder(lab: Lab) -> Path:
    plan = guided_plan(lab)
    return plan.run_folder(plan.photos())


def test_a_controlnets_pictures_follow_their_conditions(guided, tmp_path):
    lab = guided.copy(tmp_path / "lab").run("CheckControls")
    assert lab.done("CheckControls") and lab.done("EncodeControls") and lab.done("TrainControlNet")
    lab.run("SampleControlNetLatents", "SampleControlNet")
    record = json.loads((guided_folder(lab) / "records/SampleControlNetLatents.json").read_text())["outcome"]
    assert record["pictures"] == {"base": 0, "trained": 2}  # the base is what a LoRA is compared with
    listing = json.loads((guided_folder(lab) / "samples.json").read_text())
    edges = np.asarray(Image.open(guided_folder(lab) / listing["pictures"][1]["condition"]))
    assert edges.shape == (32, 32, 3) and set(np.unique(edges)) == {0, 255}  # computed, as in training
    plan, folder = guided_plan(lab), guided_folder(lab)
    before = pictures.trained(plan, plan.photos())
    draw_square(lab.folder / "square.png", 24)
    assert not lab.done("CheckControls") and lab.done("TrainControlNet")
    lab.run("CheckControls", "EncodeControls", "SampleControlNetLatents", "SampleControlNet")
    assert guided_folder(lab) == folder and lab.done("SampleControlNet")
    record = json.loads((folder / "records/SampleControlNetLatents.json").read_text())["outcome"]
    assert record["pictures"] == {"base": 0, "trained": 1}
    plan = guided_plan(lab)
    after = pictures.trained(plan, plan.photos())
    changed = [each.entries.read(list(each.pictures)[1]) for each in (before, after)]
    assert np.abs(changed[0] - changed[1]).max() > 1e-6


def test_without_a_scale_a_controlnets_pictures_are_the_bases(guided):
    plan = guided_plan(guided)
    frozen = train.load_frozen(plan)
    model = denoise._with_controlnet(plan, plan.photos(), frozen, guided_folder(guided))
    transformer = frozen[lora.TRANSFORMER]
    network = models.load_model(guided_folder(guided) / controlnet.FOLDER, checkpoints.CONTROLNET, "fp32")
    several = list(pictures.base(plan).pictures.values())
    noise, sigmas = denoise.noise(plan, several), denoise.noise_levels(plan)

    def drawn(predict, trained):
        one = denoise.Model(predict, model.configs, frozen, trained, model.pooled)
        return flow.denoised(noise, sigmas, denoise.velocity_of(plan, one, several))

    base = drawn(prediction(transformer), {})
    silent = drawn(prediction(transformer, controlnet=network, conditioning_scale=0.0), model.trained)
    heard = drawn(model.predict, model.trained)
    np.testing.assert_allclose(silent, base, atol=1e-6)
    assert np.abs(heard - base).max() > 1e-4


def test_a_new_condition_leaves_the_training_as_it_is(guided, tmp_path):
    lab = guided.copy(tmp_path / "lab")
    folder = guided_folder(lab)
    lab.set("sample", conditions=["square.png", "pictures/00000.png"])
    assert guided_folder(lab) == folder and lab.done("TrainControlNet") and lab.done("EncodeControls")
    lab.set("sample", resolution=48)
    assert guided_folder(lab) == folder and lab.done("TrainControlNet") and not lab.done("EncodeControls")


# --- what cannot be sampled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ('prompts = "a cat"', "sample.prompts: must be a list of texts, found 'a cat'"),
        ('prompts = ["a", 1]', "sample.prompts: must be a list of texts"),
        ('prompts = ["a\\u0000"]', "sample.prompts: must not hold a null character"),
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


def test_without_prompts_or_conditions_sampling_says_so_and_loads_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    lab = trained.copy(tmp_path / "lab").set("sample", prompts=[])
    for name in ("SampleLatents", "Sample"):
        assert not lab.done(name)
        with pytest.raises(UserError, match="sample.prompts: nothing to sample"):
            lab.run(name)
    with pytest.raises(UserError, match="a ControlNet needs an image file for each prompt"):
        pictures.check(lab.set("sample", prompts=PROMPTS).experiment, CONTROLNET)


def test_conditions_that_are_missing_or_damaged_are_said_before_anything_is_encoded(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab").set("controlnet", condition="canny")
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
        decode.decode(lab.plan, lab.plan.photos(), lab.run_folder)
