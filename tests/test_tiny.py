import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.data import images
from pipeline.errors import UserError
from pipeline.flux import models, pretrained, tiny
from pipeline.synthetic import shapes

pytestmark = pytest.mark.usefixtures("cpu")

ROOT = Path(__file__).parents[1]
COMPONENTS = ("text_encoder", "text_encoder_2", "vae", "transformer")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder, mask=0o022, **options):
    before = os.umask(mask)
    try:
        return tiny.write_tiny_model(folder, **options)
    finally:
        os.umask(before)


def modes(folder):
    """Permissions of the folder and all in it: those of the folders, those of the files."""
    places = [folder, *folder.rglob("*")]
    return tuple(
        {stat.S_IMODE(path.stat().st_mode) for path in places if path.is_dir() == is_dir} for is_dir in (True, False)
    )


@pytest.fixture(scope="module")
def same(cpu, tmp_path_factory):
    return write(tmp_path_factory.mktemp("same") / "tiny", mask=0o027)


@pytest.fixture(scope="module")
def schnell(cpu, tmp_path_factory):
    """FLUX.1-schnell's format, and another seed."""
    return write(tmp_path_factory.mktemp("schnell") / "tiny", mask=0o002, seed=1, guidance_embeds=False)


# --- files --------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_bytes(tiny_model, same):
    assert contents(tiny_model) == contents(same)


def test_another_seed_changes_the_weights_of_every_component_and_nothing_of_the_tokenizers(tiny_model, schnell):
    ours, others = contents(tiny_model), contents(schnell)
    assert ours.keys() == others.keys()
    equal = {name for name in ours if ours[name] == others[name]}
    assert not any(name.endswith(".safetensors") for name in equal)
    assert {name for name in ours if name.startswith("tokenizer")} < equal


def test_the_checkpoint_is_a_complete_diffusers_folder_under_20_mb(tiny_model):
    found = contents(tiny_model)
    assert sum(map(len, found.values())) < 20e6
    assert set(found) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in COMPONENTS),
        *(f"{part}/model.safetensors" for part in COMPONENTS[:2]),
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in COMPONENTS[2:]),
        *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt")),
        *(f"{part}/{name}.json" for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER_FILES),
    }


TOKENIZER_FILES = ("tokenizer", "tokenizer_config", "special_tokens_map")


