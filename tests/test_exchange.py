"""LoRAs in other programs' layouts, written, read, and exported from runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lora_changes import config, lora_of, write
from safetensors.numpy import load_file, save_file

from pipeline import commands
from pipeline.errors import UserError
from pipeline.exchange import lora_files, lora_names
from pipeline.exchange.change import Change
from pipeline.exchange.lora_names import TRANSFORMER
from pipeline.flux import pretrained
from pipeline.methods.lora_layers import WEIGHTS_NAME


@pytest.mark.parametrize("layout", lora_names.LAYOUTS)
def test_what_is_written_in_a_layout_is_read_back_as_it_was(tmp_path, layout):
    changes, path = lora_of(config()), tmp_path / "lora.safetensors"
    write(path, changes, layout)
    found, metadata = lora_files.read(path, config())
    assert metadata["format"] == "pt"
    for component, layers in changes.items():
        assert found[component].keys() == layers.keys()
        for name, change in layers.items():
            np.testing.assert_array_equal(found[component][name].down, change.down, name)
            np.testing.assert_array_equal(found[component][name].up, change.up, name)


def test_a_file_of_kohyas_with_dense_ups_and_alpha_is_taken_apart(tmp_path):
    """As sd-scripts trains it: one LoRA of the fused layer, whose parts share the down."""
    rng = np.random.default_rng(1)
    down, up = rng.standard_normal((4, 8)).astype(np.float32), rng.standard_normal((56, 4)).astype(np.float32)
    stem, path = "lora_unet_single_blocks_1_linear1", tmp_path / "lora.safetensors"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32(2)}
    save_file({key: np.array(value) for key, value in tensors.items()}, path)
    found, _ = lora_files.read(path, config())
    rows = np.split(up.astype(np.float64) @ down * 0.5, [8, 16, 24])
    for part, wanted in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), rows):
        delta = found[TRANSFORMER][f"single_transformer_blocks.1.{part}"].delta
        np.testing.assert_allclose(delta, wanted, atol=1e-6)


def test_a_diffusers_file_of_an_older_version_gets_the_scale_that_it_declares(tmp_path):
    path, changes = tmp_path / "lora.safetensors", lora_of(config(), lambda name: name.endswith("to_q"))
    write(path, changes, "diffusers")
    adapters = {"transformer.r": 4, "transformer.lora_alpha": 2, "text_encoder.r": 1, "text_encoder.lora_alpha": 1}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(adapters)})
    found, _ = lora_files.read(path, config())
    for name, change in changes[TRANSFORMER].items():
        np.testing.assert_allclose(found[TRANSFORMER][name].delta, change.delta / 2, rtol=1e-6)


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"something.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match="no LoRA of FLUX.1 in a layout that is known here"):
        lora_files.read(path, config())
    write(path, lora_of(config()), "kohya")
    with pytest.raises(UserError, match="outputs, but the model's has"):
        lora_files.read(path, config(heads=3))
    with pytest.raises(UserError, match="FLUX.1 has no such layer as|fewer blocks"):
        lora_files.read(path, config(double=1))
    tensors = load_file(path)
    del tensors["lora_unet_img_in.lora_up.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="lora_unet_img_in has no up; the file is incomplete"):
        lora_files.read(path, config())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        lora_files.read(path, config())
    large = {TRANSFORMER: {"x_embedder": Change(np.full((1, 16), 1e5, np.float32), np.ones((8, 1), np.float32))}}
    with pytest.raises(UserError, match="has numbers that float16 does not hold"):
        write(path, large, "diffusers", "fp16")


# --- a run's ------------------------------------------------------------------------------------------------------


def exported(lab, *arguments):
    """The LoRA in the file that the command names, read back."""
    command = ["export", str(lab.run_folder), "--model", str(lab.model), "--dtype", "fp32", *arguments]
    assert commands.main(command) == 0
    return lab, command


@pytest.mark.parametrize("layout", lora_names.LAYOUTS)
def test_a_run_is_exported_as_it_was_trained(lora_trained, tmp_path, layout, capsys):
    lab = lora_trained.copy(tmp_path / "lab")
    exported(lab, "--format", layout)
    said = capsys.readouterr().out.splitlines()[-1]
    path, _, what = said.partition(": ")
    path = Path(path)
    assert re.fullmatch(r"14 layers, rank 4, [\d.]+ kB", what)
    assert path.name == f"pytorch_lora_weights-{layout}-fp32.safetensors"
    own = config_of(lab)
    (found, metadata), (wanted, _) = (lora_files.read(each, own) for each in (path, lab.run_folder / WEIGHTS_NAME))
    assert metadata["run_id"] == lab.plan.run_id
    for name, change in wanted[TRANSFORMER].items():
        np.testing.assert_allclose(found[TRANSFORMER][name].delta, change.delta, rtol=1e-6, atol=1e-12)


def config_of(lab):
    return pretrained.checked_config(lab.model, "transformer")


def test_a_checkpoint_is_exported_with_its_scale_and_averages(encoded, tmp_path, capsys):
    lab = encoded.copy(tmp_path / "lab").set("lora", rank=4, alpha=3.0)
    lab.set("train", steps=2, ema_decay=0.9, checkpoint_every=1, learning_rate=1e-2).run("TrainLoRA")
    exported(lab, "--checkpoint", "2", "--out", str(tmp_path / "two.safetensors"))
    exported(lab, "--checkpoint", "1", "--out", str(tmp_path / "one.safetensors"))
    own = config_of(lab)
    one, two, last = (
        lora_files.read(path, own)[0][TRANSFORMER]
        for path in (tmp_path / "one.safetensors", tmp_path / "two.safetensors", lab.run_folder / WEIGHTS_NAME)
    )
    for name, change in last.items():
        np.testing.assert_allclose(two[name].delta, change.delta, rtol=1e-5, atol=1e-9)
    assert any(np.abs(one[name].delta - last[name].delta).max() > 1e-6 for name in last)
    capsys.readouterr()
    assert commands.main(["export", str(lab.run_folder), "--model", str(lab.model), "--checkpoint", "7"]) == 1
    assert "no weights of step 7; there are 1, 2" in capsys.readouterr().err


def test_a_lora_of_a_model_that_nobody_knows_here_asks_which(lora_trained, capsys):
    assert commands.main(["export", str(lora_trained.run_folder)]) == 1
    assert "name the model by --model, a folder or FLUX.1-dev, FLUX.1-schnell" in capsys.readouterr().err
