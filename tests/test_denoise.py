"""Sampling's arithmetic, against mindone's own pipeline; and what a LoRA and a ControlNet change."""

import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import PROMPTS, latents_of, outcome
from lab import Lab
from PIL import Image
from safetensors.numpy import load_file, save_file

from cache import caption_item, digest
from cache.terminal.words import human_bytes
from pipeline.devices import dtypes
from pipeline.errors import UserError
from pipeline.flux import flow, models, noise_levels, pretrained, tiny
from pipeline.flux.prediction import prediction
from pipeline.methods import CONTROLNET
from pipeline.methods import controlnet_model as controlnet
from pipeline.methods import lora_layers as lora
from pipeline.plan import mode, pictures
from pipeline.plan.method import untrained
from pipeline.plan.plan import resolve
from pipeline.sampling import denoise

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def lab(lora_sampled, tmp_path) -> Lab:
    return lora_sampled.copy(tmp_path / "lab")


# --- arithmetic ---------------------------------------------------------------------------------------------------


DEV = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
SCHNELL = {"use_dynamic_shifting": False, "shift": 1.0}
STATIC = {"use_dynamic_shifting": False, "shift": 3.0}


@pytest.mark.parametrize("settings", [DEV, SCHNELL, STATIC], ids=["dev", "schnell", "static"])
@pytest.mark.parametrize("num_steps, num_tokens", [(1, 4), (4, 256), (28, 4096)])
def test_noise_levels_are_those_that_flux_pipeline_asks_the_scheduler_for(tmp_path, settings, num_steps, num_tokens):
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler
    from mindone.diffusers.pipelines.flux.pipeline_flux import calculate_shift

    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
    found = noise_levels.inference_sigmas(tmp_path, num_steps, num_tokens)
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
        noise_levels.inference_sigmas(tmp_path, 2, 4)


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


@pytest.mark.parametrize(
    ("is_dev", "asked"),
    [
        pytest.param(True, "jit", id="dev, compiled"),
        pytest.param(True, "pynative", id="dev", marks=pytest.mark.slow),
        pytest.param(False, "auto", id="schnell", marks=pytest.mark.slow),
    ],
)
def test_final_latents_are_those_of_mindones_flux_pipeline(tmp_path, tiny_model, is_dev, asked):
    import mindspore as ms
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    folder = tiny_model if is_dev else tiny.write_tiny_model(tmp_path / "schnell", guidance_embeds=False)
    lab = Lab(tmp_path / "lab", folder, num_pictures=1).set("data", resolution=48)
    lab.set("sample", prompts=PROMPTS, num_inference_steps=4, guidance_scale=2.0, seed=7, mode=asked, batch_size=2)
    lab.encode()
    plan = lab.plan
    series, frozen = pictures.base(plan), plan.load_frozen()
    transformer, several = frozen[lora.TRANSFORMER], list(series.pictures.values())
    chosen = denoise.draw(plan, untrained(plan, frozen), plan.pooled.read_many, series, series.missing())
    assert chosen == ("jit" if asked == "jit" else "pynative")  # four predictions do not repay compiling
    settings = pretrained.config(folder, "scheduler")
    vae = models.load_model(folder, "vae", "fp32")
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler.from_config(settings), vae, None, None, None, None, transformer
    )
    captions = [caption_item(prompt) for prompt in PROMPTS]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=ms.Tensor(plan.txt.read_many(captions)),
        pooled_prompt_embeds=ms.Tensor(plan.pooled.read_many(captions)),
        latents=ms.Tensor(denoise.noise(plan, series.drawing, several)),
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


