"""Flips, crops, buckets, resolutions, repeats, dropped captions and weighting: what training draws of them."""

import dataclasses
import json
import math
import threading
from collections import Counter

import numpy as np
import pytest
from lab import Lab
from shaped import BUCKETS, NUM, SEED, assert_same, batches_of, full_lab, plan_of, shaped_lab, some

from cache import caption_item
from pipeline import draws
from pipeline.data.buckets import bucket_sizes, choose
from pipeline.data.variants import Variant
from pipeline.draws import Purpose
from pipeline.plan.plan import Plan
from pipeline.training.batches import Batch

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def plain(cpu, tiny_model, tmp_path_factory) -> Lab:
    """Shared by all tests here: copy it before changing a byte."""
    return shaped_lab(tmp_path_factory.mktemp("drawn") / "lab", tiny_model)


@pytest.fixture(scope="module")
def full(plain, tmp_path_factory) -> Lab:
    return full_lab(plain, tmp_path_factory.mktemp("full") / "lab")


def packed(latents: np.ndarray) -> np.ndarray:
    channels, height, width = latents.shape
    patches = latents.reshape(channels, height // 2, 2, width // 2, 2).transpose(1, 3, 0, 2, 4)
    return patches.reshape(-1, 4 * channels)


def origins(lab: Lab, plan: Plan, batch: Batch) -> list[tuple[str, Variant]]:
    """The caption of the photo, and the variant, that each item of a batch comes from.

    x = latents + sigma * target: only for the right latents is x - latents sigma times the target.
    """
    vae = json.loads((lab.model / "vae" / "config.json").read_text())
    candidates = {
        (photo.caption, need.variant): vae["scaling_factor"]
        * packed(need.entries.read(photo.digest)[:16] - vae["shift_factor"])
        for need in plan.image_needs
        for photo in need.photos
    }
    found = []
    for x, target, sigma in zip(batch.x, batch.target, batch.timestep):
        right = [key for key, latents in candidates.items()
                 if latents.shape == x.shape and np.abs(x - latents - sigma * target).max() < 1e-4]  # fmt: skip
        assert len(right) == 1
        found += right
    return found


def noise_of(lab: Lab, plan: Plan, batch: Batch) -> np.ndarray:
    """x + (1 - sigma) * target, whatever the latents are."""
    return batch.x + (1 - batch.timestep)[:, None, None] * batch.target


def test_flips_are_drawn_for_half_of_the_items_and_nothing_else_changes(full):
    unflipped, flipped = (plan_of(full, data={"flip": flip}, train={"batch_size": 4}) for flip in (False, True))
    drawn = Counter()
    for before, after in zip(some(unflipped), some(flipped)):
        assert_same(after, before, "txt", "pooled", "timestep", "img_ids", "txt_ids", "weight")
        np.testing.assert_allclose(noise_of(full, flipped, after), noise_of(full, unflipped, before), atol=1e-5)
        pairs = zip(origins(full, unflipped, before), origins(full, flipped, after))
        for row, ((photo, variant), (same, chosen)) in enumerate(pairs):
            assert same == photo and dataclasses.replace(chosen, flip=False) == variant
            assert chosen.flip or np.array_equal(after.x[row], before.x[row])
            drawn[photo, chosen.flip] += 1
    assert len(drawn) == 2 * NUM and 12 < sum(count for (_, flip), count in drawn.items() if flip) < 36


def test_crops_are_drawn_evenly_and_independently_of_flips(full):
    plan = plan_of(full, data={"crops": 2, "flip": True}, train={"batch_size": 8})
    batches = some(plan, 20)
    chosen = [each for batch in batches for each in origins(full, plan, batch)]
    counts = Counter((variant.crop, variant.flip) for _, variant in chosen)
    assert counts.keys() == {(crop, flip) for crop in (0, 1) for flip in (False, True)}
    assert all(abs(count - 40) < 4 * math.sqrt(160 * 3 / 16) for count in counts.values())
    assert len({tuple(variant for _, variant in chosen[start : start + 8]) for start in range(0, 160, 8)}) == 20
    for before, after in zip(some(plan_of(full, train={"batch_size": 8}), 20), batches):
        assert_same(after, before, "txt", "pooled", "timestep", "weight")


def test_the_draws_are_those_of_the_recipe(full):
    """A Philox of its own for each purpose, at the number of the batch."""
    plan = plan_of(full, data={"crops": 2, "flip": True}, train={"batch_size": 8, "caption_dropout": 0.5})
    for number in (0, 3):
        batch = batches_of(plan).training(number)
        variants_drawn = [variant for _, variant in origins(full, plan, batch)]
        crop, flip, drop = (
            draws.generator(SEED, purpose, number).random(8)
            for purpose in (Purpose.CROP, Purpose.FLIP, Purpose.CAPTION_DROPOUT)
        )
        assert [variant.crop for variant in variants_drawn] == [int(u * 2) for u in crop]
        assert [variant.flip for variant in variants_drawn] == [u >= 0.5 for u in flip]
        empty = plan.pooled.read(caption_item(""))
        assert [np.array_equal(row, empty) for row in batch.pooled] == [u < 0.5 for u in drop]


def test_captions_are_dropped_whole_as_often_as_asked_for_and_nothing_else_changes(full):
    plan, without = (plan_of(full, train={"batch_size": 8, "caption_dropout": rate}) for rate in (0.25, 0.0))
    empty = caption_item("")
    dropped = []
    for before, after in zip(some(without, 20), some(plan, 20)):
        assert_same(after, before, "x", "target", "timestep", "img_ids", "txt_ids", "weight")
        for row, (caption, _) in enumerate(origins(full, plan, after)):
            is_dropped = np.array_equal(after.txt[row], plan.txt.read(empty))
            item = empty if is_dropped else caption_item(caption)
            np.testing.assert_array_equal(after.txt[row], plan.txt.read(item))
            np.testing.assert_array_equal(after.pooled[row], plan.pooled.read(item))
            dropped.append(is_dropped)
    assert abs(sum(dropped) - 40) < 4 * math.sqrt(160 * 3 / 16)


@pytest.mark.parametrize("scheme, weight", [
    ("sigma_sqrt", lambda s: s**-2), ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2)))
])  # fmt: skip
def test_schemes_that_weigh_change_the_weights_alone(full, scheme, weight):
    for before, after in zip(some(plan_of(full)), some(plan_of(full, train={"weighting_scheme": scheme}))):
        assert_same(after, before, *(vars(before).keys() - {"weight"}))
        assert before.weight.tolist() == [1.0, 1.0]
        assert after.weight.dtype == np.float32
        np.testing.assert_allclose(after.weight, weight(after.timestep.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
def test_schemes_that_draw_change_the_noise_levels_alone(full, scheme):
    plain, drawn = plan_of(full), plan_of(full, train={"weighting_scheme": scheme, "logit_mean": 1.0})
    for before, after in zip(some(plain), some(drawn)):
        assert (after.timestep != before.timestep).any()
        assert_same(after, before, "txt", "pooled", "img_ids", "txt_ids", "weight")
        np.testing.assert_allclose(after.target, before.target, atol=1e-6)
    if scheme == "logit_normal":
        levels = np.concatenate([batch.timestep for batch in some(drawn, 100)])
        assert levels.mean() == pytest.approx(0.30, abs=0.06)  # of 1 - sigmoid(1 + n), n standard normal


def test_logit_mean_logit_std_and_mode_scale_reach_the_draws(full):
    def levels(scheme, **settings):
        train = {"weighting_scheme": scheme, "batch_size": 200, **settings}
        return some(plan_of(full, train=train), 1)[0].timestep

    assert levels("logit_normal", logit_std=0.01).std() < 0.01 < levels("logit_normal").std()
    assert levels("logit_normal", logit_mean=3.0).mean() < 0.2 < levels("logit_normal").mean()
    assert not np.array_equal(levels("mode", mode_scale=0.5), levels("mode"))


def test_batches_never_mix_sizes_and_every_photo_comes_once_an_epoch_at_each(full):
    plan = plan_of(full, data=BUCKETS, train={"batch_size": 2})
    batches, expected = batches_of(plan), Counter()
    for photo in plan.photos:
        for resolution in BUCKETS["resolution"]:
            expected[photo.caption, choose(photo.width, photo.height, bucket_sizes(resolution))] += 4
    found, sizes = Counter(), set()
    for number in range(batches.order.steps_in_epochs(4)):
        batch = batches.training(number)
        origin = origins(full, plan, batch)
        (size,) = {(variant.width, variant.height) for _, variant in origin}
        assert batch.img_ids.max(axis=0).tolist() == [0, size[1] // 16 - 1, size[0] // 16 - 1]
        assert len(batch.img_ids) == batch.x.shape[1] == size[0] * size[1] // 256
        found.update((caption, size) for caption, _ in origin)
        sizes.add(size)
    assert found == expected and batches.num_shapes == len(sizes) == 4


def test_a_photo_counts_repeats_times_an_epoch(full):
    plan = plan_of(full, data={"repeats": 3}, train={"batch_size": 5})
    batches = batches_of(plan)
    assert batches.order.steps_in_epochs(2) == 2 * 3 * NUM // 5
    captions = [caption for number in range(3) for caption, _ in origins(full, plan, batches.training(number))]
    assert Counter(captions) == {photo.caption: 3 for photo in plan.photos}


def test_renaming_every_file_changes_no_batch_and_no_run(full, tmp_path):
    lab = full.copy(tmp_path / "lab")
    lab.rename_photos()
    settings = {"data": BUCKETS | {"flip": True}, "train": {"caption_dropout": 0.5, "posterior": "sample"}}
    plan, renamed = plan_of(full, **settings), plan_of(lab, **settings)
    assert [photo.name for photo in plan.photos] != [photo.name for photo in renamed.photos]
    assert renamed.run_id == plan.run_id
    for before, after in zip(some(plan), some(renamed)):
        assert_same(after, before)


def test_a_batch_made_in_a_thread_is_the_same(full):
    plan = plan_of(full, data={"flip": True, "crops": 2}, train={"caption_dropout": 0.5, "posterior": "sample"})
    batches, found = batches_of(plan), []
    thread = threading.Thread(target=lambda: found.extend(batches.training(number) for number in range(5)))
    thread.start()
    thread.join()
    for after, before in zip(found, some(plan, 5), strict=True):
        assert_same(after, before)


def test_evaluation_is_the_same_whatever_training_draws(full):
    knobs = plan_of(full, data={"flip": True, "repeats": 2},
                    train={"caption_dropout": 0.5, "weighting_scheme": "sigma_sqrt"})  # fmt: skip
    for index in range(3):
        assert_same(batches_of(knobs).evaluation(index, 4), batches_of(plan_of(full)).evaluation(index, 4))


def test_evaluation_takes_all_photos_in_turn_and_no_batch_mixes_sizes(full):
    plan = plan_of(full, data=BUCKETS)
    batches, found = batches_of(plan), Counter()
    for index in range(20):
        origin = origins(full, plan, batches.evaluation(index, 5))
        assert len({(variant.width, variant.height) for _, variant in origin}) == 1
        found.update(origin)
    assert len(found) == 2 * NUM and max(found.values()) <= min(found.values()) + 5
