"""What is addressed is what was read: files that are replaced while a stage starts leave nothing wrong behind."""

import os

import numpy as np
import pytest
from model_files import edit, single_file
from pairs import plan_of

from cache import StoreError
from pipeline.devices import tensors
from pipeline.flux import models

pytestmark = pytest.mark.usefixtures("cpu")

PARTS = {
    "EncodeCLIP": ("text_encoder", "tokenizer"),
    "EncodeT5": ("text_encoder_2", "tokenizer_2"),
    "EncodeImages": ("vae",),
    "TrainLoRA": ("transformer",),
}


def double(folder, component):
    """Other weights, of the same size and time of modification."""
    path = single_file(folder, component)
    before = path.stat()
    edit(folder, component, lambda tensors: tensors.update({name: 2 * value for name, value in tensors.items()}))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def change_token(folder, component):
    """Another tokenizer, of the same size and time of modification."""
    path = folder / component / "tokenizer.json"
    before, text = path.stat(), path.read_text()
    changed = text.replace('"single_word": false', '"single_word":  true', 1)
    path.write_text(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed != text and path.stat().st_size == before.st_size


def swapping(monkeypatch, name, component, swap):
    """Let ``swap`` happen just before the stage opens the component's files."""
    load = getattr(models, name)

    def swapped(folder, wanted, *options):
        if wanted == component:
            swap(folder, component)
        return load(folder, wanted, *options)

    monkeypatch.setattr(models, name, swapped)


@pytest.mark.parametrize("stage, component", [(stage, part) for stage, parts in PARTS.items() for part in parts])
def test_what_is_swapped_between_its_digest_and_its_load_ends_the_stage_and_nothing_is_kept(
    encoded, tmp_path, monkeypatch, stage, component
):
    lab = encoded.copy(tmp_path / "lab", own_model=True)
    lab.set("data", max_sequence_length=24, resolution=64)  # so that there is something to encode
    if stage == "EncodeCLIP":
        double(lab.model, "text_encoder")
    if stage == "TrainLoRA":
        lab.encode()
    is_tokenizer = component.startswith("tokenizer")
    name, swap = ("load_tokenizer", change_token) if is_tokenizer else ("load_model", double)
    swapping(monkeypatch, name, component, swap)
    before = {path: path.stat().st_mtime_ns for path in lab.folder.glob("store/entries/*/segments/*")}
    with pytest.raises(StoreError, match=rf"{component}/[\w.]+: was replaced or written to after its digest"):
        lab.run(stage)
    assert {path: path.stat().st_mtime_ns for path in lab.folder.glob("store/entries/*/segments/*")} == before
    assert not list(lab.folder.glob("runs/*/result.json")) and not list(lab.folder.glob("runs/*/*.safetensors"))


def test_weights_that_are_swapped_for_others_of_equal_size_and_time_have_another_address(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab", own_model=True)
    assert lab.done("EncodeImages") and lab.done("EncodeT5")
    double(lab.model, "vae")
    assert not lab.done("EncodeImages") and lab.done("EncodeT5")


def test_weights_that_are_written_to_while_images_are_encoded_end_the_stage(encoded, tmp_path, monkeypatch):
    """The pages of a mapped file are read when they are used."""
    lab = encoded.copy(tmp_path / "lab", own_model=True).set("data", resolution=64)
    path, seen = single_file(lab.model, "vae"), []

    def write_after_the_first(source, *rest, encode=tensors.as_input, **options):
        seen.append(source)
        if len(seen) == 2:
            with open(path, "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(np.float32(0.5).tobytes())
        return encode(source, *rest, **options)

    monkeypatch.setattr(tensors, "as_input", write_after_the_first)
    with pytest.raises(StoreError, match="was replaced or written to"):
        lab.run("EncodeImages")
    assert len(seen) == 2 and len(lab.latents.missing([photo.digest for photo in lab.plan.photos])) >= 2


def test_a_controlnet_that_is_swapped_after_its_digest_was_taken_trains_nothing(encoded_pairs, tmp_path, monkeypatch):
    lab = encoded_pairs.copy(tmp_path / "lab")
    origin = lab.folder / "origin"
    lab.run("TrainControlNet")
    (plan_of(lab).run.path / "controlnet").rename(origin)
    lab.set("controlnet", init_from=str(origin))
    weights = origin / "diffusion_pytorch_model.safetensors"

    def rewrite(folder, component):
        weights.write_bytes(weights.read_bytes())

    swapping(monkeypatch, "load_model", "controlnet", rewrite)
    with pytest.raises(StoreError, match="origin/.*: was replaced or written to"):
        lab.run("TrainControlNet")
    assert not (plan_of(lab).run.path / "result.json").exists()