def test_predictions_are_compiled_where_that_is_repaid_and_there_is_room():
    choose = functools.partial(mode.choose_for_drawing, memory_bytes=8 * 10**9)
    assert choose("CPU", "auto", 40, 10**9)[0] == "jit"
    assert choose("CPU", "auto", 39, 10**9) == (
        "pynative",
        "as compiling is repaid by about 40 predictions, and there are 39",
    )
    assert choose("CPU", "auto", 40, 2 * 10**9) == (
        "pynative",
        f"as compiled it would take {human_bytes(2 * 10**9)} more",
    )
    assert choose("CPU", "jit", 1, 10**12)[0] == "jit" and choose("CPU", "pynative", 10**6, 1)[0] == "pynative"
    assert choose("Ascend", "auto", 10**6, 1)[0] == "pynative"  # nobody has measured it


def test_batches_are_of_one_size_and_few():
    assert denoise.in_batches(list("abcdefg"), 3) == [list("abc"), list("def"), list("ggg")]
    assert denoise.in_batches(list("abcdef"), 4) == [list("abc"), list("def")]
    assert denoise.in_batches(list("ab"), 8) == [list("ab")]
    for number in range(1, 40):
        for most in range(1, 12):
            batches = denoise.in_batches([str(item) for item in range(number)], most)
            assert len(batches) == -(-number // most) and len({len(batch) for batch in batches}) == 1 <= most
            assert [*dict.fromkeys(item for batch in batches for item in batch)] == [str(i) for i in range(number)]


def test_noise_is_the_seeds_alone(lora_trained):
    plan = lora_trained.plan
    first, second = (pictures.Picture(number, prompt, number) for number, prompt in enumerate(PROMPTS))
    drawing = pictures.drawing(plan)
    both, alone = denoise.noise(plan, drawing, [first, second]), denoise.noise(plan, drawing, [second])
    np.testing.assert_array_equal(both[1], alone[0])
    np.testing.assert_array_equal(alone, denoise.noise(plan, drawing, [pictures.Picture(0, "another", 1)]))
    assert np.abs(both[0] - both[1]).max() > 1 and both.dtype == np.float32


def test_a_picture_is_the_same_in_any_batch(lora_trained, lora_sampled, tmp_path):
    lab = lora_trained.copy(tmp_path / "lab").set("sample", batch_size=2).run("SampleLatents")
    for name in ("base", "trained"):
        np.testing.assert_allclose(latents_of(lab, name), latents_of(lora_sampled, name), atol=2e-5)


def test_a_lora_changes_pictures_and_one_without_effect_does_not(lab):
    base = latents_of(lab, "base")
    assert np.abs(latents_of(lab, "trained") - base).max() > 1e-2
    path = lab.run_folder / lora.WEIGHTS_NAME
    weights = {key: array * ("lora_A" in key) for key, array in load_file(path).items()}
    save_file(weights, path)
    lab.run("SampleLatents")
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 0, "trained": 2}
    np.testing.assert_array_equal(latents_of(lab, "trained"), base)


def test_a_lora_is_drawn_at_the_strength_that_its_file_declares_and_under_the_address_it_always_had(lab):
    """Older versions declared alpha and left lora_B as trained; a factor of 4 and back changes no bit."""
    expected, path = latents_of(lab, "trained"), lab.run_folder / lora.WEIGHTS_NAME
    weights = {key: array * (4 if "lora_B" in key else 1) for key, array in load_file(path).items()}
    declared = {"transformer.r": 4, "transformer.lora_alpha": 1}
    save_file(weights, path, {"lora_adapter_metadata": json.dumps(declared)})
    lab.run("SampleLatents")
    assert outcome(lab, "SampleLatents")["pictures"] == {"base": 0, "trained": 2}
    np.testing.assert_array_equal(latents_of(lab, "trained"), expected)
    recipe = pictures.trained(lab.plan).entries.recipe["lora"]
    assert recipe == {"weights": digest(path.read_bytes()), "scale": 0.25, "params": "fp32", "compute": "fp32"}


