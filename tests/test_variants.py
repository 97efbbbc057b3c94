"""Flips, crops, buckets, resolutions, repeats and dropped captions: what is encoded for them, and under which address.

What a variant's picture is, is worked out here anew, with Pillow alone.
"""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from lab import Lab
from PIL import Image, ImageOps
from safetensors import safe_open
from shaped import BUCKETS, NUM, SIDE, SIZES, full_lab, plan_of, shaped_lab

from cache import __main__ as command_line
from cache import caption_item, digest, recipe_id
from pipeline.data import images, indexing, variants
from pipeline.data.buckets import bucket_sizes, choose
from pipeline.data.variants import Variant
from pipeline.flux import models, pretrained
from pipeline.plan.needs import needed
from pipeline.process.stopping import Stopped, StopRequest
from pipeline.settings.fields import Data

pytestmark = pytest.mark.usefixtures("cpu")

SQUARE = Variant(SIDE, SIDE)


@pytest.fixture(scope="module")
def plain(cpu, tiny_model, tmp_path_factory) -> Lab:
    """Shared by all tests here: copy it before changing a byte."""
    return shaped_lab(tmp_path_factory.mktemp("variants") / "lab", tiny_model)


@pytest.fixture
def lab(plain, tmp_path) -> Lab:
    return plain.copy(tmp_path / "lab")


@pytest.fixture(scope="module")
def full(plain, tmp_path_factory) -> Lab:
    return full_lab(plain, tmp_path_factory.mktemp("full") / "lab")


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
    expected = {photo.digest: choose(photo.width, photo.height, bucket_sizes(64)) for photo in plan.photos}
    found = {}
    for need in plan.image_needs:
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
    item = next(photo.digest for photo in plan.photos if (photo.width, photo.height) == (40, 130))
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
    monkeypatch.setattr(pretrained, "component_digest", lambda *arguments: RECIPE["encoder"])
    plan = plan_of(plain, data={"resolution": 64})
    (variant,) = plan.variants(plan.photos[0])
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
    plan = plan if photos is None else plan.of(photos)
    return [need.entries.id for need in plan.image_needs], plan.run_id


@pytest.mark.parametrize("settings, num_recipes", [
    ({"flip": True}, 2), ({"crops": 1}, 1), ({"crops": 4}, 4), ({"crops": 2, "flip": True}, 4), ({"repeats": 2}, 1),
    ({"resolution": (16, 32)}, 2), (BUCKETS, 4),
])  # fmt: skip
def test_every_knob_of_the_data_is_another_run(plain, settings, num_recipes):
    recipes, run = ids(plain, data=settings)
    assert len(set(recipes)) == len(recipes) == num_recipes
    assert run != ids(plain)[1]


def test_a_knob_that_changes_nothing_is_no_other_run(plain):
    squares = [photo for photo in plain.plan.photos if photo.width == photo.height]
    assert ids(plain, squares, data={"buckets": True}) == ids(plain, squares)
    assert ids(plain, data={"resolution": (SIDE,)}) == ids(plain)
    assert ids(plain, data={"resolution": (16, SIDE)}) == ids(plain, data={"resolution": (SIDE, 16)})
    for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
        assert ids(plain, train={name: 77}) == ids(plain)


def test_what_decides_a_run_is_named(plain):
    plan = plan_of(plain, data={"flip": True}, train={"learning_rate": 0.25})
    decisive = plan.decisive
    assert decisive["train"]["learning_rate"] == 0.25 and decisive["data"]["flip"] is True
    assert decisive["entries"]["latents"] == [plan.latents(Variant(SIDE, SIDE, "centre", f)).id for f in (False, True)]
    first = plan.photos[0]
    assert json.loads(decisive["data"]["samples"])[0] == [first.digest, caption_item(first.caption), 32, 32]
    assert not {"log_every", "checkpoint_every", "keep_checkpoints"} & decisive["train"].keys()
    assert str(plain.folder) not in json.dumps(decisive) and "pictures" not in json.dumps(decisive)


# --- planning -----------------------------------------------------------------------------------------------------


def test_samples_and_variants_of_a_photo():
    photo = indexing.IndexedPhoto(folder="", name="a.png", caption="a", digest="0" * 32, width=400, height=300)
    assert variants.sizes(Data(resolution=(768, 512)), photo) == [(512, 512), (768, 768)]
    assert variants.sizes(Data(buckets=True), photo) == [(592, 448)]
    assert variants.of_size(Data(crops=2, flip=True), (512, 512)) == [
        Variant(512, 512, 0, False), Variant(512, 512, 0, True), Variant(512, 512, 1, False), Variant(512, 512, 1, True)
    ]  # fmt: skip


def test_samples_are_all_photos_at_all_their_sizes_in_turn_as_often_as_photos_are_repeated(plain):
    plan = plan_of(plain, data={"resolution": (SIDE, 16), "repeats": 2})
    photos = plan.photos
    samples = plan.examples
    expected = [(photo, (side, side)) for photo in photos for side in (16, SIDE)] * 2
    assert list(samples) == expected and len(samples) == 4 * len(photos)
    assert samples.sizes == [size for _, size in expected] and samples[-1] == expected[-1]


def test_two_files_with_the_same_bytes_are_encoded_once_and_count_twice(plain):
    plan = plan_of(plain, data={"flip": True})
    photo = plan.photos[0]
    twins = [photo, photo._replace(name="copy.png", caption="another")]
    plan = plan.of(twins)
    assert [need.items for need in plan.image_needs] == [(photo.digest,)] * 2
    assert [sample.photo.caption for sample in plan.examples] == [photo.caption, "another"]


# --- the store's tools --------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str]:
    capsys.readouterr()
    code = command_line.main([str(argument) for argument in arguments])
    return code, "".join(capsys.readouterr())


def test_each_recipe_is_a_need_of_its_own(full):
    plan = plan_of(full, data={"flip": True, "crops": 2}, train={"caption_dropout": 0.1})
    clip, t5, *latents = needed(plan)
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
        for photo in plan.photos:
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
