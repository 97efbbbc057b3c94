"""The stages on a tiny checkpoint: what is encoded, and what runs again when something changed."""

import json
import os
import shutil

import numpy as np
import pytest
from lab import Lab

from cache import NEEDS_NAME, StoreError, caption_item, collect, read_needs
from pipeline.data import images, indexing
from pipeline.errors import UserError
from pipeline.estimate import preflight
from pipeline.flux import models, pretrained
from pipeline.training import train

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def trained(plainly_trained) -> Lab:
    return plainly_trained


@pytest.fixture
def lab(encoded, tmp_path) -> Lab:
    return encoded.copy(tmp_path / "lab")


# --- what the store holds -----------------------------------------------------------------------------------------


def test_cached_latents_are_what_the_vae_computes_bit_for_bit(encoded):
    import mindspore as ms
    from mindone.diffusers import AutoencoderKL

    plan = encoded.plan
    vae = AutoencoderKL.from_pretrained(str(encoded.model), subfolder="vae")
    for photo in plan.photos:
        pixels = images.to_array(images.fit(images.read_image(photo.path), 32, 32))
        expected = vae.encode(ms.Tensor(pixels[None]))[0].asnumpy()[0]
        np.testing.assert_array_equal(encoded.latents.read(photo.digest), expected)


def test_cached_prompts_are_what_the_text_encoders_compute_bit_for_bit(encoded):
    import mindspore as ms

    plan = encoded.plan
    for kind, tokenizer, encoder, length, output in (
        ("pooled", "tokenizer", "text_encoder", 77, 1),
        ("txt", "tokenizer_2", "text_encoder_2", 16, 0),
    ):
        tokens, model = (
            models.load_tokenizer(encoded.model, tokenizer),
            models.load_model(encoded.model, encoder, "fp32"),
        )
        for photo in plan.photos:
            ids = tokens(photo.caption, padding="max_length", max_length=length, truncation=True).input_ids
            expected = model(ms.Tensor([ids], ms.int32))[output].asnumpy()[0]
            np.testing.assert_array_equal(getattr(plan, kind).read(caption_item(photo.caption)), expected)


def test_half_precision_entries_are_kept_in_half(lab):
    lab.set("precision", preset="fp16")
    assert lab.encode() == {"EncodeCLIP": 3, "EncodeT5": 3, "EncodeImages": 3}
    photo = lab.plan.photos[0]
    assert lab.latents.read(photo.digest).dtype == np.float16
    assert lab.plan.txt.read(caption_item(photo.caption)).dtype == np.float16


# --- what is encoded again ----------------------------------------------------------------------------------------


def test_rerun_encodes_nothing(lab):
    assert lab.encode() == {}


