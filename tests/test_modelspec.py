"""What an exported file says of itself."""

import base64
import hashlib
import io
import json

import numpy as np
import pytest
from lora_changes import config, lora_of, write
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save

from pipeline import commands
from pipeline.exchange import lora_names
from pipeline.methods.lora_layers import WEIGHTS_NAME


def metadata_of(path) -> dict:
    with safe_open(path, "np") as file:
        return file.metadata()


def content(path) -> bytes:
    """What stands behind the header."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.parametrize("layout", lora_names.LAYOUTS)
def test_the_hash_is_of_all_bytes_behind_the_header(tmp_path, layout):
    path = tmp_path / "lora.safetensors"
    write(path, lora_of(config()), layout, "bf16")
    assert metadata_of(path)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content(path)).hexdigest()


@pytest.mark.parametrize("width", [4, 1024])
def test_kohyas_hashes_are_those_that_sd_scripts_computes(tmp_path, width):
    """`precalculate_safetensors_hashes`: of the file that safetensors writes with the ss_ metadata alone."""
    found, path = config(1, 1, heads=1, size=width), tmp_path / "lora.safetensors"
    write(path, lora_of(found, rank=8), "kohya", found=found)
    metadata = metadata_of(path)
    file = save(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    begin = 8 + int.from_bytes(file[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(file[begin:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]
    assert (len(file) > 0x110000) == (width == 1024)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "8"


def test_a_run_says_what_it_is_and_the_user_more(plainly_trained, tmp_path, capsys):
    lab = plainly_trained.copy(tmp_path / "lab")
    saved = metadata_of(lab.run_folder / WEIGHTS_NAME)
    must = {"sai_model_spec": "1.0.1", "architecture": "flux-1-dev/lora", "title": "lab", "resolution": "32x32"}
    must["implementation"] = "https://github.com/black-forest-labs/flux"
    assert {key: saved[f"modelspec.{key}"] for key in must} == must
    Image.fromarray(np.zeros((300, 600, 4), np.uint8)).save(tmp_path / "cat.png")
    out = tmp_path / "cat.safetensors"
    command = ["export", str(lab.run_folder), "--model", str(lab.model), "--out", str(out), "--title", "Käse"]
    command += ["--trigger", "sks cat", "--thumbnail", str(tmp_path / "cat.png")]
    assert commands.main(command) == 0
    found = metadata_of(out)
    assert found["modelspec.title"] == "Käse" and found["modelspec.trigger_phrase"] == "sks cat"
    kind, _, data = found["modelspec.thumbnail"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and picture.format == "JPEG" and picture.size == (256, 128)
    assert {key: found[key] for key in ("run_id", "base_model_digest", "lora")} == {
        key: saved[key] for key in ("run_id", "base_model_digest", "lora")
    }
    assert len(found["modelspec.date"]) == 19 and found["modelspec.resolution"] == "32x32"
    before = out.read_bytes()
    assert commands.main(command) == 0 and out.read_bytes() == before
    again = ["export", str(out), "--model", str(lab.model), "--format", "diffusers"]
    assert commands.main(again) == 0  # what was said stays said, and kohya's words do not
    other = metadata_of(tmp_path / "cat-diffusers-bf16.safetensors")
    assert other["modelspec.trigger_phrase"] == "sks cat" and not any(key.startswith("ss") for key in other)
    assert json.loads(other["lora_adapter_metadata"])["transformer.r"] == 4
    (tmp_path / "cat.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert commands.main(command) == 1
    assert "cat.png: " in (said := capsys.readouterr().err) and "name another picture by --thumbnail" in said


def test_a_lora_with_more_than_a_lora_is_refused(tmp_path, capsys, tiny_model):
    from safetensors.numpy import save_file

    path = tmp_path / "dora.safetensors"
    write(path, lora_of(config()), "kohya")
    save_file(load_file(path) | {"lora_unet_img_in.dora_scale": np.ones(8, np.float32)}, path)
    assert commands.main(["export", str(path), "--model", str(tiny_model)]) == 1
    assert "no plain LoRA: it has lora_unet_img_in.dora_scale" in capsys.readouterr().err
