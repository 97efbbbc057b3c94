"""Flips, crops, buckets, resolutions, repeats and dropped captions: what is encoded for them, and what training draws.

What a variant's picture is, is worked out here anew, with Pillow alone.
"""

import dataclasses
import json
import math
import threading
from collections import Counter

import numpy as np
import pytest
from lab import Lab
from PIL import Image, ImageOps
from safetensors import safe_open

from cache import __main__ as command_line
from cache import caption_item, digest, recipe_id
from pipeline import checkpoints, draws, models
from pipeline.data import images, indexing, variants
from pipeline.data.buckets import bucket_sizes, choose
from pipeline.data.variants import Variant
from pipeline.draws import Purpose
from pipeline.needs import needed
from pipeline.recipes import Plan, resolve
from pipeline.settings import Data
from pipeline.stopping import Stopped, StopRequest
from pipeline.training.batches import Batch, Batches

pytestmark = pytest.mark.usefixtures("cpu")

SIZES = [(64, 32), (32, 64), (96, 64), (50, 60), (40, 130)]
"""Of the pictures; at 32 pixels, the first two are not scaled, and of the third every second pixel counts."""

NUM, SIDE, SEED = len(SIZES), 32, 5
BUCKETS = {"buckets": True, "resolution": (16, 64)}
"""Four sizes; of these pictures, one is nearest to the square."""

SQUARE = Variant(SIDE, SIDE)