def test_another_learning_rate_trains_again_and_encodes_nothing(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab")
    assert lab.done("TrainLoRA")
    lab.set("train", learning_rate=2e-3)
    assert lab.encode() == {}
    assert not lab.done("TrainLoRA")


def add_photo(lab):
    """One more photo, with the caption of another one."""
    images.read_image(lab.pictures / "00000.png").rotate(90).save(lab.pictures / "extra.png")
    lab.write_captions([*lab.captions(), {"file_name": "extra.png", "text": lab.captions()[0]["text"]}])
    lab.settle()


def test_one_more_photo_encodes_one_latent(lab):
    add_photo(lab)
    assert lab.encode() == {"EncodeImages": 1}


def test_one_edited_caption_encodes_it_with_clip_and_with_t5(lab):
    rows = lab.captions()
    rows[1]["text"] += ", slightly blurred"
    lab.write_captions(rows)
    assert lab.encode() == {"EncodeCLIP": 1, "EncodeT5": 1}


def test_two_photos_with_one_caption_share_its_entry(lab):
    rows = lab.captions()
    rows[1]["text"] = rows[2]["text"] = "the very same words"
    lab.write_captions(rows)
    assert lab.encode() == {"EncodeCLIP": 1, "EncodeT5": 1}


def test_a_renamed_photo_is_not_encoded_again(lab):
    rows = lab.captions()
    shutil.move(lab.pictures / rows[0]["file_name"], lab.pictures / "renamed.png")
    rows[0]["file_name"] = "renamed.png"
    lab.write_captions(rows)
    assert lab.encode() == {}


@pytest.mark.parametrize(
    "component, stage", [("text_encoder", "EncodeCLIP"), ("text_encoder_2", "EncodeT5"), ("vae", "EncodeImages")]
)
def test_one_byte_of_an_encoder_encodes_all_of_its_entries_and_no_others(encoded, tmp_path, component, stage):
    lab = encoded.copy(tmp_path / "lab", own_model=True)
    assert lab.encode() == {}
    weights = pretrained.weight_files(lab.model, component)[0]
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the lowest bit of the last float32
    weights.write_bytes(content)
    assert lab.encode() == {stage: 3}


def test_what_a_colleague_has_encoded_is_read_and_new_entries_go_to_ones_own_store(encoded, tmp_path):
    theirs = encoded.copy(tmp_path / "theirs")
    mine = theirs.copy(tmp_path / "mine").set("paths", store=["own", "../theirs/store"])
    before = {path: path.stat().st_mtime_ns for path in (theirs.folder / "store").rglob("*")}
    assert mine.encode() == {}
    add_photo(mine)
    assert mine.encode() == {"EncodeImages": 1}
    mine.run("TrainLoRA")
    assert {path: path.stat().st_mtime_ns for path in (theirs.folder / "store").rglob("*")} == before
    assert len(list((mine.folder / "own/entries").glob("latents-*/segments/*"))) == 1


def test_a_store_that_is_not_there_is_not_encoded_again_unseen(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab").set("paths", store=["store", "/no/such/store"])
    assert not lab.done("EncodeT5")
    with pytest.raises(StoreError, match=r"^/no/such/store: this store is not there; mount it, or take it out of"):
        lab.run("EncodeT5")


def test_a_run_says_what_it_needs_and_the_collector_keeps_it(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab")
    keep = read_needs(lab.run_folder / NEEDS_NAME)
    assert not any(collect(lab.folder / "store", keep, 0))
    add_photo(lab)
    assert lab.encode() == {"EncodeImages": 1}
    assert [garbage.items for garbage in collect(lab.folder / "store", keep, 0)] == [1, 0, 0]
    assert lab.encode() == {"EncodeImages": 1}


def test_nothing_is_collected_under_a_running_stage(encoded, tmp_path, monkeypatch):
    lab, begin, found = encoded.copy(tmp_path / "lab"), train.begin, []

    def collect_and_begin(plan):
        found.append(collect(plan.store.path, {}, 0))
        begin(plan)

    monkeypatch.setattr(train, "begin", collect_and_begin)
    lab.run("TrainLoRA")
    assert not any(found[0])
    assert any(collect(lab.folder / "store", {}, 0))


def test_a_damaged_entry_is_encoded_again_alone(lab):
    (segment,) = lab.latents.segments_path.iterdir()
    (shard,) = segment.glob("c.*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    for photo in lab.plan.photos:
        try:
            lab.latents.read(photo.digest)
        except Exception as error:
            assert "latents" in str(error)
    assert lab.encode() == {"EncodeImages": 1}


@pytest.mark.parametrize("file, size", [("c.0.0", -3), ("keys", -1)])
def test_a_segment_that_is_cut_short_is_named_and_encoded_again(lab, capfd, file, size):
    (path,) = lab.folder.glob(f"store/entries/pooled-*/segments/*/{file}")
    os.truncate(path, path.stat().st_size + size)
    assert lab.encode() == {"EncodeCLIP": 3}
    said = capfd.readouterr()
    assert f"{path.parent.name} is not whole, so that its entries are encoded again" in said.out + said.err


def test_a_vae_with_another_scaling_factor_encodes_nothing_and_trains_again(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab", own_model=True)
    assert lab.done("TrainLoRA")
    path = lab.model / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))
    assert lab.encode() == {} and not lab.done("TrainLoRA")


def test_a_renamed_photo_is_not_trained_again(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab")
    rows = lab.captions()
    shutil.move(lab.pictures / rows[0]["file_name"], lab.pictures / "zzz.png")
    rows[0]["file_name"] = "zzz.png"
    lab.write_captions(rows)
    assert lab.encode() == {} and lab.done("TrainLoRA")


@pytest.mark.parametrize("stage", ["GetModel", "CheckData", "EncodeCLIP", "TrainLoRA"])
def test_a_stage_run_again_is_no_error_and_still_done(trained, stage):
    before = len(list(trained.folder.rglob("zarr.json")))
    assert trained.run(stage).done(stage)
    assert len(list(trained.folder.rglob("zarr.json"))) == before


def test_a_store_that_cannot_remember_files_is_said_so(lab):
    facts = lab.folder / "store" / "facts.sqlite"
    facts.unlink()
    facts.mkdir()
    with pytest.raises(UserError, match="facts.sqlite: cannot keep what was learnt"):
        lab.run("CheckData")


def test_records_say_which_dtypes_were_found(encoded, trained):
    outcome = encoded.record("EncodeT5")["outcome"]
    assert set(outcome["precision"]["parameters"]) == {"float32"} and outcome["precision"]["output"] == "float32"
    found = trained.record("TrainLoRA")["outcome"]
    assert found["precision"]["transformer"] == {"parameters": {"float32": 1_867_712}, "output": "float32"}
    assert found["precision"]["lora"] == {"parameters": {"float32": found["trained_parameters"]}, "output": "float32"}


def test_a_full_disk_is_said_before_the_training(lab, monkeypatch):
    usage = preflight.shutil.disk_usage(lab.folder)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="1 kB are free"):
        lab.run("TrainLoRA")


def test_bad_photos_are_reported_before_anything_is_encoded(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab")
    shutil.rmtree(lab.folder / "store")
    (lab.pictures / "00001.png").write_bytes(b"")
    (lab.pictures / "00002.png").write_bytes(b"not an image")
    with pytest.raises(UserError) as error:
        lab.run("EncodeCLIP")
    assert "00001.png" in str(error.value) and "00002.png" in str(error.value)
    assert not list((lab.folder / "store").rglob("zarr.json"))


def test_a_photo_that_changes_after_the_check_is_not_stored_under_its_old_address(lab):
    photo = lab.plan.photos[0]
    images.read_image(lab.pictures / "00001.png").save(photo.path)
    with pytest.raises(UserError, match="changed since"):
        indexing.read_photo(photo)
