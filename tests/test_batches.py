"""The training recipe, recomputed in NumPy from the store's entries and the checkpoint's configs: batches, loss, LoRA.

No number here comes from `pipeline.training.batches`, `pipeline.flow` or mindone's scheduler, which are what is tested.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
from lab import Lab

from cache import Entries, caption_item, digest
from pipeline import draws, models
from pipeline.data.conditions import FILE
from pipeline.data.variants import Variant
from pipeline.draws import Purpose
from pipeline.networks import lora
from pipeline.recipes import Plan, resolve
from pipeline.settings import Lora
from pipeline.training import loop, measure, metrics
from pipeline.training.batches import Batch, Batches
from pipeline.training.loss import flow_loss, item_loss, tensors_of
from pipeline.training.order import Order

pytestmark = pytest.mark.usefixtures("cpu")

SEED = 11
CAPTIONS = (
    "a photo of a red cat",
    "a painting of a blue boat by the sea",
    "a drawing of a green tree in the snow",
    "a portrait of a white dog",
    "an old picture of a yellow car on a street",
)
NUM_PHOTOS, BATCH_SIZE, NUM_ROWS, TEXT_LENGTH = len(CAPTIONS), 3, 3, 12
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def lab(cpu, tiny_model, tmp_path_factory) -> Lab:
    """Five photos, five captions, encoded; shared by all tests: copy it before changing a byte."""
    lab = Lab(tmp_path_factory.mktemp("batches") / "lab", tiny_model, num_pictures=NUM_PHOTOS)
    lab.set("data", resolution=16 * NUM_ROWS, max_sequence_length=TEXT_LENGTH).set("train", batch_size=BATCH_SIZE)
    lab.write_captions([row | {"text": text} for row, text in zip(lab.captions(), CAPTIONS)])
    lab.settle()
    assert lab.encode() == dict.fromkeys(("EncodeCLIP", "EncodeT5", "EncodeImages"), NUM_PHOTOS)
    return lab


@pytest.fixture(scope="module")
def base(lab):
    """The transformer without LoRA."""
    return models.load_model(lab.model, "transformer", "fp32")


@pytest.fixture(scope="module")
def schnell(cpu, tmp_path_factory):
    """A checkpoint in FLUX.1-schnell's format, with the encoders of the lab's."""
    from pipeline.synthetic import tiny

    return tiny.write_tiny_model(tmp_path_factory.mktemp("schnell") / "model", guidance_embeds=False)


def plan_of(lab: Lab, seed: int = SEED, **tables) -> Plan:
    """The lab's plan with another seed and other settings, by table."""
    experiment = lab.experiment
    changed = {name: dataclasses.replace(getattr(experiment, name), **values) for name, values in tables.items()}
    return resolve(dataclasses.replace(experiment, seed=seed, **changed))


def batches_of(plan: Plan) -> Batches:
    return Batches(plan, plan.photos())


def a_batch(lab: Lab) -> Batch:
    return batches_of(plan_of(lab)).training(0)


def assert_same(found: Batch, expected: Batch) -> None:
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


# --- the recipe, written again ------------------------------------------------------------------------------------


def pairs_of(lab: Lab) -> list[tuple[str, str]]:
    """(address of the photo, its caption), in the order that content gives."""
    rows = lab.captions()
    return sorted((digest((lab.pictures / row["file_name"]).read_bytes()), row["text"]) for row in rows)


def packed(latents: np.ndarray) -> np.ndarray:
    """(channels, height, width) to (tokens, 4 * channels): patches of 2 x 2 in reading order, channel by channel."""
    channels, height, width = latents.shape
    corners = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    offsets = [(channel, y, x) for channel in range(channels) for y in (0, 1) for x in (0, 1)]
    return np.array([[latents[c, row + y, column + x] for c, y, x in offsets] for row, column in corners])


