"""The model that comes with the package: whole, small, of the right format, and that it paints."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.data import images
from pipeline.flux import flow, models, pretrained
from pipeline.settings.experiment import EMBEDDED
from pipeline.synthetic import shapes

FOLDER = EMBEDDED
WEIGHTS = sorted(FOLDER.rglob("*.safetensors"))


def test_it_is_whole_and_takes_at_most_15_megabytes():
    assert pretrained.local_folder(FOLDER) == FOLDER
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 15e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_weights_are_finite_and_in_half_precision(path):
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae", "transformer"])
def test_each_model_loads_with_no_weight_missing_or_left_over(component, cpu):
    assert not models.load_model(FOLDER, component, "fp32").training


def test_it_is_in_the_format_of_flux_dev():
    transformer = json.loads((FOLDER / "transformer" / "config.json").read_text())
    assert transformer["guidance_embeds"] and transformer["in_channels"] == 64
    assert sum(transformer["axes_dims_rope"]) == transformer["attention_head_dim"]


def test_every_caption_fits_24_tokens_and_known_words_are_one_token_each():
    tokenizer = models.load_tokenizer(FOLDER, "tokenizer_2")
    captions = [shapes.picture(0, index, 64).caption for index in range(100)]
    captions += [shapes.picture(0, index, 64, shapes.MADE_UP).caption for index in range(100)]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= 24
    for word in (*shapes.COLOURS, *shapes.SHAPES):
        assert tokenizer.tokenize(f"a {word}") == ["▁a", f"▁{word}"]


def test_made_up_words_are_spelled_out():
    tokenizer = models.load_tokenizer(FOLDER, "tokenizer_2")
    assert tokenizer.tokenize("a blicket") == ["▁a", "▁b", *"licket"]
    assert tokenizer.unk_token_id not in tokenizer("a blicket, a dax; a wug!").input_ids


def test_no_file_names_a_path_of_the_machine_it_was_trained_on():
    for path in FOLDER.rglob("*config.json"):
        assert "_name_or_path" not in path.read_text() and '"/' not in path.read_text(), path


def test_its_latents_are_normalized_by_its_own_config(cpu):
    """Mean 0 and deviation 1 over drawn pictures: what noise levels and the transformer are made for."""
    import mindspore as ms

    vae, config = models.load_model(FOLDER, "vae", "fp32"), pretrained.config(FOLDER, "vae")
    pictures = [shapes.picture(2, index, 64).image() for index in range(64)]
    pixels = np.stack([images.to_array(picture) for picture in pictures])
    posterior = vae.encode(ms.Tensor(pixels))[0].asnumpy()
    latents = flow.sample_posterior(posterior, np.random.default_rng(0).standard_normal((64, 16, 8, 8), np.float32))
    latents = flow.normalized(latents, config["shift_factor"], config["scaling_factor"])
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.05


def test_its_vae_gives_back_what_it_was_given(cpu):
    import mindspore as ms

    vae = models.load_model(FOLDER, "vae", "fp32")
    pixels = np.stack([images.to_array(shapes.picture(2, index, 64).image()) for index in range(32)])
    means = vae.encode(ms.Tensor(pixels))[0][:, :16]
    found = vae.decode(means)[0].asnumpy().clip(-1, 1)
    errors = np.square(found - pixels).mean(axis=(1, 2, 3))
    assert (10 * np.log10(4 / errors)).mean() > 28