@pytest.fixture(scope="module")
def plain(cpu, tiny_model, tmp_path_factory) -> Lab:
    """Pictures of several shapes, encoded without any knob; shared by all tests: copy it before changing a byte."""
    lab = Lab(tmp_path_factory.mktemp("variants") / "lab", tiny_model, num_pictures=NUM)
    for number, (row, size) in enumerate(zip(lab.captions(), SIZES)):
        small = np.random.default_rng(number).integers(0, 256, (7, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(lab.pictures / row["file_name"])
    lab.write_captions([row | {"text": f"picture {number}"} for number, row in enumerate(lab.captions())])
    lab.settle()
    assert lab.encode() == dict.fromkeys(("EncodeCLIP", "EncodeT5", "EncodeImages"), NUM)
    return lab


@pytest.fixture
def lab(plain, tmp_path) -> Lab:
    return plain.copy(tmp_path / "lab")


@pytest.fixture(scope="module")
def full(plain, tmp_path_factory) -> Lab:
    """Everything encoded that any test of batches asks for."""
    lab = plain.copy(tmp_path_factory.mktemp("full") / "lab")
    lab.set("data", flip=True).set("train", caption_dropout=0.5).encode()
    lab.set("data", crops=2).encode()
    lab.set("data", crops=0, resolution=[16, 64], buckets=True).encode()
    return lab.set("data", flip=False, resolution=SIDE, buckets=False).set("train", caption_dropout=0.0)


def plan_of(lab: Lab, seed: int = SEED, **tables) -> Plan:
    """The lab's plan with another seed and other settings, by table; the latents are not sampled, unless asked for."""
    experiment = lab.experiment
    tables["train"] = {"posterior": "mode", **tables.get("train", {})}
    changed = {name: dataclasses.replace(getattr(experiment, name), **values) for name, values in tables.items()}
    return resolve(dataclasses.replace(experiment, seed=seed, **changed))


def batches_of(plan: Plan) -> Batches:
    return Batches(plan, plan.photos())


def some(plan: Plan, count: int = 12) -> list[Batch]:
    batches = batches_of(plan)
    return [batches.training(number) for number in range(count)]


def assert_same(found: Batch, expected: Batch, *names: str) -> None:
    for name in names or vars(expected):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


# --- what is encoded ----------------------------------------------------------------------------------------------


def test_flipping_encodes_each_image_once_more_and_nothing_else(lab):
    assert lab.set("data", flip=True).encode() == {"EncodeImages": NUM}
    record = lab.record("EncodeImages")
    ids = [lab.plan.latents(Variant(SIDE, SIDE, "centre", flip)).id for flip in (False, True)]
    assert (record["outputs"]["entries"], record["outcome"]["encoded"]) == (ids, NUM)
    for flip in (True, False, True):
        assert lab.set("data", flip=flip).encode() == {}


def test_crops_are_encoded_once_each_and_more_of_them_leave_the_first_alone(lab):
    for crops, encoded in ((2, {"EncodeImages": 2 * NUM}), (3, {"EncodeImages": NUM}), (2, {}), (0, {}), (3, {})):
        assert lab.set("data", crops=crops).encode() == encoded


def test_another_resolution_is_encoded_beside_the_first(lab):
    assert lab.set("data", resolution=[SIDE]).encode() == {}
    assert lab.set("data", resolution=[48, SIDE]).encode() == {"EncodeImages": NUM}
    assert lab.set("data", resolution=[16, 48]).encode() == {"EncodeImages": NUM}
    assert lab.set("data", resolution=SIDE).encode() == {}


def test_repeats_encode_nothing(lab):
    assert lab.set("data", repeats=7).encode() == {}


def test_buckets_encode_what_is_no_square_at_the_nearest_size(lab):
    square = sum(choose(*size, bucket_sizes(64)) == (64, 64) for size in SIZES)
    assert lab.set("data", resolution=64).encode() == {"EncodeImages": NUM}
    assert lab.set("data", buckets=True).encode() == {"EncodeImages": NUM - square}
    assert 0 < square < NUM
    plan = lab.plan
    expected = {photo.digest: choose(photo.width, photo.height, bucket_sizes(64)) for photo in plan.photos()}
    found = {}
    for need in plan.image_needs(plan.photos()):
        size = need.variant.width, need.variant.height
        found |= {
            item: size for item in need.items if need.entries.read(item).shape == (32, size[1] // 8, size[0] // 8)
        }
    assert found == expected and len(set(expected.values())) >= 3


def test_the_empty_caption_is_encoded_only_where_captions_are_dropped(lab):
    assert not lab.plan.txt.index().holds([caption_item("")]).any()
    lab.set("train", caption_dropout=0.1)
    assert not lab.done("EncodeCLIP") and not lab.done("EncodeT5") and lab.done("EncodeImages")
    assert lab.encode() == {"EncodeCLIP": 1, "EncodeT5": 1}
    assert lab.set("train", caption_dropout=0.7).encode() == lab.set("train", caption_dropout=0.0).encode() == {}


def test_the_empty_caption_is_encoded_as_any_other(full):
    import mindspore as ms

    tokens, t5 = (
        models.load_tokenizer(full.model, "tokenizer_2"),
        models.load_model(full.model, "text_encoder_2", "fp32"),
    )
    ids = tokens("", padding="max_length", max_length=16, truncation=True).input_ids
    expected = t5(ms.Tensor([ids], ms.int32))[0].asnumpy()[0]
    np.testing.assert_array_equal(full.plan.txt.read(caption_item("")), expected)


def test_a_photo_is_decoded_once_for_all_its_variants(lab, monkeypatch):
    read_photo, read = indexing.read_photo, []
    monkeypatch.setattr(indexing, "read_photo", lambda photo: read.append(photo.name) or read_photo(photo))
    lab.set("data", flip=True, crops=2, resolution=[16, SIDE]).encode()
    assert sorted(read) == sorted(row["file_name"] for row in lab.captions())


def test_a_stopped_encoder_keeps_what_it_has_of_every_variant(lab, monkeypatch):
    lab.set("data", flip=True, crops=2)
    left, check = [7], StopRequest.check

    def stop_at_last(self):
        left[0] -= 1
        if not left[0]:
            raise Stopped
        check(self)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(StopRequest, "check", stop_at_last)
        lab.run("EncodeImages")
    assert lab.encode() == {"EncodeImages": 4 * NUM - 7}


def test_more_variants_than_can_be_written_at_a_time_are_all_encoded(lab, monkeypatch):
    monkeypatch.setattr("pipeline.encode.MAX_WRITERS", 3)
    assert lab.set("data", flip=True, crops=2, resolution=[16, SIDE]).encode() == {"EncodeImages": 8 * NUM}
    assert lab.encode() == {}


# --- what a variant is --------------------------------------------------------------------------------------------


def cropped(image: Image.Image, number: int) -> Image.Image:
    """A random crop to SIDE x SIDE of a picture whose shorter side is a multiple of that."""
    step = min(image.size) // SIDE
    key = int.from_bytes(bytes.fromhex(digest_of(image)), "little")
    generator = np.random.Generator(np.random.Philox(key=key, counter=number << 192))
    place = step * int(generator.integers(0, max(image.size) // step - SIDE + 1))
    left, top = (place, 0) if image.width > image.height else (0, place)
    part = image.crop((left, top, left + step * SIDE, top + step * SIDE))
    if step == 1:
        return part
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + part.width, top + part.height))


def digest_of(image: Image.Image) -> str:
    with open(image.filename, "rb") as file:
        return digest(file.read())


def covered(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of a picture that has the aspect of width x height, scaled to that."""
    across, down = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


@pytest.fixture(scope="module")
def vae(plain):
    """What the VAE makes of a picture."""
    import mindspore as ms
    from mindone.diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(str(plain.model), subfolder="vae")

    def posterior(image):
        pixels = np.asarray(image).astype(np.float32) / 127.5 - 1
        return model.encode(ms.Tensor(pixels.transpose(2, 0, 1)[None].copy()))[0].asnumpy()[0]

    return posterior


def test_every_variants_latents_are_those_of_the_picture_transformed_with_pillow(full, vae):
    plan, compared = plan_of(full), Counter()
    for row in full.captions():
        image = Image.open(full.pictures / row["file_name"])
        pictures = {size: covered(image, *size) for size in ((SIDE, SIDE), choose(*image.size, bucket_sizes(64)))}
        pictures = {Variant(*size): picture for size, picture in pictures.items()}
        if min(image.size) % SIDE == 0:
            pictures |= {Variant(SIDE, SIDE, number): cropped(image, number) for number in (0, 1)}
        for variant, picture in pictures.items():
            for flip in (False, True):
                entries = plan.latents(dataclasses.replace(variant, flip=flip))
                expected = vae(ImageOps.mirror(picture) if flip else picture)
                np.testing.assert_array_equal(entries.read(digest_of(image)), expected, err_msg=f"{row} {variant}")
                compared[variant.crop, flip] += 1
    assert compared == {(crop, flip): 3 for crop in (0, 1) for flip in (False, True)} | {
        ("centre", flip): 2 * NUM for flip in (False, True)
    }


def test_the_crops_of_a_photo_differ_from_each_other_and_the_centre(full):
    plan = plan_of(full)
    item = next(photo.digest for photo in plan.photos() if (photo.width, photo.height) == (40, 130))
    found = [plan.latents(Variant(SIDE, SIDE, crop)).read(item) for crop in ("centre", 0, 1)]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


def test_the_centres_of_every_later_release_are_these():
    """Printed once by the release before there were other crops: other pixels are other latents under one address."""
    found = []
    for size, target in (
        ((37, 101), (48, 48)),
        ((640, 480), (592, 448)),
        ((333, 500), (416, 624)),
        ((1, 700), (64, 96)),
    ):
        values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        found.append(digest(images.fit(Image.fromarray(values), *target).tobytes())[:16])
    assert found == ["5a38b9f1bf1496a2", "75015b1ae4d8f298", "c08498e5cf45a421", "310611c6e58a9a8e"]


# --- addresses ----------------------------------------------------------------------------------------------------

RECIPE = {
    "schema": 1, "kind": "latents", "params": "fp32", "compute": "fp32", "dtype": "float32",
    "encoder": {"config": "0" * 32, "weights": "1" * 32}, "shape": [32, 8, 8],
    "preprocessing": "exif, rgb on white, lanczos cover, centre crop, [-1, 1]: 1",
    "width": 64, "height": 64, "crop": "centre", "flip": False,
}  # fmt: skip


def test_the_address_without_any_knob_is_that_of_the_release_before_there_were_knobs(plain, monkeypatch):
    """The id was printed by that release."""
    monkeypatch.setattr(checkpoints, "component_digest", lambda *arguments: RECIPE["encoder"])
    plan = plan_of(plain, data={"resolution": 64})
    (variant,) = plan.variants(plan.photos()[0])
    assert plan.latents(variant).recipe == RECIPE
    assert plan.latents(variant).id == recipe_id(RECIPE) == "82facd66dafaaea5d88beb58bc0fbf3a"


def test_only_what_a_knob_says_is_in_an_address(plain):
    plan = plan_of(plain)
    base = plan.latents(SQUARE).recipe
    for variant, changed in {
        Variant(SIDE, SIDE, flip=True): {"flip": True},
        Variant(SIDE, SIDE, 3): {"crop": "random-3"},
        Variant(48, 16): {"width": 48, "height": 16, "shape": [32, 2, 6]},
    }.items():
        assert plan.latents(variant).recipe == base | changed


def ids(lab: Lab, photos=None, **tables) -> tuple[list[str], str]:
    """The ids of the latents' recipes, and the run's."""
    plan = plan_of(lab, **tables)
    photos = plan.photos() if photos is None else photos
    return [need.entries.id for need in plan.image_needs(photos)], plan.run_id(photos)


@pytest.mark.parametrize("settings, num_recipes", [
    ({"flip": True}, 2), ({"crops": 1}, 1), ({"crops": 4}, 4), ({"crops": 2, "flip": True}, 4), ({"repeats": 2}, 1),
    ({"resolution": (16, 32)}, 2), (BUCKETS, 4),
])  # fmt: skip
def test_every_knob_of_the_data_is_another_run(plain, settings, num_recipes):
    recipes, run = ids(plain, data=settings)
    assert len(set(recipes)) == len(recipes) == num_recipes
    assert run != ids(plain)[1]


def test_a_knob_that_changes_nothing_is_no_other_run(plain):
    squares = [photo for photo in plain.plan.photos() if photo.width == photo.height]
    assert ids(plain, squares, data={"buckets": True}) == ids(plain, squares)
    assert ids(plain, data={"resolution": (SIDE,)}) == ids(plain)
    assert ids(plain, data={"resolution": (16, SIDE)}) == ids(plain, data={"resolution": (SIDE, 16)})
    for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
        assert ids(plain, train={name: 77}) == ids(plain)


def test_what_decides_a_run_is_named(plain):
    plan = plan_of(plain, data={"flip": True}, train={"learning_rate": 0.25})
    decisive = plan.decisive(plan.photos())
    assert decisive["train"]["learning_rate"] == 0.25 and decisive["data"]["flip"] is True
    assert decisive["entries"]["latents"] == [plan.latents(Variant(SIDE, SIDE, "centre", f)).id for f in (False, True)]
    assert decisive["data"]["samples"][0] == [(first := plan.photos()[0]).digest, caption_item(first.caption), 32, 32]
    assert not {"log_every", "checkpoint_every", "keep_checkpoints"} & decisive["train"].keys()
    assert str(plain.folder) not in json.dumps(decisive) and "pictures" not in json.dumps(decisive)


# --- what training draws ------------------------------------------------------------------------------------------


def packed(latents: np.ndarray) -> np.ndarray:
    channels, height, width = latents.shape
    patches = latents.reshape(channels, height // 2, 2, width // 2, 2).transpose(1, 3, 0, 2, 4)
    return patches.reshape(-1, 4 * channels)


def origins(lab: Lab, plan: Plan, batch: Batch) -> list[tuple[str, Variant]]:
    """The caption of the photo, and the variant, that each item of a batch comes from.

    x = latents + sigma * target: only for the right latents is x - latents sigma times the target.
    """
    vae = json.loads((lab.model / "vae" / "config.json").read_text())
    photos = plan.photos()
    candidates = {
        (photo.caption, need.variant): vae["scaling_factor"]
        * packed(need.entries.read(photo.digest)[:16] - vae["shift_factor"])
        for need in plan.image_needs(photos)
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
    for photo in plan.photos():
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
    assert Counter(captions) == {photo.caption: 3 for photo in plan.photos()}


def test_renaming_every_file_changes_no_batch_and_no_run(full, tmp_path):
    lab = full.copy(tmp_path / "lab")
    rows = lab.captions()
    for number, row in enumerate(rows):
        (lab.pictures / row["file_name"]).rename(lab.pictures / f"{chr(ord('z') - number)}.png")
        row["file_name"] = f"{chr(ord('z') - number)}.png"
    lab.write_captions(rows[::-1])
    lab.settle()
    settings = {"data": BUCKETS | {"flip": True}, "train": {"caption_dropout": 0.5, "posterior": "sample"}}
    plan, renamed = plan_of(full, **settings), plan_of(lab, **settings)
    assert [photo.name for photo in plan.photos()] != [photo.name for photo in renamed.photos()]
    assert renamed.run_id(renamed.photos()) == plan.run_id(plan.photos())
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


# --- planning -----------------------------------------------------------------------------------------------------


def test_samples_and_variants_of_a_photo():
    photo = indexing.IndexedPhoto(path=None, name="a.png", caption="a", digest="0" * 32, width=400, height=300)
    assert variants.sizes(Data(resolution=(768, 512)), photo) == [(512, 512), (768, 768)]
    assert variants.sizes(Data(buckets=True), photo) == [(592, 448)]
    assert variants.of_size(Data(crops=2, flip=True), (512, 512)) == [
        Variant(512, 512, 0, False), Variant(512, 512, 0, True), Variant(512, 512, 1, False), Variant(512, 512, 1, True)
    ]  # fmt: skip


def test_two_files_with_the_same_bytes_are_encoded_once_and_count_twice(plain):
    plan = plan_of(plain, data={"flip": True})
    photo = plan.photos()[0]
    twins = [photo, dataclasses.replace(photo, name="copy.png", caption="another")]
    assert [need.items for need in plan.image_needs(twins)] == [[photo.digest]] * 2
    assert [sample.photo.caption for sample in plan.samples(twins)] == [photo.caption, "another"]


# --- the store's tools --------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str]:
    capsys.readouterr()
    code = command_line.main([str(argument) for argument in arguments])
    return code, "".join(capsys.readouterr())


def test_each_recipe_is_a_need_of_its_own(full):
    plan = plan_of(full, data={"flip": True, "crops": 2}, train={"caption_dropout": 0.1})
    clip, t5, *latents = needed(plan, plan.photos())
    assert clip.items == t5.items and caption_item("") in clip.items and len(clip.items) == NUM + 1
    assert {(need.stage, need.component) for need in latents} == {("EncodeImages", "vae")}
    assert [(need.recipe["crop"], need.recipe["flip"]) for need in latents] == [
        ("random-0", False), ("random-0", True), ("random-1", False), ("random-1", True)
    ]  # fmt: skip


def test_why_answers_for_each_variant(lab, capsys):
    lab.set("data", flip=True)
    code, said = run(capsys, "why", lab.path)
    there, missing = [line for line in said.splitlines() if line.startswith("EncodeImages")]
    assert there.endswith(f"all {NUM} are there") and missing.endswith(f"0 of {NUM} are there, {NUM} missing")
    assert code == 0 and "flip differs: false -> true" in said


def test_export_holds_every_variant_under_a_name_of_its_own(full, tmp_path, capsys):
    lab = full.copy(tmp_path / "lab")
    lab.set("data", crops=2, flip=True)
    code, said = run(capsys, "export", lab.path, "--kind", "latents", "--out", tmp_path / "x")
    assert code == 0, said
    plan = lab.plan
    with safe_open(tmp_path / "x", "np") as file:
        assert len(list(file.keys())) == 4 * NUM
        for photo in plan.photos():
            for crop in (0, 1):
                for flip, word in ((False, ""), (True, " flipped")):
                    expected = plan.latents(Variant(SIDE, SIDE, crop, flip)).read(photo.digest)
                    found = file.get_tensor(f"{photo.name} {SIDE}x{SIDE} crop {crop}{word}")
                    np.testing.assert_array_equal(found, expected)


def test_an_export_of_buckets_names_each_photo_as_before(full, tmp_path, capsys):
    lab = full.copy(tmp_path / "lab").set("data", buckets=True, resolution=64)
    code, said = run(capsys, "export", lab.path, "--kind", "latents", "--out", tmp_path / "x")
    assert code == 0, said
    with safe_open(tmp_path / "x", "np") as file:
        assert sorted(file.keys()) == sorted(row["file_name"] for row in lab.captions())


def test_prompts_are_exported_with_the_empty_caption(full, tmp_path, capsys):
    lab = full.copy(tmp_path / "lab").set("train", caption_dropout=0.1)
    code, said = run(capsys, "export", lab.path, "--kind", "prompts", "--out", tmp_path / "x")
    assert code == 0, said
    with safe_open(tmp_path / "x", "np") as file:
        assert set(file.keys()) == {"", *(row["text"] for row in lab.captions())}
        np.testing.assert_array_equal(file.get_tensor(""), lab.plan.txt.read(caption_item("")))
