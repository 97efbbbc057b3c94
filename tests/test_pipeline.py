"""The stages on a tiny checkpoint: what is encoded, when it is encoded again, and what training makes of it."""

import json
import shutil

import numpy as np
import pytest
from lab import Lab

from cache import NEEDS_NAME, StoreError, caption_item, collect, read_needs
from pipeline import checkpoints, models
from pipeline.data import images, indexing
from pipeline.errors import UserError
from pipeline.networks import lora
from pipeline.planning import preflight
from pipeline.training import guard, loop, measure, metrics, train
from pipeline.training.batches import Batches
from pipeline.training.loss import item_loss, tensors_of

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def encoded(cpu, tiny_model, tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("encoded") / "lab", tiny_model)
    assert lab.encode() == {"EncodeCLIP": 3, "EncodeT5": 3, "EncodeImages": 3}
    return lab


@pytest.fixture(scope="module")
def trained(encoded, tmp_path_factory) -> Lab:
    return encoded.copy(tmp_path_factory.mktemp("trained") / "lab").run("TrainLoRA")


@pytest.fixture
def lab(encoded, tmp_path) -> Lab:
    return encoded.copy(tmp_path / "lab")


# --- what the store holds -----------------------------------------------------------------------------------------


def test_cached_latents_are_what_the_vae_computes_bit_for_bit(encoded):
    import mindspore as ms
    from mindone.diffusers import AutoencoderKL

    plan = encoded.plan
    vae = AutoencoderKL.from_pretrained(str(encoded.model), subfolder="vae")
    for photo in plan.photos():
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
        for photo in plan.photos():
            ids = tokens(photo.caption, padding="max_length", max_length=length, truncation=True).input_ids
            expected = model(ms.Tensor([ids], ms.int32))[output].asnumpy()[0]
            np.testing.assert_array_equal(getattr(plan, kind).read(caption_item(photo.caption)), expected)


def test_half_precision_entries_are_kept_in_half(lab):
    lab.set("precision", preset="fp16")
    assert lab.encode() == {"EncodeCLIP": 3, "EncodeT5": 3, "EncodeImages": 3}
    photo = lab.plan.photos()[0]
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
    weights = checkpoints.weight_files(lab.model, component)[0]
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
    lab, do_train, found = encoded.copy(tmp_path / "lab"), train.train, []

    def collect_and_train(plan, *arguments):
        found.append(collect(plan.store.path, {}, 0))
        return do_train(plan, *arguments)

    monkeypatch.setattr(train, "train", collect_and_train)
    lab.run("TrainLoRA")
    assert not any(found[0])
    assert any(collect(lab.folder / "store", {}, 0))


