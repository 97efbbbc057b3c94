"""merge, extract and resize: weights that change as the LoRA says, and LoRAs that come as near as their rank allows."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from lora_changes import lora_of, write
from model_files import shard
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from single_files import published, write_single_file

from pipeline import commands
from pipeline.exchange import base_models, lora_files, low_rank, merging
from pipeline.exchange.change import Change
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.flux import models, pretrained, weights

FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def loras(tiny_model, tmp_path_factory):
    """Two LoRAs of the tiny transformer, of all layers and of some, in different layouts; and their changes."""
    folder, own = tmp_path_factory.mktemp("loras"), pretrained.checked_config(tiny_model, "transformer")
    everything, some = lora_of(own), lora_of(own, lambda name: name.endswith("to_q"), rank=2)
    del everything[CLIP], some[CLIP]
    write(folder / "all.safetensors", everything, "kohya", found=own, title="All of it")
    write(folder / "some.safetensors", some, "diffusers", found=own)
    return [folder / "all.safetensors", folder / "some.safetensors"], (everything, some)


def run(capsys, *arguments, fails=False) -> str:
    assert commands.main([str(each) for each in arguments]) == fails
    said = capsys.readouterr()
    return said.err if fails else said.out.splitlines()[-1]


def merged_by_hand(tiny_model, changes, scales) -> dict:
    found = {key: array.astype(np.float64) for key, array in load_file(tiny_model / FILE).items()}
    for each, scale in zip(changes, scales):
        for name, change in each[TRANSFORMER].items():
            found[f"{name}.weight"] += scale * change.delta
    return found


def assert_near(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("layout", ["bfl", "comfyui", "diffusers"])
def test_two_loras_go_into_a_single_file_of_any_layout(tiny_model, loras, tmp_path, layout, capsys):
    paths, changes = loras
    base, out = write_single_file(tmp_path / "flux.safetensors", tiny_model, layout), tmp_path / "merged.safetensors"
    said = run(capsys, "merge", *paths, "--into", base, "--out", out, "--scale", 0.5, -2)
    assert said.startswith(f"{out}: ") and "changed by 2 LoRAs; rounding to float32" in said
    wanted = merged_by_hand(tiny_model, changes, (0.5, -2))
    if layout != "diffusers":
        wanted = published(wanted)
    prefix = "model.diffusion_model." if layout == "comfyui" else ""
    found = load_file(out)
    assert found.pop("vae.decoder.conv_in.bias", None) is not None or layout != "comfyui"
    assert_near(found, {prefix + name: array for name, array in wanted.items()})
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    assert [each["scale"] for each in json.loads(metadata["merged"])] == [0.5, -2]
    assert metadata["modelspec.merged_from"] == "All of it, A LoRA"
    assert metadata["modelspec.architecture"] == "flux-1-dev"


def test_a_models_folder_is_merged_shard_by_shard_and_loads(checkpoint, tiny_model, loras, tmp_path, capsys):
    shard(checkpoint, "transformer", transform=lambda tensor: tensor.astype(ml_dtypes.bfloat16))
    paths, changes = loras
    out = tmp_path / "merged"
    said = run(capsys, "merge", paths[0], "--into", checkpoint, "--out", out)
    assert "rounding to bfloat16 is off by 0.0" in said
    found = {each.name for each in (out / "transformer").iterdir()}
    shards = {f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert found == shards | {"config.json", "diffusion_pytorch_model.safetensors.index.json"}
    assert pretrained.local_folder(out) == out
    own = base_models.opened(out).arrays()
    assert {array.dtype.name for array in own.values()} == {"bfloat16"}
    wanted = merged_by_hand(tiny_model, changes[:1], (1,))
    model = models.load_model(out, "transformer", "fp32")
    for parameter in model.get_parameters():
        array = wanted[weights.name_in_file(parameter.name)]
        np.testing.assert_allclose(parameter.asnumpy(), array, rtol=0, atol=1e-2 * np.abs(array).max())
    assert (out / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        tiny_model / "vae/diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_clips_part_goes_into_the_models_folder_or_nowhere(tiny_model, tmp_path, capsys):
    own, path = pretrained.checked_config(tiny_model, "transformer"), tmp_path / "clip.safetensors"
    layer = "text_model.encoder.layers.1.self_attn.q_proj"
    change = Change(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32))
    write(path, {CLIP: {layer: change}}, "comfyui", found=own)
    run(capsys, "merge", path, "--into", tiny_model, "--out", tmp_path / "merged")
    before, after = (load_file(each / "text_encoder/model.safetensors") for each in (tiny_model, tmp_path / "merged"))
    assert [name for name in before if not np.array_equal(before[name], after[name])] == [f"{layer}.weight"]
    np.testing.assert_array_equal(after[f"{layer}.weight"], before[f"{layer}.weight"] + 2)
    arguments = "merge", path, "--into", tiny_model / "transformer", "--out", tmp_path / "other"
    assert "changes CLIP too; merge it into the model's whole folder" in run(capsys, *arguments, fails=True)


@pytest.mark.parametrize("into", ["folder", "file"])
def test_what_fails_half_way_leaves_nothing(tiny_model, loras, tmp_path, into, monkeypatch, capsys):
    base = tiny_model if into == "folder" else write_single_file(tmp_path / "flux.safetensors", tiny_model)
    before = set(tmp_path.iterdir())
    added, count = merging._added, iter(range(4))

    def failing(*arguments):
        if next(count) == 3:
            raise OSError(28, os.strerror(28))
        return added(*arguments)

    monkeypatch.setattr(merging, "_added", failing)
    said = run(capsys, "merge", loras[0][0], "--into", base, "--out", tmp_path / "merged", fails=True)
    assert "No space left on device; make room, then run again" in said
    assert set(tmp_path.iterdir()) == before


def test_what_cannot_be_merged_is_one_line(tiny_model, schnell_model, loras, tmp_path, capsys):
    path, out = loras[0][0], tmp_path / "merged"
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ((path, "--into", tiny_model, "--out", tmp_path / "there"), "exists; choose another name, or remove it first"),
        ((path, "--into", tmp_path / "none", "--out", out), "no such file or folder"),
        ((tmp_path / "none", "--into", tiny_model, "--out", out), "none: no such file"),
        ((path, "--into", schnell_model, "--out", out), "FLUX.1 has no such layer as lora_unet_guidance_in_in_layer"),
        ((path, "--into", tiny_model, "--out", tmp_path / "no" / "where"), "no such folder; make it first"),
        ((path, "--into", tiny_model, "--out", out, "--scale", 1, 2), "--scale: 2 numbers for 1 LoRA"),
    ):
        said = run(capsys, "merge", *arguments, fails=True)
        assert message in said and said.count("\n") == 1, said
    assert not out.exists()


# --- extract, resize ----------------------------------------------------------------------------------------------


def test_what_was_merged_is_extracted_again(tiny_model, loras, tmp_path, capsys):
    paths, (everything, _) = loras
    base, tuned = write_single_file(tmp_path / "flux.safetensors", tiny_model), tmp_path / "tuned.safetensors"
    run(capsys, "merge", paths[0], "--into", base, "--out", tuned)
    out = tmp_path / "lora.safetensors"
    said = run(capsys, "extract", tiny_model, tuned, "--rank", 3, "--out", out)
    layers = len(everything[TRANSFORMER])
    assert re.search(rf": {layers} layers, rank 3; what is left out is \S+e-0[78] of the change, ", said), said
    found, metadata = lora_files.read(out, base_models.config_of(tiny_model))
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    for name, change in everything[TRANSFORMER].items():
        delta = change.delta
        np.testing.assert_allclose(found[TRANSFORMER][name].delta, delta, atol=1e-5 * np.abs(delta).max())
    some = run(capsys, "extract", tiny_model, tuned, "--rank", 2, "--targets", "attention", "--out", out)
    assert "14 layers, rank 2; what is left out is 0." in some and "other layers differ too" in some
    said = run(capsys, "extract", tiny_model, base, "--rank", 2, "--out", out, fails=True)
    assert "no linear layer differs" in said


def test_resized_lora_is_the_nearest_of_its_rank(tiny_model, loras, tmp_path, capsys):
    paths, (everything, _) = loras
    out = tmp_path / "smaller.safetensors"
    said = run(capsys, "resize", paths[0], "--rank", 2, "--model", tiny_model, "--out", out)
    found, _ = lora_files.read(out, base_models.config_of(tiny_model))
    rest = total = 0.0
    for name, change in everything[TRANSFORMER].items():
        left, squares, right = np.linalg.svd(change.delta, full_matrices=False)
        nearest = (left[:, :2] * squares[:2]) @ right[:2]
        np.testing.assert_allclose(found[TRANSFORMER][name].delta, nearest, atol=1e-5 * squares[0])
        rest, total = rest + (squares[2:] ** 2).sum(), total + (squares**2).sum()
    assert f"rank 2; what is left out is {np.sqrt(rest / total):.2g} of the change" in said
    said = run(capsys, "resize", paths[0], "--rank", 9, "--model", tiny_model, "--out", out)
    assert "rank 3; what is left out is 0 of the change" in said  # a rank is never raised


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (40, 500)])
def test_a_truncated_decomposition_is_as_near_as_the_exact_one(shape):
    rng = np.random.default_rng(3)
    matrix = (rng.standard_normal(shape) * 0.99 ** np.arange(shape[1])).astype(np.float32)
    change, values = low_rank.of_matrix(matrix, 16), np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    error = np.linalg.norm(matrix - change.delta)
    assert change.rank == 16 and error <= 1.002 * np.sqrt((values[16:] ** 2).sum())
    np.testing.assert_allclose((change.up**2).sum(), (change.down**2).sum(), rtol=1e-4)


def test_numbers_too_large_for_the_weights_are_not_written(tiny_model, loras, tmp_path, capsys):
    base = tmp_path / "half.safetensors"
    halves = {name: array.astype(np.float16) for name, array in load_file(tiny_model / FILE).items()}
    save_file(halves, base)
    arguments = "merge", loras[0][0], "--into", base, "--out", tmp_path / "merged.safetensors", "--scale", 1e6
    assert "has numbers that float16 does not hold" in run(capsys, *arguments, fails=True)
    assert not (tmp_path / "merged.safetensors").exists()