def test_the_index_names_the_classes_of_flux_and_their_configs_agree(tiny_model):
    index = json.loads((tiny_model / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    for part in COMPONENTS:
        config = json.loads((tiny_model / part / "config.json").read_text())
        assert index[part][1] == config.get("_class_name", config.get("architectures", [""])[0])
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["tokenizer_2"] == ["transformers", "T5TokenizerFast"]


@pytest.mark.parametrize(
    "component, names",
    [
        ("text_encoder", ["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"]),
        ("text_encoder", ["text_model.encoder.layers.0.layer_norm1.bias", "text_model.encoder.layers.1.mlp.fc1.bias"]),
        ("text_encoder_2", ["shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]),
        ("text_encoder_2", ["encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "encoder.final_layer_norm.weight"]),
        ("vae", ["encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.mid_block.attentions.0.to_q.weight"]),
        ("transformer", ["transformer_blocks.0.attn.norm_added_k.weight", "single_transformer_blocks.0.proj_mlp.bias"]),
        ("transformer", ["time_text_embed.guidance_embedder.linear_1.weight", "x_embedder.weight"]),
    ],
)
def test_weights_have_the_names_that_flux_has_on_the_hub(tiny_model, component, names):
    """As in black-forest-labs/FLUX.1-dev, whose files have none of MindSpore's own: gamma, beta, embedding_table."""
    (path,) = (tiny_model / component).glob("*.safetensors")
    found = load_file(path)
    assert set(names) <= set(found)
    assert {name.rpartition(".")[2] for name in found} <= {"weight", "bias"}


def test_weight_files_say_what_transformers_asks_for(tiny_model):
    """Without the metadata ``format: pt``, transformers refuses to load a file into PyTorch."""
    from safetensors import safe_open

    for path in tiny_model.rglob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


def test_modes_follow_the_umask(same, schnell):
    assert modes(same) == ({0o750}, {0o640})
    assert modes(schnell) == ({0o775}, {0o664})


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        tiny.write_tiny_model(tmp_path)
    assert contents(tmp_path) == {"photo.png": b"mine"}


def test_an_empty_folder_is_filled(tmp_path, tiny_model):
    (tmp_path / "tiny").mkdir()
    write(tmp_path / "tiny", mask=0o022)
    assert contents(tmp_path / "tiny") == contents(tiny_model)
    assert modes(tmp_path / "tiny") == ({0o755}, {0o644})


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny, "write_index", fail)
    with pytest.raises(OSError):
        tiny.write_tiny_model(tmp_path / "new" / "tiny")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_killed_write_leaves_no_checkpoint_and_tokenizers_are_the_same_in_any_process(tmp_path, tiny_model):
    code = f"""if True:
        import os, signal
        from pipeline.flux import tiny
        tiny._write_models = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        tiny.write_tiny_model({str(tmp_path / "tiny")!r})
    """
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert not (tmp_path / "tiny").exists()
    (leftover,) = tmp_path.iterdir()
    for name in ("tokenizer", "tokenizer_2"):
        assert contents(leftover / "model" / name) == contents(tiny_model / name)


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tiny_model):
    return models.load_tokenizer(tiny_model, "tokenizer")


@pytest.fixture(scope="module")
def t5(tiny_model):
    return models.load_tokenizer(tiny_model, "tokenizer_2")


def padded(tokenizer, caption, length):
    return tokenizer(caption, padding="max_length", max_length=length, truncation=True).input_ids


def test_clip_pads_and_cuts_to_77_tokens_between_its_special_tokens(clip):
    start, end = clip.bos_token_id, clip.eos_token_id
    ids = padded(clip, "a photo of a red cat", 77)
    assert ids[0] == start and ids[7:] == [end] * 70
    assert start not in ids[1:] and end not in ids[1:7]
    long = padded(clip, "a red cat " * 100, 77)
    assert (len(long), long[0], long[-1]) == (77, start, end)
    assert end not in long[:-1]
    assert clip.model_max_length == 77


def test_clips_end_token_has_the_highest_id_as_its_model_expects(tiny_model, clip):
    config = pretrained.config(tiny_model, "text_encoder")
    assert clip.eos_token_id == config["eos_token_id"] == len(clip) - 1 == config["vocab_size"] - 1
    assert clip.bos_token_id == config["bos_token_id"]


def test_clip_knows_no_capitals(clip):
    assert clip("A Photo of a RED Cat").input_ids == clip("a photo of a red cat").input_ids


def test_words_of_the_corpus_are_single_tokens_of_clip(clip):
    words = sorted({word for line in tiny.corpus() for word in line.split()})
    assert clip.tokenize(" ".join(words)) == [f"{word}</w>" for word in words]


@pytest.mark.parametrize("caption", ["Käse 🧀", "写真", "\u200b\ufeff", "zebra 123 %$#", "👩‍👩‍👧"])
def test_clip_encodes_any_character_byte_by_byte(clip, caption):
    ids = clip(caption, add_special_tokens=False).input_ids
    assert ids and clip.unk_token_id not in ids
    assert clip.decode(ids).replace(" ", "") == caption.lower().replace(" ", "")


def test_the_clip_tokenizer_survives_a_round_trip_through_its_class(clip, tiny_model, tmp_path):
    from transformers import CLIPTokenizerFast

    assert type(clip) is CLIPTokenizerFast
    clip.save_pretrained(tmp_path / "saved")
    captions = tiny.corpus()[::97] + ["Käse 🧀", "", "A cat's 3 toys"]
    expected = [padded(clip, caption, 77) for caption in captions]
    again = CLIPTokenizerFast.from_pretrained(tmp_path / "saved")
    assert [padded(again, caption, 77) for caption in captions] == expected
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_model / "tokenizer" / name, tmp_path / name)
    slow_files = CLIPTokenizerFast.from_pretrained(tmp_path)  # as from a checkpoint without tokenizer.json
    assert [padded(slow_files, caption, 77) for caption in captions] == expected


def test_t5_ends_with_its_end_token_and_pads_with_0(t5):
    from transformers import T5TokenizerFast

    assert type(t5) is T5TokenizerFast
    ids = padded(t5, "a photo of a red cat", 32)
    end = ids.index(1)
    assert len(ids) == 32 and end > 1 and ids[end + 1 :] == [0] * (31 - end)
    assert 0 not in ids[:end]
    assert (t5.eos_token, t5.eos_token_id, t5.pad_token_id) == ("</s>", 1, 0)
    long = padded(t5, "a red cat " * 100, 32)
    assert len(long) == 32 and long[-1] == 1 and 1 not in long[:-1]


@pytest.mark.parametrize("caption", ["a photo of a red cat, in the grass", "Zebra 123 %$#~", "a  wide   gap"])
def test_t5_gives_back_what_it_encoded(t5, caption):
    assert t5.decode(t5(caption).input_ids, skip_special_tokens=True) == " ".join(caption.split())


def test_t5_marks_what_it_does_not_know_and_goes_on(t5):
    ids = t5("cat 🧀 dog").input_ids
    known = t5("cat dog").input_ids
    assert t5.unk_token_id in ids and t5.unk_token_id not in known
    assert ids[-1] == 1 and ids[:2] == known[:2]


def test_t5_has_the_hundred_sentinels_and_its_model_a_row_for_every_token(tiny_model, t5):
    assert t5.convert_tokens_to_ids("<extra_id_99>") != t5.unk_token_id
    assert pretrained.config(tiny_model, "text_encoder_2")["vocab_size"] == len(t5)


def test_captions_that_differ_have_different_tokens(clip, t5):
    captions = list(dict.fromkeys(tiny.corpus()))[::31]
    for tokenizer, length in ((clip, 77), (t5, 64)):
        assert len({tuple(padded(tokenizer, caption, length)) for caption in captions}) == len(captions)


# --- models -------------------------------------------------------------------------------------------------------


def velocity(folder, guidance):
    """The transformer's output for one fixed input of two images, as an array."""
    import mindspore as ms

    transformer = models.load_model(folder, "transformer", "fp32")
    config, generator = transformer.config, np.random.default_rng(0)
    shapes = [(2, 6, config.in_channels), (2, 5, config.joint_attention_dim), (2, config.pooled_projection_dim)]
    latents, txt, pooled = (ms.Tensor(generator.standard_normal(shape), ms.float32) for shape in shapes)
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=txt,
        pooled_projections=pooled,
        timestep=ms.Tensor([0.3, 0.9], ms.float32),
        img_ids=ms.Tensor(generator.integers(0, 3, (6, 3)), ms.float32),
        txt_ids=ms.ops.zeros((5, 3), ms.float32),
        guidance=None if guidance is None else ms.Tensor([guidance] * 2, ms.float32),
        return_dict=False,
    )[0].asnumpy()


def test_the_dev_format_embeds_its_guidance(tiny_model):
    assert pretrained.config(tiny_model, "transformer")["guidance_embeds"] is True
    low, high = velocity(tiny_model, 1.0), velocity(tiny_model, 7.0)
    assert low.shape == (2, 6, 64) and np.isfinite(low).all()
    assert np.abs(low - high).max() > 1e-3


def test_the_schnell_format_has_no_guidance_and_runs_without(schnell):
    assert pretrained.config(schnell, "transformer")["guidance_embeds"] is False
    names = load_file(schnell / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("guidance" in name for name in names)
    output = velocity(schnell, None)
    assert output.shape == (2, 6, 64) and np.isfinite(output).all()
    assert json.loads((schnell / "scheduler" / "scheduler_config.json").read_text())["use_dynamic_shifting"] is False


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_of_the_schnell_format_loads(schnell, component):
    assert sum(parameter.size for parameter in models.load_model(schnell, component, "fp32").get_parameters()) > 100_000


def test_signals_neither_vanish_nor_explode_in_the_transformer(tiny_model):
    assert 0.03 < velocity(tiny_model, 3.5).std() < 30


def test_text_encoders_tell_captions_apart(tiny_model, clip, t5):
    import mindspore as ms

    for component, tokenizer, length, output in (("text_encoder", clip, 77, 1), ("text_encoder_2", t5, 16, 0)):
        encoder = models.load_model(tiny_model, component, "fp32")
        captions = ("a red cat", "a blue dog")
        first, second = encoder(ms.Tensor([padded(tokenizer, c, length) for c in captions], ms.int32))[output].asnumpy()
        assert first.shape[-1] == {"text_encoder": 64, "text_encoder_2": 96}[component]
        assert np.isfinite(first).all() and np.abs(first - second).max() > 0.1


def test_the_vae_has_fluxs_factor_channels_and_constants(tiny_model):
    import mindspore as ms

    vae = models.load_model(tiny_model, "vae", "fp32")
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.latent_channels) == (0.3611, 0.1159, 16)
    assert not vae.config.use_quant_conv and not vae.config.use_post_quant_conv
    assert list(vae.config.down_block_types) == ["DownEncoderBlock2D"] * 4
    assert list(vae.config.up_block_types) == ["UpDecoderBlock2D"] * 4
    moments = vae.encode(ms.ops.zeros((2, 3, 64, 48), ms.float32))[0]
    assert moments.shape == (2, 32, 8, 6)
    assert vae.decode(moments[:, :16])[0].shape == (2, 3, 64, 48)


def test_latents_of_pictures_have_about_unit_variance_and_a_sharp_posterior(tiny_model, tmp_path):
    import mindspore as ms

    from pipeline.flux import flow

    shapes.draw_shapes(tmp_path / "pictures", 4, size=64)
    vae = models.load_model(tiny_model, "vae", "fp32")
    pixels = [images.to_array(images.read_image(path)) for path in sorted((tmp_path / "pictures").glob("*.png"))]
    moments = vae.encode(ms.Tensor(np.stack(pixels)))[0].asnumpy()
    latents = flow.normalized(flow.sample_posterior(moments, None), 0.1159, 0.3611)
    assert 0.3 < latents.std() < 3
    assert np.exp(0.5 * moments[:, 16:]).max() < 0.2 * moments[:, :16].std()