def latents_of(lab: Lab, posterior: np.ndarray, eps: np.ndarray | float = 0.0) -> np.ndarray:
    """The transformer's latents, packed, from the VAE's posterior, whose mean they are where ``eps`` is 0."""
    vae = json.loads((lab.model / "vae" / "config.json").read_text())
    mean, log_variance = np.split(posterior.astype(np.float64), 2)
    return packed((mean + np.exp(0.5 * log_variance) * eps - vae["shift_factor"]) * vae["scaling_factor"])


def entries_of(plan: Plan) -> Entries:
    """The latents of every photo's only variant."""
    return plan.latents(Variant(16 * NUM_ROWS, 16 * NUM_ROWS))


def modes_of(lab: Lab, plan: Plan) -> np.ndarray:
    """The latents of every photo without sampling, (photos, tokens, channels), ordered as `pairs_of`."""
    return np.stack([latents_of(lab, entries_of(plan).read(photo)) for photo, _ in pairs_of(lab)])


def schedule(shift: float) -> np.ndarray:
    """Noise levels from 1 to 1/1000; ``shift`` moves them towards noise (arXiv:2403.03206, equation 23)."""
    sigma = (1000 - np.arange(1000)) / 1000
    return shift * sigma / (1 + (shift - 1) * sigma)