def test_where_clip_has_a_lora_too_its_own_output_is_sampled_with(lora_trained, tmp_path):
    lab = lora_trained.copy(tmp_path / "lab").set("lora", train_text_encoder=True)
    lab.set("train", text_encoder_lr=0.1, steps=1).set("sample", num_inference_steps=1, base=False)
    lab.run("TrainLoRA", "SampleLatents")
    assert outcome(lab, "SampleLatents")["precision"].keys() >= {"transformer", "text_encoder", "lora"}
    with_clip = latents_of(lab, "trained")
    path = lab.run_folder / lora.WEIGHTS_NAME
    save_file({key: array * ("text_encoder" not in key) for key, array in load_file(path).items()}, path)
    lab.run("SampleLatents")
    assert np.abs(latents_of(lab, "trained") - with_clip).max() > 1e-4


def test_simulated_bf16_draws_rounded_velocities_under_addresses_of_its_own(lora_sampled, tmp_path, tiny_model):
    lab = Lab(tmp_path / "lab", tiny_model, num_pictures=2).set("precision", preset="bf16", simulate=True)
    lab.set("train", steps=1).set("sample", prompts=PROMPTS[:1], num_inference_steps=3)
    lab.encode()
    lab.run("TrainLoRA", "SampleLatents", "Sample")
    plan = lab.plan
    base = pictures.base(plan)
    assert base.entries.recipe["simulated"] is True and base.entries.id != pictures.base(lora_sampled.plan).entries.id
    found = outcome(lab, "SampleLatents")["precision"] | outcome(lab, "Sample")["precision"]
    assert {found[name]["output"] for name in ("transformer", "lora", "vae")} == {dtypes.SIMULATED}
    rounded, exact = (first_velocity(each.plan) for each in (lab, lora_sampled))
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2e-2


def first_velocity(plan) -> np.ndarray:
    """The base's, at noise level 1, which every dtype holds exactly."""
    model, first = untrained(plan, plan.load_frozen()), list(pictures.base(plan).pictures.values())[:1]
    velocity = denoise.velocity_of(plan, pictures.drawing(plan), model, plan.pooled.read_many, first)
    return velocity(denoise.noise(plan, pictures.drawing(plan), first), np.float32(1))


# --- a ControlNet -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(lora_sampled, tmp_path_factory) -> Lab:
    """The LoRA's experiment, and a ControlNet's training for it, on edges; everything is encoded, nothing sampled."""
    lab = lora_sampled.copy(tmp_path_factory.mktemp("guided") / "lab")
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
    return resolve(lab.experiment, CONTROLNET)


def guided_folder(lab: Lab) -> Path:
    plan = guided_plan(lab)
    return plan.run.path


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
    before = pictures.trained(plan)
    draw_square(lab.folder / "square.png", 24)
    assert not lab.done("CheckControls") and lab.done("TrainControlNet")
    lab.run("CheckControls", "EncodeControls", "SampleControlNetLatents", "SampleControlNet")
    assert guided_folder(lab) == folder and lab.done("SampleControlNet")
    record = json.loads((folder / "records/SampleControlNetLatents.json").read_text())["outcome"]
    assert record["pictures"] == {"base": 0, "trained": 1}
    plan = guided_plan(lab)
    after = pictures.trained(plan)
    changed = [each.entries.read(list(each.pictures)[1]) for each in (before, after)]
    assert np.abs(changed[0] - changed[1]).max() > 1e-6


def test_without_a_scale_a_controlnets_pictures_are_the_bases(guided):
    plan = guided_plan(guided)
    frozen = plan.load_frozen()
    model, transformer = plan.method.load(plan, frozen, plan.run.path), frozen[lora.TRANSFORMER]
    network = models.load_model(guided_folder(guided) / controlnet.FOLDER, pretrained.CONTROLNET, "fp32")
    several = list(pictures.base(plan).pictures.values())
    drawing = pictures.drawing(plan)
    noise, sigmas = denoise.noise(plan, drawing, several), denoise.noise_levels(plan, drawing)

    def drawn(predict, trained):
        one = dataclasses.replace(model, predict=predict, trained=trained)
        return flow.denoised(noise, sigmas, denoise.velocity_of(plan, drawing, one, plan.pooled.read_many, several))

    base = drawn(prediction(transformer), [])
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
