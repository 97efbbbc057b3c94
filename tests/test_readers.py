"""A LoRA of rank 8 and alpha 3 in every layout: each reader's own rule gives the change of weight that training does.

The rules are written out from the readers' code. ComfyUI: `load_lora` and `model_lora_keys_unet` in comfy/lora.py,
`flux_to_diffusers` in comfy/utils.py, `LoRAAdapter` in comfy/weight_adapter/lora.py. sd-scripts: `LoRAModule` in
networks/lora_flux.py. diffusers: `_load_sft_state_dict_metadata`, PEFT's `LoraLayer`, and for the other layouts
`_convert_kohya_flux_lora_to_diffusers`, of which PyTorch's own run is described in docs/exchange.md.
"""

import json

import numpy as np
import pytest
from lora_changes import CLIP_LAYER, config, lora_of, write
from safetensors.numpy import load_file

from pipeline.exchange import lora_files, lora_names
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.flux import counts
from pipeline.flux.published import published_name

RANK, ALPHA = 8, 3
SIZES = {"19 + 38 blocks": config(19, 38), "FLUX.1's width": config(1, 1, heads=24, size=128)}
PARTIAL = ("to_q", "to_v", "proj_out", "ff.net.2", "norm_out.linear")


@pytest.fixture(scope="module", params=list(SIZES))
def sized(request):
    return SIZES[request.param]


@pytest.fixture(scope="module", params=["all layers", "some"])
def changes(request, sized):
    some = request.param == "some"
    return lora_of(sized, lambda name: not some or name.endswith(PARTIAL), RANK, ALPHA / RANK)


def probe(inputs: int) -> np.ndarray:
    """What changes are applied to: equal products with it are equal changes, and FLUX.1's are not formed."""
    return np.random.default_rng(inputs).standard_normal((inputs, 3))


def effect(up, down, scale=1.0) -> np.ndarray:
    return up.astype(np.float64) @ (down.astype(np.float64) @ probe(down.shape[1])) * scale


def trained(changes, sized) -> dict[str, np.ndarray]:
    """The change of each published weight, put together from the layers that were trained."""
    sizes, found = counts.transformer_layers(sized), {}
    for layer in changes[TRANSFORMER]:
        name, _, parts = published_name(layer)
        rows = []
        for part in parts:
            change = changes[TRANSFORMER].get(part)
            rows.append(effect(change.up, change.down) if change else np.zeros((sizes[part][1], 3)))
        found[name] = np.concatenate(rows)
    if (last := "final_layer.adaLN_modulation.1") in found:
        scale, shift = np.split(found[last], 2)
        found[last] = np.concatenate([shift, scale])
    return found


# --- the readers' rules -------------------------------------------------------------------------------------------


def by_alpha_tensor(tensors, stem, names=("lora_up", "lora_down")):
    """ComfyUI's and sd-scripts': up @ down * alpha / rank; ComfyUI takes 1 where there is no alpha."""
    up, down = (tensors[f"{stem}.{name}.weight"] for name in names)
    alpha = tensors.get(f"{stem}.alpha")
    return effect(up, down, 1.0 if alpha is None else float(alpha) / len(down))


def sd_scripts(path, sized, names):
    """Modules are named by the published layers with underscores; CLIP's are lora_te1_."""
    tensors = load_file(path)
    assert (
        not {key.partition(".")[0] for key in tensors}
        - {f"lora_unet_{name.replace('.', '_')}" for name in names}
        - {f"lora_te1_{CLIP_LAYER.replace('.', '_')}"}
    )
    return {name: by_alpha_tensor(tensors, f"lora_unet_{name.replace('.', '_')}") for name in names}


def comfyui(path, sized, names):
    """Published names under diffusion_model., or with underscores under lora_unet_; diffusers' under transformer."""
    tensors, found = load_file(path), {}
    for name in names:
        stems = f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}"
        present = [stem for stem in stems if f"{stem}.lora_up.weight" in tensors]
        found[name] = by_alpha_tensor(tensors, present[0]) if present else from_parts(tensors, sized, name)
    return found


def from_parts(tensors, sized, name):
    """ComfyUI applies a LoRA of diffusers' layer to the rows of the published weight that it is."""
    sizes = counts.transformer_layers(sized)
    parts = next(published_name(layer)[2] for layer in sizes if published_name(layer)[0] == name)
    rows = np.zeros((sum(sizes[part][1] for part in parts), 3))
    row = 0
    for part in parts:
        if f"transformer.{part}.lora_B.weight" in tensors:
            own = by_alpha_tensor(tensors, f"transformer.{part}", ("lora_B", "lora_A"))
            if part == "norm_out.linear":
                own = np.concatenate(np.split(own, 2)[::-1])
            rows[row : row + len(own)] = own
        row += sizes[part][1]
    return rows


@pytest.mark.parametrize("layout, reader", [("kohya", sd_scripts), *((each, comfyui) for each in lora_names.LAYOUTS)])
def test_each_reader_changes_each_weight_as_training_did(tmp_path, sized, changes, layout, reader):
    path, wanted = tmp_path / "lora.safetensors", trained(changes, sized)
    write(path, changes, layout, found=sized)
    found = reader(path, sized, wanted)
    assert found.keys() == wanted.keys()
    for name, own in wanted.items():
        np.testing.assert_allclose(found[name], own, rtol=0, atol=1e-6 * np.abs(own).max(), err_msg=name)


def test_diffusers_applies_what_the_file_declares(tmp_path, sized, changes):
    """PEFT: lora_B @ lora_A * alpha / r, of the layers that the file names; r as the file's tensors have it."""
    path = tmp_path / "lora.safetensors"
    write(path, changes, "diffusers", found=sized)
    tensors = load_file(path)
    _, metadata = lora_files.read(path, sized)
    declared = json.loads(metadata["lora_adapter_metadata"])
    for component, layers in changes.items():
        assert declared[f"{component}.lora_alpha"] == declared[f"{component}.r"] == RANK
        assert declared[f"{component}.target_modules"] == sorted(layers)
        for name, change in layers.items():
            b, a = (tensors[f"{component}.{name}.lora_{way}.weight"] for way in "BA")
            np.testing.assert_array_equal(effect(b, a), effect(change.up, change.down))
    assert not any("alpha" in key for key in tensors)  # with the metadata diffusers refuses them


def test_from_kohya_to_diffusers_and_back_nothing_changes(tmp_path, sized, changes):
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    write(first, changes, "kohya", found=sized)
    write(second, lora_files.read(first, sized)[0], "diffusers", found=sized)
    write(third, lora_files.read(second, sized)[0], "kohya", found=sized)
    assert first.read_bytes() == third.read_bytes()
    assert lora_files.read(second, sized)[0].keys() == {TRANSFORMER, CLIP}