def recomputed(lab: Lab, plan: Plan, step: int) -> dict[str, np.ndarray]:
    """The batch of a training step, in float64; the checkpoint is in FLUX.1-dev's format, so that no shift applies."""
    settings, seed, pairs, entries = plan.experiment.train, plan.experiment.seed, pairs_of(lab), entries_of(plan)
    channels, height, width = entries.shape
    shape = (settings.batch_size, channels // 2, height, width)
    chosen = [pairs[index] for index in Order(seed, [0] * len(pairs), settings.batch_size).batch(step)]
    eps = draws.normal(seed, Purpose.POSTERIOR, step, shape) * (settings.posterior == "sample")
    latents = np.stack([latents_of(lab, entries.read(photo), e) for (photo, _), e in zip(chosen, eps)])
    noise = np.stack([packed(item) for item in draws.normal(seed, Purpose.NOISE, step, shape).astype(np.float64)])
    levels = np.floor(draws.generator(seed, Purpose.SIGMA, step).random(settings.batch_size) * 1000).astype(int)
    sigma = schedule(shift=1)[levels]
    return {
        "x": (1 - sigma)[:, None, None] * latents + sigma[:, None, None] * noise,
        "target": noise - latents,
        "txt": np.stack([plan.txt.read(caption_item(caption)) for _, caption in chosen]),
        "pooled": np.stack([plan.pooled.read(caption_item(caption)) for _, caption in chosen]),
        "timestep": sigma,
        "img_ids": np.array([[0, row, column] for row in range(height // 2) for column in range(width // 2)]),
        "txt_ids": np.zeros((plan.txt.shape[0], 3)),
        "weight": np.ones(settings.batch_size),
    }


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_a_batch_is_what_the_recipe_gives(lab, posterior):
    plan = plan_of(lab, train={"posterior": posterior})
    batches = batches_of(plan)
    for step in (0, 1, 7):
        batch, expected = batches.training(step), recomputed(lab, plan, step)
        assert vars(batch).keys() - {"control"} == expected.keys() and batch.control is None
        for name, value in expected.items():
            found = getattr(batch, name)
            assert found.dtype == np.float32 and found.shape == value.shape, name
            np.testing.assert_allclose(found, value, err_msg=f"{name} of step {step}", **CLOSE)


# --- what holds of every batch, whatever was drawn ----------------------------------------------------------------


def origin(batch: Batch, modes: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Which photo each item of a batch in mode "mode" comes from, its noise level and its noise.

    x = latents + sigma * target: only for the right photo is x - latents a multiple of the target, namely sigma.
    """
    photos, sigmas = [], []
    for x, target in zip(batch.x.astype(np.float64), batch.target.astype(np.float64)):
        candidates = [(x - latents, ((x - latents) * target).sum() / (target**2).sum()) for latents in modes]
        errors = [np.abs(path - sigma * target).max() for path, sigma in candidates]
        photo = int(np.argmin(errors))
        assert errors[photo] < 1e-5 < 1e-2 < np.sort(errors)[1], "no photo's latents, or several, lie on the path"
        photos.append(photo)
        sigmas.append(candidates[photo][1])
    return photos, np.array(sigmas), batch.target + modes[photos]


@pytest.fixture(scope="module")
def seen(lab) -> dict:
    """Some batches of training and of evaluation, in mode "mode", each with its `origin`."""
    plan = plan_of(lab, train={"posterior": "mode"})
    batches, modes = batches_of(plan), modes_of(lab, plan)
    found = {
        "training": [batches.training(step) for step in range(2 * NUM_PHOTOS)],
        "evaluation": [batches.evaluation(index, 4) for index in range(NUM_PHOTOS)],
    }
    return {kind: [(batch, *origin(batch, modes)) for batch in made] for kind, made in found.items()}


KINDS = pytest.mark.parametrize("kind", ["training", "evaluation"])


@KINDS
def test_each_item_is_noised_with_the_sigma_of_its_own_timestep(seen, kind):
    for batch, _, sigmas, _ in seen[kind]:
        np.testing.assert_allclose(batch.timestep, sigmas, **CLOSE)
        assert ((batch.timestep > 0) & (batch.timestep <= 1)).all()


@KINDS
def test_each_item_has_the_prompt_of_its_own_photo(lab, seen, kind):
    plan, pairs = plan_of(lab), pairs_of(lab)
    for batch, photos, _, _ in seen[kind]:
        for photo, txt, pooled in zip(photos, batch.txt, batch.pooled):
            item = caption_item(pairs[photo][1])
            np.testing.assert_array_equal(txt, plan.txt.read(item))
            np.testing.assert_array_equal(pooled, plan.pooled.read(item))
    for entries in (plan.txt, plan.pooled):  # or else the above shows nothing
        values = np.stack([entries.read(caption_item(caption)) for caption in CAPTIONS]).reshape(NUM_PHOTOS, -1)
        assert len(np.unique(values, axis=0)) == NUM_PHOTOS


@KINDS
def test_each_item_has_standard_normal_noise_and_a_sigma_of_its_own(seen, kind):
    noise = np.concatenate([noise for *_, noise in seen[kind]]).reshape(-1, 4 * 16 * NUM_ROWS**2)
    sigmas = np.concatenate([sigmas for _, _, sigmas, _ in seen[kind]])
    assert len(np.unique(np.round(sigmas * 1000))) > 0.9 * len(sigmas)
    assert abs(noise.mean()) < 5 / noise.size**0.5 and abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5
    between = np.corrcoef(noise)[np.triu_indices(len(noise), 1)]
    assert np.abs(between).max() < 5 / noise.shape[1] ** 0.5
    assert abs(np.corrcoef(sigmas, noise[:, 0])[0, 1]) < 5 / len(sigmas) ** 0.5


@KINDS
def test_every_photo_comes_once_in_each_round(seen, kind):
    photos = np.concatenate([photos for _, photos, _, _ in seen[kind]]).reshape(-1, NUM_PHOTOS)
    np.testing.assert_array_equal(np.sort(photos, axis=1), np.tile(np.arange(NUM_PHOTOS), (len(photos), 1)))


def test_evaluation_shares_no_noise_with_training(seen):
    noises = [np.concatenate([noise for *_, noise in seen[kind]]) for kind in ("training", "evaluation")]
    both = np.concatenate(noises).reshape(-1, noises[0][0].size)
    between = np.corrcoef(both)[: len(noises[0]), len(noises[0]) :]
    assert np.abs(between).max() < 5 / both.shape[1] ** 0.5


def test_the_same_step_is_the_same_batch_at_any_time(lab):
    plan = plan_of(lab)
    first, later = batches_of(plan), batches_of(plan)
    later.evaluation(0, 2)
    backwards = [later.training(step) for step in (3, 2, 1, 0)]
    for step, again in zip(range(4), reversed(backwards)):
        assert_same(first.training(step), again)
    assert_same(first.evaluation(2, 4), later.evaluation(2, 4))


def test_another_seed_is_another_batch(lab):
    batches = {seed: [batches_of(plan_of(lab, seed)).training(step) for step in range(2)] for seed in (SEED, 12, 0)}
    first = [batch for made in batches.values() for batch in made]
    for name in ("x", "target", "timestep"):
        assert len({getattr(batch, name).tobytes() for batch in first}) == len(first), name


def test_a_step_does_not_depend_on_how_long_training_is(lab):
    short, long = plan_of(lab, train={"steps": 1}), plan_of(lab, train={"steps": 1000, "learning_rate": 1.0})
    assert_same(batches_of(short).training(0), batches_of(long).training(0))


def test_renaming_the_photos_changes_neither_the_run_nor_its_batches(lab, tmp_path):
    renamed = lab.copy(tmp_path / "lab")
    rows = renamed.captions()
    for number, row in enumerate(rows):
        (renamed.pictures / row["file_name"]).rename(renamed.pictures / f"{chr(ord('z') - number)}.png")
        row["file_name"] = f"{chr(ord('z') - number)}.png"
    renamed.write_captions(rows[::-1])
    renamed.settle()
    plan, other = plan_of(lab), plan_of(renamed)
    assert [photo.name for photo in plan.photos()] != [photo.name for photo in other.photos()]
    assert other.run_id(other.photos()) == plan.run_id(plan.photos())
    for step in range(3):
        assert_same(batches_of(other).training(step), batches_of(plan).training(step))


# --- latents ------------------------------------------------------------------------------------------------------


def clean(batch: Batch) -> np.ndarray:
    """The latents at sigma 0, of any batch: back from x along the target."""
    return batch.x.astype(np.float64) - batch.timestep.astype(np.float64)[:, None, None] * batch.target


def test_sampling_adds_the_posteriors_deviation_times_noise_of_its_own(lab):
    sampled, mode = (plan_of(lab, train={"posterior": posterior}) for posterior in ("sample", "mode"))
    scale = json.loads((lab.model / "vae" / "config.json").read_text())["scaling_factor"]
    modes, pairs = modes_of(lab, mode), pairs_of(lab)

    def eps_of(batch, at_mode):
        np.testing.assert_array_equal(batch.timestep, at_mode.timestep)
        photos, *_ = origin(at_mode, modes)
        log_variances = [entries_of(mode).read(pairs[photo][0])[16:].astype(np.float64) for photo in photos]
        deviations = np.stack([packed(np.exp(0.5 * log_variance)) for log_variance in log_variances])
        return (clean(batch) - clean(at_mode)) / scale / deviations

    sampling, at_mode = batches_of(sampled), batches_of(mode)
    for step in (2, 3):
        found = eps_of(sampling.training(step), at_mode.training(step))
        drawn = draws.normal(SEED, Purpose.POSTERIOR, step, (BATCH_SIZE, 16, 2 * NUM_ROWS, 2 * NUM_ROWS))
        np.testing.assert_allclose(found, np.stack([packed(eps) for eps in drawn]), atol=2e-3)
    evaluated = [eps_of(sampling.evaluation(index, 2), at_mode.evaluation(index, 2)) for index in range(2)]
    eps = np.concatenate(evaluated).reshape(4, -1)
    assert abs(eps.var() - 1) < 5 * (2 / eps.size) ** 0.5
    assert np.abs(np.corrcoef(eps)[np.triu_indices(4, 1)]).max() < 5 / eps.shape[1] ** 0.5


@pytest.mark.parametrize("shift_factor, scaling_factor", [(0.5, 2.0), (0.0, 0.25)])
def test_latents_are_shifted_then_scaled_as_the_vaes_config_says(lab, tmp_path, shift_factor, scaling_factor):
    other = lab.copy(tmp_path / "lab", own_model=True)
    edit(other.model / "vae" / "config.json", shift_factor=shift_factor, scaling_factor=scaling_factor)
    other.encode()
    plan = plan_of(other, train={"posterior": "mode"})
    batch, pairs = batches_of(plan).training(0), pairs_of(other)
    for latents, index in zip(clean(batch), Order(SEED, [0] * NUM_PHOTOS, BATCH_SIZE).batch(0)):
        mean = entries_of(plan).read(pairs[index][0])[:16].astype(np.float64)
        np.testing.assert_allclose(latents, packed(mean - shift_factor) * scaling_factor, **CLOSE)


def edit(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_grid_that_is_not_square_is_packed_row_by_row_in_float32(lab):
    """Latents of 4 x 6, kept in half, whose values say where they come from."""
    plan = plan_of(lab, train={"posterior": "mode"})
    square = Variant(16 * NUM_ROWS, 16 * NUM_ROWS)
    entries = plan.store.entries(plan.latents(square).recipe | {"width": 48, "shape": [32, 4, 6], "dtype": "float16"})
    place = np.arange(32 * 4 * 6, dtype=np.float16).reshape(32, 4, 6) / 4
    with entries.writer() as writer:
        for number, (photo, _) in enumerate(pairs_of(lab)):
            writer.write(photo, place + np.float16(number))
    vars(plan)["_latents"] = {(square, FILE): entries}
    batch = batches_of(plan).training(0)
    assert batch.img_ids.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert batch.txt_ids.tolist() == [[0, 0, 0]] * TEXT_LENGTH
    for latents, index in zip(clean(batch), Order(SEED, [0] * NUM_PHOTOS, BATCH_SIZE).batch(0)):
        np.testing.assert_allclose(latents, latents_of(lab, entries.read(pairs_of(lab)[index][0])), atol=1e-4)
    assert {value.dtype for value in vars(batch).values() if value is not None} == {np.dtype(np.float32)}


# --- the schedule -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["dev", "schnell", "shift 3"])
def scheduled(request, lab, tmp_path) -> tuple[Lab, float]:
    """A lab and the shift that its checkpoint asks for; dev's, which depends on the image, is for sampling only."""
    if request.param == "dev":
        return lab, 1.0
    other = lab.copy(tmp_path / "lab", own_model=True)
    if request.param == "schnell":
        schnell = request.getfixturevalue("schnell")
        other.model = schnell
        other.set("model", path=str(schnell)).settle()
        return other, 1.0
    edit(other.model / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=3.0)
    return other, 3.0


def test_sigmas_are_uniform_over_the_schedulers_own(scheduled):
    lab, shift = scheduled
    number = 500
    plan = plan_of(lab, train={"batch_size": number, "posterior": "mode"})
    batch = batches_of(plan).training(0)
    levels = schedule(shift)
    nearest = np.abs(batch.timestep[:, None] - levels).argmin(axis=1)
    np.testing.assert_allclose(batch.timestep, levels[nearest], rtol=1e-6)
    np.testing.assert_array_equal(nearest, np.floor(draws.generator(SEED, Purpose.SIGMA, 0).random(number) * 1000))
    distance = np.abs(np.sort(nearest) / 1000 - np.arange(number) / number).max()
    assert distance < 1.63 / number**0.5 + 1e-3  # Kolmogorov's distance, which chance exceeds in 1 of 100
    _, sigmas, _ = origin(batch, modes_of(lab, plan))
    np.testing.assert_allclose(sigmas, batch.timestep, **CLOSE)


# --- from batch to tensors ----------------------------------------------------------------------------------------

POLICIES = {"fp32": np.float32, "fp16": np.float16}
ARGUMENTS = ("x", "target", "txt", "pooled", "timestep", "img_ids", "txt_ids", "weight", "guidance")


def tensors(plan: Plan, transformer, batch: Batch) -> dict:
    return dict(zip(ARGUMENTS, tensors_of(plan, transformer)(batch), strict=True))


@pytest.mark.parametrize("compute", POLICIES)
def test_inputs_are_in_the_transformers_dtype_and_the_target_in_float32(lab, base, compute):
    plan = plan_of(lab, precision={"transformer": {"params": compute, "compute": compute}})
    batch, dtype = a_batch(lab), POLICIES[compute]
    found = {name: tensor.asnumpy() for name, tensor in tensors(plan, base, batch).items()}
    for name in ("x", "txt", "pooled", "timestep"):
        assert found[name].dtype == dtype, name
        np.testing.assert_array_equal(found[name], getattr(batch, name).astype(dtype))
    for name in ("target", "img_ids", "txt_ids", "weight"):
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], getattr(batch, name))
    assert found["guidance"].dtype == dtype


@pytest.mark.parametrize("compute", POLICIES)
@pytest.mark.parametrize("train_settings, scale", [({}, 3.5), ({"guidance_scale": 1.0}, 1), ({"guidance_scale": 7}, 7)])
def test_guidance_is_the_guidance_scale_for_each_item(lab, base, compute, train_settings, scale):
    plan = plan_of(lab, train=train_settings, precision={"transformer": {"params": compute, "compute": compute}})
    guidance = tensors(plan, base, a_batch(lab))["guidance"].asnumpy()
    assert guidance.tolist() == [scale] * BATCH_SIZE and guidance.dtype == POLICIES[compute]


def test_a_checkpoint_without_guidance_gets_none(lab, schnell):
    transformer = models.load_model(schnell, "transformer", "fp32")
    found = tensors(plan_of(lab), transformer, a_batch(lab))
    assert found["guidance"] is None
    assert np.isfinite(flow_loss(transformer)(*found.values()).asnumpy())


# --- the loss -----------------------------------------------------------------------------------------------------


def predicted(transformer, values: dict, guidance: float) -> np.ndarray:
    """The model's velocity for arrays or tensors by our names, each given under the model's own name."""
    import mindspore as ms

    own_names = {
        "x": "hidden_states",
        "txt": "encoder_hidden_states",
        "pooled": "pooled_projections",
        "timestep": "timestep",
        "img_ids": "img_ids",
        "txt_ids": "txt_ids",
    }
    inputs = {own: ms.Tensor(np.asarray(values[name], np.float32)) for name, own in own_names.items()}
    inputs["guidance"] = ms.Tensor(np.full(len(values["x"]), guidance, np.float32))
    return transformer(**inputs)[0].asnumpy().astype(np.float64)


def test_the_loss_is_the_mean_squared_error_of_the_models_prediction(lab, base):
    plan = plan_of(lab)
    for step in range(2):
        batch = batches_of(plan).training(step)
        squares = (predicted(base, vars(batch), guidance=3.5) - batch.target) ** 2
        arguments = tuple(tensors(plan, base, batch).values())
        loss, items = flow_loss(base)(*arguments), item_loss(base)(*arguments).asnumpy()
        assert loss.asnumpy() == pytest.approx(squares.mean(), rel=1e-5) and loss.asnumpy().dtype == np.float32
        np.testing.assert_allclose(items, squares.mean(axis=(1, 2)), rtol=1e-5)
        assert items.mean() == pytest.approx(squares.mean(), rel=1e-5)
        assert squares.mean() > 0.1


def test_the_error_of_a_half_precision_prediction_is_taken_in_float32(lab):
    transformer = models.load_model(lab.model, "transformer", "fp16")
    plan = plan_of(lab, precision={"transformer": {"params": "fp16", "compute": "fp16"}})
    arguments = tensors(plan, transformer, a_batch(lab))
    inputs = [arguments[name] for name in ("x", "txt", "pooled", "timestep", "img_ids", "txt_ids", "guidance")]
    prediction = transformer(*inputs)[0].asnumpy()
    assert prediction.dtype == np.float16
    expected = ((prediction.astype(np.float64) - arguments["target"].asnumpy()) ** 2).mean()
    loss = flow_loss(transformer)(*arguments.values()).asnumpy()
    assert loss.dtype == np.float32 and loss == pytest.approx(expected, rel=1e-5)


def test_training_and_measuring_report_the_losses_of_their_own_batches(lab, base, tmp_path, monkeypatch):
    """With steps too small to change anything, they are the base model's losses."""
    monkeypatch.setattr(measure, "NUM_EVALUATED", 16)
    other = lab.copy(tmp_path / "lab").set("train", learning_rate=1e-12, steps=4, guidance_scale=2.0)
    other.run("TrainLoRA", "MeasureLoss")
    plan = other.plan
    reported = [json.loads(line)["loss"] for line in (other.run_folder / metrics.METRICS_NAME).read_text().splitlines()]
    batches = [recomputed(other, plan, step) for step in range(4)]
    expected = [((predicted(base, batch, guidance=2.0) - batch["target"]) ** 2).mean() for batch in batches]
    np.testing.assert_allclose(reported, expected, rtol=1e-5)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 1e-3
    fixed = [vars(batches_of(plan).evaluation(index, 8)) for index in range(2)]
    losses = [((predicted(base, batch, guidance=2.0) - batch["target"]) ** 2).mean() for batch in fixed]
    measured = json.loads((other.run_folder / "loss.json").read_text())
    assert measured["before"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert measured["after"] == pytest.approx(np.mean(losses), rel=1e-5)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def injected(lab: Lab, seed: int = SEED, **settings) -> tuple:
    """A fresh transformer with LoRA, and its trained parameters by name."""
    transformer = models.load_model(lab.model, "transformer", "fp32")
    adapted = lora.Adapted({"transformer": transformer}, Lora(**settings), plan_of(lab).precision.trained, seed)
    return transformer, {parameter.name: parameter for parameter in adapted.trained}


def matrices(parameters: dict, which: str) -> list[np.ndarray]:
    return [parameter.asnumpy() for name, parameter in parameters.items() if f"lora_{which}" in name]


@pytest.mark.parametrize("rank", [4, 16])
def test_a_starts_normal_with_deviation_one_over_rank_and_b_at_zero(lab, rank):
    _, parameters = injected(lab, rank=rank, alpha=float(rank))
    values = np.concatenate([a.reshape(-1) for a in matrices(parameters, "A")]).astype(np.float64) * rank
    assert len(values) == rank * 128 * 14
    assert abs(values.mean()) < 5 / len(values) ** 0.5
    assert values.std() == pytest.approx(1, abs=0.03)
    assert np.mean(np.abs(values) < 1) == pytest.approx(math.erf(0.5**0.5), abs=0.03)  # normal, not uniform
    assert len(matrices(parameters, "B")) == 14
    assert all((b == 0).all() for b in matrices(parameters, "B"))


def test_a_comes_from_the_seed_alone_and_differs_between_layers(lab):
    import mindspore as ms

    starts = []
    for global_seed, seed in ((1, SEED), (2, SEED), (1, SEED + 1)):
        ms.set_seed(global_seed)
        np.random.seed(global_seed)
        starts.append(matrices(injected(lab, seed)[1], "A"))
    np.testing.assert_array_equal(starts[0], starts[1])
    assert len({a.tobytes() for start in (starts[0], starts[2]) for a in start}) == 2 * 14
    flat = np.stack([a.reshape(-1) for start in (starts[0], starts[2]) for a in start])
    assert np.abs(np.corrcoef(flat)[np.triu_indices(len(flat), 1)]).max() < 5 / flat.shape[1] ** 0.5


def test_a_starts_in_float32_and_the_same_with_a_half_precision_transformer(lab):
    transformer = models.load_model(lab.model, "transformer", "fp16")
    policy = plan_of(lab, precision={"preset": "fp16"}).precision.trained
    adapted = lora.Adapted({"transformer": transformer}, Lora(rank=4), policy, SEED)
    half = matrices({parameter.name: parameter for parameter in adapted.trained}, "A")
    assert {a.dtype for a in half} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(half, matrices(injected(lab, rank=4)[1], "A"))


@pytest.mark.parametrize("alpha", [8.0, 16.0, 2.0, 3.5])
def test_the_low_rank_part_of_a_layer_is_scaled_by_alpha_over_rank(lab, alpha):
    import mindspore as ms

    transformer, parameters = injected(lab, rank=8, alpha=alpha)
    layer, name = transformer.transformer_blocks[1].attn.to_k, "transformer_blocks.1.attn.to_k"
    a, b = (parameters[f"{name}.lora_{which}.default.weight"] for which in "AB")
    lora.set_values(b, np.random.default_rng(0).standard_normal(b.shape))
    x = np.random.default_rng(1).standard_normal((2, 5, 128)).astype(np.float32)
    change = (layer(ms.Tensor(x)) - layer.base_layer(ms.Tensor(x))).asnumpy()
    np.testing.assert_allclose(change, alpha / 8 * x @ a.asnumpy().T @ b.asnumpy().T, rtol=1e-3, atol=1e-4)
    assert np.abs(change).mean() > 0.1


def test_twice_the_alpha_is_twice_the_change(lab):
    import mindspore as ms

    x, changes = ms.Tensor(np.ones((1, 2, 128), np.float32)), []
    for alpha in (16.0, 32.0):
        transformer, parameters = injected(lab, rank=16, alpha=alpha)
        for number, parameter in enumerate(parameters.values()):
            if "lora_B" in parameter.name:
                lora.set_values(parameter, np.random.default_rng(number).standard_normal(parameter.shape))
        layer = transformer.single_transformer_blocks[0].attn.to_v
        changes.append((layer(x) - layer.base_layer(x)).asnumpy())
    np.testing.assert_allclose(changes[1], 2 * changes[0], rtol=1e-3, atol=1e-4)
    assert np.abs(changes[0]).mean() > 0.1


def test_with_b_at_zero_the_model_predicts_what_the_base_predicts(lab, base):
    transformer, _ = injected(lab, rank=16, alpha=32.0)
    batch = vars(a_batch(lab))
    np.testing.assert_array_equal(predicted(transformer, batch, 3.5), predicted(base, batch, 3.5))


def test_every_lora_parameter_has_a_gradient_and_it_is_the_slope_of_the_loss(lab):
    transformer, parameters = injected(lab, rank=4, alpha=8.0)
    plan, trained = plan_of(lab), list(parameters.values())
    for number, parameter in enumerate(trained):
        if "lora_B" in parameter.name:
            lora.set_values(parameter, np.random.default_rng(number).standard_normal(parameter.shape) / 10)
    arguments = tuple(tensors(plan, transformer, a_batch(lab)).values())
    loss = flow_loss(transformer)
    settings = dataclasses.replace(plan.experiment.train, mode="pynative")
    (value,), gradients = loop.Training(loss, trained, settings).gradients([arguments])
    assert value.asnumpy() == pytest.approx(loss(*arguments).asnumpy(), rel=1e-5)
    gradients = [gradient.asnumpy().astype(np.float64) for gradient in gradients]
    norms = [np.linalg.norm(gradient) for gradient in gradients]
    assert min(norms) > 1e-3 * max(norms) > 0
    starts, length = [parameter.asnumpy() for parameter in trained], np.linalg.norm(norms)
    along = []
    for side in (1, -1):
        for parameter, start, gradient in zip(trained, starts, gradients):
            lora.set_values(parameter, start + side * 0.05 * gradient / length)
        along.append(float(loss(*arguments).asnumpy()))
    assert (along[0] - along[1]) / 0.1 == pytest.approx(length, rel=0.02)


def test_training_moves_every_lora_parameter_and_nothing_else(lab, tmp_path):
    transformer, parameters = injected(lab, rank=4, alpha=4.0)
    plan = plan_of(lab, train={"weight_decay": 0.0, "steps": 3, "mode": "pynative"})
    settings, numbers, batches = plan.experiment.train, [], batches_of(plan)

    def make(number):
        numbers.append(number)
        return batches.training(number)

    before = {parameter.name: parameter.asnumpy().copy() for parameter in transformer.get_parameters()}
    training = loop.Training(flow_loss(transformer), list(parameters.values()), settings)
    loop.run(training, make, tensors_of(plan, transformer), settings, tmp_path, {})
    moved = {p.name for p in transformer.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])}
    assert moved == set(parameters) == {name for name in before if "lora_" in name}
    assert numbers == [0, 1, 2]
