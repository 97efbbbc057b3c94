"""Batches against the training recipe, recomputed in NumPy; see `recipe`."""

import json

import numpy as np
import pytest
from lab import Lab
from recipe import (
    BATCH_SIZE,
    CAPTIONS,
    CLOSE,
    NUM_PHOTOS,
    NUM_ROWS,
    SEED,
    TEXT_LENGTH,
    batches_of,
    edit,
    entries_of,
    latents_of,
    modes_of,
    packed,
    pairs_of,
    plan_of,
    recomputed,
    schedule,
)

from cache import caption_item
from pipeline import draws
from pipeline.data.conditions import FILE
from pipeline.data.variants import Variant
from pipeline.draws import Purpose
from pipeline.training.batches import Batch
from pipeline.training.order import Order

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def lab(five_photos) -> Lab:
    return five_photos


def assert_same(found: Batch, expected: Batch) -> None:
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


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
    renamed.rename_photos()
    plan, other = plan_of(lab), plan_of(renamed)
    assert [photo.name for photo in plan.photos] != [photo.name for photo in other.photos]
    assert other.run_id == plan.run_id
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
        other.model = request.getfixturevalue("schnell_model")
        other.set("model", path=str(other.model)).settle()
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
