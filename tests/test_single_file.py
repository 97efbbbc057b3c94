"""A transformer in one file stands for diffusers' folder: the same parameters, the same prediction, an identity."""

import os
import re

import numpy as np
import pytest
from model_files import edit_config
from safetensors.numpy import load_file, save_file
from single_files import write_single_file

from pipeline.errors import UserError
from pipeline.exchange import base_models
from pipeline.flux import models, pretrained, single_file, weights

LAYOUTS = ("bfl", "comfyui", "diffusers")


def values(model) -> dict:
    return {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_parameters_of_diffusers_folder(tiny_model, tmp_path, layout):
    path = write_single_file(tmp_path / "flux.safetensors", tiny_model, layout)
    wanted = values(models.load_model(tiny_model, "transformer", "fp32"))
    found = values(models.load_model(tiny_model, "transformer", "fp32", transformer=path))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)


def test_schnells_too(schnell_model, tmp_path):
    path = write_single_file(tmp_path / "flux.safetensors", schnell_model)
    wanted = values(models.load_model(schnell_model, "transformer", "fp32"))
    found = values(models.load_model(schnell_model, "transformer", "fp32", transformer=path))
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


def test_fused_layers_are_views_of_the_mapped_file(tiny_model, tmp_path):
    arrays = weights.mapped(write_single_file(tmp_path / "flux.safetensors", tiny_model))
    found = single_file.as_diffusers(arrays)
    fused, part = arrays["single_blocks.0.linear1.weight"], found["single_transformer_blocks.0.attn.to_k.weight"]
    assert np.shares_memory(fused, part) and part.flags.c_contiguous


def test_what_shapes_say_of_the_config_is_what_the_config_says(tiny_model, schnell_model, tmp_path):
    for model in (tiny_model, schnell_model):
        path, own = write_single_file(tmp_path / "flux.safetensors", model), pretrained.config(model, "transformer")
        found = base_models.config_of(path)
        assert found["out_channels"] == own["in_channels"]
        assert {key: found[key] for key in found if key != "out_channels"} == {
            key: own[key] for key in found if key != "out_channels"
        }


def test_an_experiment_trains_on_a_single_file_as_on_the_folder(plainly_trained, tmp_path):
    """Same bits in the LoRA; another identity, as the file is another; encoded captions and photos stay."""
    lab = plainly_trained.copy(tmp_path / "lab")
    first = lab.run_folder
    path = write_single_file(lab.folder / "flux.safetensors", lab.model)
    os.utime(path, (1e9, 1e9))
    lab.set("model", transformer="flux.safetensors").run("GetModel", "CheckRoom", "TrainLoRA")
    assert lab.run_folder != first and lab.encode() == {}
    one, other = (load_file(each / "pytorch_lora_weights.safetensors") for each in (first, lab.run_folder))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"flux.safetensors: damaged or cut short .*fetch it again"):
        lab.plan.load("transformer")


def test_what_does_not_fit_is_said(tiny_model, schnell_model, tmp_path):
    def loading(transformer):
        return pretrained.local_folder(tiny_model, transformer=transformer) and models.load_model(
            tiny_model, "transformer", "fp32", transformer=transformer
        )

    with pytest.raises(UserError, match="no such file or folder; check .model. transformer"):
        loading(tmp_path / "none.safetensors")
    (tmp_path / "flux.pt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled weights"):
        loading(tmp_path / "flux.pt")
    with pytest.raises(UserError, match=re.escape("missing weight time_text_embed.guidance_embedder.linear_1.bias")):
        loading(write_single_file(tmp_path / "schnell.safetensors", schnell_model))
    with pytest.raises(UserError, match="differs from .*check .model. transformer"):
        loading(schnell_model / "transformer")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no transformer of FLUX.1 in it"):
        base_models.opened(tmp_path / "other.safetensors")


def test_the_models_own_weights_are_not_asked_for(checkpoint, tmp_path):
    """Nor fetched from the Hub: 24 GB that would not be read."""
    path = write_single_file(tmp_path / "flux.safetensors", checkpoint)
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert pretrained.local_folder(checkpoint, transformer=path) == checkpoint
    with pytest.raises(UserError, match="missing"):
        pretrained.local_folder(checkpoint)
    assert not [pattern for pattern in pretrained._patterns("", path) if "transformer/diff" in pattern]
    edit_config(checkpoint, "transformer", num_layers=1)
    with pytest.raises(UserError, match="unexpected weight transformer_blocks.1"):
        models.load_model(checkpoint, "transformer", "fp32", transformer=path)