def test_a_damaged_entry_is_encoded_again_alone(lab):
    (segment,) = lab.latents.segments_path.iterdir()
    (shard,) = segment.glob("c.*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    for photo in lab.plan.photos():
        try:
            lab.latents.read(photo.digest)
        except Exception as error:
            assert "latents" in str(error)
    assert lab.encode() == {"EncodeImages": 1}


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
    with pytest.raises(UserError, match="1.0 kB are free"):
        lab.run("TrainLoRA")


# --- training -----------------------------------------------------------------------------------------------------


def test_training_again_gives_the_same_bytes(trained, lab):
    lab.run("TrainLoRA")
    name = lora.WEIGHTS_NAME
    assert (lab.run_folder / name).read_bytes() == (trained.run_folder / name).read_bytes()


def losses_of(lab: Lab) -> list[float]:
    return [json.loads(line)["loss"] for line in (lab.run_folder / metrics.METRICS_NAME).read_text().splitlines()]


def test_compiled_training_has_the_losses_of_pynative(trained, lab):
    lab.set("train", mode="jit").run("TrainLoRA")
    np.testing.assert_allclose(losses_of(lab), losses_of(trained), rtol=1e-5)


def test_metrics_have_one_line_per_step(trained):
    lines = [json.loads(line) for line in (trained.run_folder / metrics.METRICS_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["lr"] == 1e-3 and np.isfinite(line["loss"]) and line["step_seconds"] > 0 for line in lines)


def test_the_saved_lora_has_diffusers_keys_and_names_its_origin(trained):
    from safetensors import safe_open

    with safe_open(trained.run_folder / lora.WEIGHTS_NAME, "np") as file:
        keys, metadata = set(file.keys()), file.metadata()
        shape, dtype = file.get_slice(sorted(keys)[0]).get_shape(), file.get_slice(sorted(keys)[0]).get_dtype()
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight" in keys
    assert "transformer.single_transformer_blocks.1.attn.to_v.lora_A.weight" in keys
    assert len(keys) == 2 * (2 * 4 + 2 * 3)
    assert shape == [4, 128] and dtype == "F32"
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert set(adapter) == {f"transformer.{key}" for key in lora.ADAPTER_SETTINGS}
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"], adapter["transformer.peft_type"]) == (
        4,
        4,
        "LORA",
    )
    assert adapter["transformer.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    assert metadata["run_id"] == trained.plan.run_id(trained.plan.photos())
    assert metadata["step"] == "3" and json.loads(metadata["precision"])["preset"] == "fp32"


def test_mindone_loads_the_saved_lora_and_predicts_what_training_ended_with(trained):
    from mindone.diffusers import FluxTransformer2DModel

    plan, photos = trained.plan, trained.plan.photos()
    batch = Batches(plan, photos).evaluation(0, 2)
    ours = models.load_model(plan.checkpoint, "transformer", "fp32")
    adapted = lora.Adapted({"transformer": ours}, plan.experiment.lora, plan.precision.trained, seed=7)
    arguments = tensors_of(plan, ours)(batch)
    base = item_loss(ours)(*arguments).asnumpy()
    adapted.load(trained.run_folder / lora.WEIGHTS_NAME)
    theirs = FluxTransformer2DModel.from_pretrained(str(plan.checkpoint), subfolder="transformer")
    theirs.load_lora_adapter(str(trained.run_folder), weight_name=lora.WEIGHTS_NAME, prefix="transformer")
    found = item_loss(theirs.set_train(False))(*arguments).asnumpy()
    np.testing.assert_allclose(found, item_loss(ours)(*arguments).asnumpy(), rtol=1e-5)
    assert np.abs(found - base).max() > 1e-4


def test_flux_schnell_format_trains_without_guidance(cpu, encoded, tiny_model, tmp_path):
    from pipeline.synthetic import tiny

    lab = encoded.copy(tmp_path / "lab")
    tiny.write_tiny_model(tmp_path / "schnell", guidance_embeds=False)
    lab.model = tmp_path / "schnell"
    lab.set("model", path=str(lab.model)).settle()
    assert lab.encode() == {}  # same seed, same encoders
    assert lab.run("TrainLoRA").done("TrainLoRA")


def test_half_precision_training_keeps_the_trained_parameters_in_fp32(lab):
    from safetensors.numpy import load_file

    lab.set("precision", preset="fp16").encode()
    lab.run("TrainLoRA")
    weights = load_file(lab.run_folder / lora.WEIGHTS_NAME)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    assert any(np.abs(value).max() > 0 for key, value in weights.items() if "lora_B" in key)


def test_the_loss_falls_by_more_than_three_standard_errors(lab):
    lab.set("train", steps=40, learning_rate=3e-3, mode="jit").run("TrainLoRA", "MeasureLoss")
    result = json.loads((lab.run_folder / measure.LOSS_NAME).read_text())
    assert result["pairs"] == 64
    assert result["gain"] > 3 * result["standard_error"] > 0
    assert result["gain"] == pytest.approx(result["before"] - result["after"])


def test_a_changed_frozen_weight_is_named(encoded):
    transformer = models.load_model(encoded.model, "transformer", "fp32")
    before = guard.frozen_digests({"transformer": transformer})
    lora.inject(transformer, encoded.experiment.lora, encoded.plan.precision.trained, seed=0)
    guard.check_frozen({"transformer": transformer}, before)
    name = "transformer_blocks.1.attn.to_q.weight"
    parameter = next(p for p in transformer.get_parameters() if p.name.replace(".base_layer.", ".") == name)
    lora.set_values(
        parameter, parameter.asnumpy() + np.float32(1e-6) * (np.arange(parameter.size) == 5).reshape(parameter.shape)
    )
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        guard.check_frozen({"transformer": transformer}, before)


@pytest.mark.parametrize(
    "targets, message",
    [
        (("to_q", "nothing"), "no module of the transformer is named nothing"),
        ("everything", "no preset"),
        (("to_out",), "to_out is a CellList, expected linear layers"),
        (("norm_q",), "norm_q is a RMSNorm, expected linear layers"),
        (("single_transformer_blocks.*.nothing",), "no module of the transformer is named single_transformer_blocks"),
    ],
)
def test_lora_targets_must_be_linear_layers_that_exist(encoded, targets, message):
    settings = type(encoded.experiment.lora)(targets=targets)
    transformer = models.load_model(encoded.model, "transformer", "fp32")
    with pytest.raises(UserError, match=message):
        lora.inject(transformer, settings, encoded.plan.precision.trained, seed=0)


def test_lora_parameters_are_counted_as_its_shapes_say(encoded):
    """Per target: rank * (inputs + outputs); both kinds of blocks have width 128 here."""
    transformer = models.load_model(encoded.model, "transformer", "fp32")
    settings = type(encoded.experiment.lora)(rank=3)
    trained = lora.inject(transformer, settings, encoded.plan.precision.trained, seed=0)
    assert sum(parameter.size for parameter in trained) == 3 * (128 + 128) * (2 * 4 + 2 * 3)


def test_all_linear_trains_every_linear_layer_of_the_blocks_but_modulation(encoded):
    from mindspore import mint

    transformer = models.load_model(encoded.model, "transformer", "fp32")
    linear = {name for name, cell in transformer.cells_and_names() if isinstance(cell, mint.nn.Linear)}
    expected = {name for name in linear if "transformer_blocks" in name and ".norm" not in name}
    settings = type(encoded.experiment.lora)(targets="all-linear")
    trained = lora.inject(transformer, settings, encoded.plan.precision.trained, seed=0)
    assert {parameter.name.partition(".lora_")[0] for parameter in trained} == expected


def test_two_processes_do_not_train_one_run(lab):
    lab.run_folder.mkdir(parents=True, exist_ok=True)
    with loop.locked(lab.run_folder), pytest.raises(UserError, match="another process"):
        lab.run("TrainLoRA")


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_no_lora(lab):
    lab.set("train", learning_rate=1e30, steps=5)
    with pytest.raises(UserError, match="the loss is"):
        lab.run("TrainLoRA")
    assert not lab.done("TrainLoRA") and not (lab.run_folder / lora.WEIGHTS_NAME).exists()


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
    photo = lab.plan.photos()[0]
    images.read_image(lab.pictures / "00001.png").save(photo.path)
    with pytest.raises(UserError, match="changed since"):
        indexing.read_photo(photo)
