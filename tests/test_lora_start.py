"""[lora] init_from: a training begins from a LoRA in any layout, changing nothing of what it predicts."""

import numpy as np
import pytest
from lora_changes import lora_of, write

from pipeline.errors import UserError
from pipeline.exchange import lora_files, lora_names
from pipeline.exchange.change import Change
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.flux import counts, pretrained
from pipeline.methods import LORA
from pipeline.methods.lora_layers import WEIGHTS_NAME
from pipeline.settings.values import LORA_TARGETS

pytestmark = pytest.mark.usefixtures("cpu")


def is_target(name):
    return any(counts.is_meant(name, target) for target in LORA_TARGETS["attention"])


@pytest.fixture
def lab(encoded, tmp_path):
    return encoded.copy(tmp_path / "lab").set("lora", rank=4, alpha=3.0, init_from="first.safetensors")


def first_file(lab, layout="diffusers", wanted=is_target, rank=3):
    own = pretrained.checked_config(lab.model, "transformer")
    changes = lora_of(own, wanted, rank, scale=0.01)
    del changes[CLIP]
    write(lab.folder / "first.safetensors", changes, layout, found=own)
    lab.settle()
    return changes[TRANSFORMER]


def made(lab):
    """What the LoRA that training begins with changes, by layer; and lora_A of one."""
    plan = lab.plan
    frozen = plan.load_frozen()
    trainee = LORA.make(plan, frozen)
    path = trainee.save(lab.folder, {each.name: each for each in trainee.trained}, {})
    return lora_files.read(path, plan.config(TRANSFORMER))[0][TRANSFORMER]


@pytest.mark.parametrize("layout", lora_names.LAYOUTS)
def test_a_training_begins_with_the_change_of_the_file(lab, layout):
    wanted = first_file(lab, layout)
    found = made(lab)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert found[name].rank == 4
        np.testing.assert_allclose(found[name].delta, change.delta, atol=1e-6 * np.abs(change.delta).max())
        assert np.abs(found[name].down[3]).max() > 0  # the rank that the file lacks begins as ever, and can learn


def test_layers_that_the_file_lacks_begin_as_without_it(lab):
    wanted = first_file(lab, wanted=lambda name: name.endswith("to_q"))
    found = made(lab)
    assert set(wanted) < set(found)
    assert not any(found[name].up.any() for name in found.keys() - wanted.keys())


def test_a_dense_fused_layer_of_kohyas_is_taken_apart_without_loss(lab):
    """As sd-scripts trains it: q, k and v share the down, and nothing of proj_mlp is in it here."""
    own, rng = pretrained.checked_config(lab.model, "transformer"), np.random.default_rng(2)
    down, up = rng.standard_normal((4, 128), np.float32), rng.standard_normal((384, 4), np.float32) / 100
    stem, tensors = "lora_unet_double_blocks_0_img_attn_qkv", {}
    tensors |= {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": np.array(2, np.float32),
    }
    from safetensors.numpy import save_file

    save_file(tensors, lab.folder / "first.safetensors")
    lab.settle()
    found, whole = made(lab), up.astype(np.float64) @ down / 2
    assert own["num_attention_heads"] * own["attention_head_dim"] == 128
    for name, rows in zip(("to_q", "to_k", "to_v"), np.split(whole, 3)):
        delta = found[f"transformer_blocks.0.attn.{name}"].delta
        np.testing.assert_allclose(delta, rows, atol=1e-6 * np.abs(rows).max())


def test_the_bytes_of_the_file_are_in_the_identity_and_its_name_is_not(lab):
    first_file(lab)
    one = lab.plan.run_id
    (lab.folder / "first.safetensors").rename(lab.folder / "second.safetensors")
    assert lab.set("lora", init_from="second.safetensors").plan.run_id == one
    first_file(lab, rank=2)
    assert lab.set("lora", init_from="first.safetensors").plan.run_id != one
    without = lab.set("lora", init_from="").plan
    assert without.run_id != one and "init_from" not in without.decisive["lora"]


def test_training_goes_on_from_a_runs_own_result(plainly_trained, tmp_path):
    lab = plainly_trained.copy(tmp_path / "lab")
    first = lab.run_folder / WEIGHTS_NAME
    before, _ = lora_files.read(first, lab.plan.config(TRANSFORMER))
    lab.set("lora", init_from=str(first.relative_to(lab.folder))).set("train", steps=1, learning_rate=1e-12)
    lab.run("CheckRoom", "TrainLoRA")
    found, metadata = lora_files.read(lab.run_folder / WEIGHTS_NAME, lab.plan.config(TRANSFORMER))
    assert metadata["init_from"] == lab.plan.store.facts.file_digest(first)
    for name, change in before[TRANSFORMER].items():
        np.testing.assert_allclose(found[TRANSFORMER][name].delta, change.delta, atol=1e-6 * np.abs(change.up).max())


def test_what_does_not_fit_is_said_before_anything_is_encoded(lab):
    def checking(message):
        with pytest.raises(UserError, match=message):
            LORA.num_trained(lab.experiment, lab.plan.family, lab.plan.config)

    first_file(lab, rank=6)
    checking(r"first.safetensors: of rank 6, and lora.rank is 4; .*resize --rank 4 first.safetensors")
    first_file(lab, wanted=lambda name: name.endswith(("to_q", "proj_mlp")))
    checking(r"changes layers that lora.targets does not train, single_transformer_blocks.0.proj_mlp, ")
    own, layer = pretrained.checked_config(lab.model, "transformer"), "text_model.encoder.layers.1.self_attn.q_proj"
    change = Change(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32))
    write(lab.folder / "first.safetensors", {CLIP: {layer: change}}, "kohya", found=own)
    checking("changes CLIP too; set lora.train_text_encoder = true")
    (lab.folder / "first.safetensors").unlink()
    checking("first.safetensors: no such file")
    with pytest.raises(UserError, match=r"no such file; check .lora. init_from"):
        _ = lab.plan.run_id
