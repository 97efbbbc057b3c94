import json
import pickle
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from model_files import STEMS, each_component, edit, edit_config, shard, single_file
from safetensors.numpy import load_file, save_file

from pipeline.errors import UserError
from pipeline.flux import models, noise_levels, pretrained, t5

pytestmark = pytest.mark.usefixtures("cpu")

TEXT_ENCODER_WEIGHT = "text_model.encoder.layers.0.layer_norm1.weight"


def weights(model):
    """The model's parameters as arrays, by the names that the files have."""
    endings = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
    found = {}
    for parameter in model.get_parameters():
        stem, _, last = parameter.name.rpartition(".")
        found[f"{stem}.{endings.get(last, last)}"] = parameter.asnumpy()
    return found


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], name)


def refusal(folder, component, variant=""):
    with pytest.raises(UserError) as error:
        models.load_model(folder, component, "fp32", variant)
    return str(error.value)


# --- what is loaded -----------------------------------------------------------------------------------------------


@each_component
def test_loaded_weights_are_those_of_the_file_bit_for_bit(tiny_model, component):
    found = weights(models.load_model(tiny_model, component, "fp32"))
    assert_same(found, load_file(single_file(tiny_model, component)))


@each_component
def test_a_loaded_model_is_frozen_and_in_inference_mode(tiny_model, component):
    model = models.load_model(tiny_model, component, "fp32")
    assert model.trainable_params() == []
    assert not any(cell.training for _, cell in model.cells_and_names())


@each_component
def test_weights_load_in_fp16_but_for_those_that_t5_keeps_in_fp32(tiny_model, component):
    """transformers keeps T5's ``wo`` in float32 when it loads float16; see ``_keep_in_fp32_modules``."""
    found = weights(models.load_model(tiny_model, component, "fp16"))
    in_file = load_file(single_file(tiny_model, component))
    kept = {name for name in in_file if component == "text_encoder_2" and ".wo." in name}
    assert_same(found, {name: array if name in kept else array.astype(np.float16) for name, array in in_file.items()})


@each_component
def test_a_bf16_checkpoint_loads_exactly_in_fp32(checkpoint, component):
    """FLUX.1's own files are bfloat16."""
    in_file = load_file(single_file(checkpoint, component))
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in in_file.items()}
    edit(checkpoint, component, lambda tensors: tensors.update(halves))
    found = weights(models.load_model(checkpoint, component, "fp32"))
    assert_same(found, {name: half.astype(np.float32) for name, half in halves.items()})


@each_component
def test_shards_load_as_the_single_file_does(checkpoint, component):
    expected = load_file(single_file(checkpoint, component))
    shard(checkpoint, component)
    single_file(checkpoint, component).unlink()
    assert_same(weights(models.load_model(checkpoint, component, "fp32")), expected)


@each_component
@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_is_loaded_where_it_is_asked_for_and_only_there(checkpoint, component, sharded):
    expected = load_file(single_file(checkpoint, component))
    halves = {name: array.astype(np.float16).astype(np.float32) for name, array in expected.items()}
    if sharded:
        shard(checkpoint, component, "fp16", lambda array: array.astype(np.float16))
    else:
        half = {name: array.astype(np.float16) for name, array in halves.items()}
        save_file(half, single_file(checkpoint, component, "fp16"), {"format": "pt"})
    assert_same(weights(models.load_model(checkpoint, component, "fp32", "fp16")), halves)
    assert_same(weights(models.load_model(checkpoint, component, "fp32")), expected)


@each_component
def test_where_both_a_single_file_and_shards_are_the_digest_is_of_what_is_loaded(checkpoint, component):
    """Which one that is differs between mindone's text encoders and its other models."""
    shard(checkpoint, component, transform=lambda array: 2 * array)
    files = pretrained.weight_files(checkpoint, component)
    digested = {name: array for path in files for name, array in load_file(path).items()}
    assert_same(weights(models.load_model(checkpoint, component, "fp32")), digested)


# --- what is refused ----------------------------------------------------------------------------------------------


@each_component
def test_a_missing_weight_is_named(checkpoint, component):
    names = sorted(load_file(single_file(checkpoint, component)))
    for dropped in (names[0], names[-1]):
        edit(checkpoint, component, lambda tensors, dropped=dropped: tensors.pop(dropped))
    message = refusal(checkpoint, component)
    assert message.startswith(f"{checkpoint / component}: weights do not fit the config (2 problems)\n")
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert lines == [f"missing weight {names[0]}", f"missing weight {names[-1]}"]


@pytest.mark.parametrize(
    "component, name", [("text_encoder_2", "shared.weight"), ("text_encoder", TEXT_ENCODER_WEIGHT)]
)
def test_a_missing_weight_has_the_name_that_the_file_would_have_given_it(checkpoint, component, name):
    edit(checkpoint, component, lambda tensors: tensors.pop(name))
    assert f"missing weight {name}" in refusal(checkpoint, component)


@each_component
def test_an_unexpected_weight_is_named(checkpoint, component):
    edit(checkpoint, component, lambda tensors: tensors.update({"extra.weight": np.zeros(3, np.float32)}))
    assert "unexpected weight extra.weight" in refusal(checkpoint, component)


@each_component
def test_a_weight_of_another_shape_is_named_with_both_shapes(checkpoint, component):
    name = {"text_encoder": TEXT_ENCODER_WEIGHT, "text_encoder_2": "encoder.final_layer_norm.weight"}.get(component)
    name = name or min(name for name in load_file(single_file(checkpoint, component)) if name.endswith(".bias"))
    shape = load_file(single_file(checkpoint, component))[name].shape
    edit(checkpoint, component, lambda tensors: tensors.update({name: np.zeros((3, 5), np.float32)}))
    message = refusal(checkpoint, component)
    assert f"weight {name}: shape (3, 5) in the file, {shape} by the config" in message


@each_component
def test_a_missing_shard_is_named(checkpoint, component):
    index = shard(checkpoint, component)
    single_file(checkpoint, component).unlink()
    gone = index.with_name(f"{STEMS[component]}-00002-of-00002.safetensors")
    gone.unlink()
    assert refusal(checkpoint, component) == f"{gone}: missing; {index.name} lists it"


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", 3])
def test_an_index_cannot_lead_out_of_its_folder_or_to_a_pickle(checkpoint, name):
    index = shard(checkpoint, "vae")
    shard_names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": shard_names | {"decoder.conv_out.bias": name}}))
    for place in ("../x.safetensors", "sub/x.safetensors", "x.bin"):
        (checkpoint / "vae" / place).parent.mkdir(exist_ok=True)
        shutil.copy(single_file(checkpoint, "vae"), checkpoint / "vae" / place)
    message = refusal(checkpoint, "vae")
    assert message == f"{index}: refuses shard {str(name)!r}: not a safetensors file in this folder"


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", "3"])
def test_a_damaged_index_is_one_line_that_names_it(checkpoint, text):
    index = shard(checkpoint, "vae")
    index.write_text(text)
    message = refusal(checkpoint, "vae")
    assert message.startswith(f"{index}: ") and "\n" not in message


@each_component
def test_a_variant_that_is_not_there_says_which_files_are(checkpoint, component):
    there, asked = single_file(checkpoint, component), single_file(checkpoint, component, "fp16")
    message = refusal(checkpoint, component, "fp16")
    assert message == f"{asked}: missing; there are {there.name}: check [model] variant"


class Malicious:
    """A pickle of it makes ``marker`` when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def malicious_pickle(path, marker):
    path.write_bytes(pickle.dumps({"weight": Malicious(marker)}))
    pickle.loads(path.read_bytes())
    marker.unlink()  # it was made, so this pickle is armed


@each_component
@pytest.mark.parametrize("suffix", [".bin", ".ckpt"])
def test_pickled_weights_are_refused_by_name_and_never_loaded(checkpoint, tmp_path, component, suffix):
    single_file(checkpoint, component).unlink()
    name = ("pytorch_model" if component.startswith("text") else STEMS[component]) + suffix
    malicious_pickle(checkpoint / component / name, tmp_path / "marker")
    message = refusal(checkpoint, component)
    assert message.startswith(f"{checkpoint / component}: only pickled weights ({name})") and "safetensors" in message
    assert not (tmp_path / "marker").exists()


@each_component
def test_a_pickle_beside_safetensors_is_ignored(checkpoint, tmp_path, component):
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt"):
        malicious_pickle(checkpoint / component / name, tmp_path / "marker")
    expected = load_file(single_file(checkpoint, component))
    assert_same(weights(models.load_model(checkpoint, component, "fp32")), expected)
    assert not (tmp_path / "marker").exists()


@each_component
@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_one_line_that_names_it(checkpoint, component, size):
    path = single_file(checkpoint, component)
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(checkpoint, component)
    assert message.startswith(f"{path}: damaged or cut short") and "\n" not in message


def test_a_truncated_shard_is_one_line_that_names_it(checkpoint):
    shard(checkpoint, "transformer")
    path = checkpoint / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(checkpoint, "transformer")
    assert message.startswith(f"{path}: damaged or cut short") and "\n" not in message


@pytest.mark.parametrize(
    "component, field, found, expected",
    [
        ("text_encoder", "architectures", "CLIPModel", "CLIPTextModel"),
        ("text_encoder_2", "architectures", "T5ForConditionalGeneration", "T5EncoderModel"),
        ("vae", "_class_name", "AsymmetricAutoencoderKL", "AutoencoderKL"),
        ("transformer", "_class_name", "SD3Transformer2DModel", "FluxTransformer2DModel"),
    ],
)
def test_a_config_of_another_class_names_found_and_expected(checkpoint, component, field, found, expected):
    edit_config(checkpoint, component, **{field: [found] if field == "architectures" else found})
    message = refusal(checkpoint, component)
    assert message.startswith(f"{checkpoint / component}/config.json: class {found}, expected {expected}")


@each_component
@pytest.mark.parametrize("text", [None, "[]", "{", "\x00\xff"])
def test_a_missing_or_damaged_config_is_one_line_that_names_it(checkpoint, component, text):
    path = checkpoint / component / "config.json"
    path.unlink() if text is None else path.write_text(text)
    message = refusal(checkpoint, component)
    assert message.startswith(f"{path}: ") and "\n" not in message


@pytest.mark.parametrize(
    "component, settings",
    [
        ("text_encoder", {"hidden_act": "none such"}),
        ("text_encoder_2", {"feed_forward_proj": "a-b-c"}),
        ("vae", {"act_fn": "none such"}),
    ],
)
def test_a_config_that_no_model_can_be_made_of_is_one_line_that_names_the_component(checkpoint, component, settings):
    edit_config(checkpoint, component, **settings)
    message = refusal(checkpoint, component)
    assert message.startswith(f"{checkpoint / component}: cannot load ") and "\n" not in message


def test_a_wrong_number_is_said_with_the_file(checkpoint):
    edit_config(checkpoint, "transformer", num_layers=[1], attention_head_dim=16.5)
    path = checkpoint / "transformer" / "config.json"
    said = "num_layers: must be a whole number, found [1]; attention_head_dim: must be a whole number, found 16.5"
    assert refusal(checkpoint, "transformer").startswith(f"{path}: {said}; ")


@pytest.mark.parametrize("found", [{}, 5, [], [{}], "CLIPTextModel", None, [5]])
def test_a_class_that_is_none_is_no_flux_model(checkpoint, found):
    edit_config(checkpoint, "text_encoder", architectures=found)
    assert ", expected CLIPTextModel; not a FLUX.1 model" in refusal(checkpoint, "text_encoder")


def test_parts_of_different_models_are_refused_before_anything_is_encoded(checkpoint):
    edit_config(checkpoint, "text_encoder_2", d_model=64)
    with pytest.raises(
        UserError, match="joint_attention_dim is .*, but d_model of text_encoder_2 is 64; parts of diff"
    ):
        pretrained.local_folder(checkpoint)


@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("text", ["", "{}", "{"])
def test_a_damaged_tokenizer_is_one_line_that_names_it(checkpoint, component, text):
    (checkpoint / component / "tokenizer.json").write_text(text)
    with pytest.raises(UserError) as error:
        models.load_tokenizer(checkpoint, component)
    message = str(error.value)
    assert message.startswith(f"{checkpoint / component}: cannot load the tokenizer: ") and "\n" not in message


# --- T5's position buckets ----------------------------------------------------------------------------------------


def exact_bucket(distance, num_buckets=32, max_distance=128):
    """T5's bucket of ``key - query`` in whole numbers: floor(log(n/e) / log(m/e) * (h-e)) is the largest k with
    (n/e)^(h-e) >= (m/e)^k."""
    half = num_buckets // 2
    exact, length = half // 2, abs(distance)
    bucket = length
    if length >= exact:
        steps, k = half - exact, 0
        while k < steps and length**steps * exact ** (k + 1) >= max_distance ** (k + 1) * exact**steps:
            k += 1
        bucket = min(exact + k, half - 1)
    return bucket + (half if distance > 0 else 0)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 64), (64, 256), (16, 100)])
def test_position_buckets_are_exact(num_buckets, max_distance):
    size = 601
    buckets = t5.position_buckets(size, size, num_buckets, max_distance)
    assert buckets.dtype == np.int32 and buckets.shape == (size, size)
    for distance in range(-600, 601):
        expected = exact_bucket(distance, num_buckets, max_distance)
        found = np.unique(np.diagonal(buckets, distance))
        assert found.tolist() == [expected], distance


@pytest.mark.parametrize(
    "distance, bucket",
    [(0, 0), (-1, 1), (1, 17), (-7, 7), (7, 23), (-8, 8), (8, 24), (-11, 8), (-12, 9), (-15, 9), (-16, 10), (16, 26)]
    + [(-22, 10), (-23, 11), (-31, 11), (-32, 12), (32, 28), (-45, 12), (-46, 13), (-63, 13), (-64, 14), (64, 30)]
    + [(-90, 14), (-91, 15), (-127, 15), (-128, 15), (128, 31), (-600, 15), (600, 31)],
)
def test_position_buckets_are_those_of_transformers(distance, bucket):
    """Worked out from ``T5Attention._relative_position_bucket`` of transformers with 32 buckets up to 128."""
    buckets = t5.position_buckets(601, 601)
    assert (buckets[600, 600 + distance] if distance <= 0 else buckets[0, distance]) == bucket


def relative_attention(t5):
    (cell,) = [cell for _, cell in t5.cells_and_names() if getattr(cell, "has_relative_attention_bias", False)]
    return cell


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_loaded_t5_looks_its_bias_up_in_these_buckets(tiny_model, dtype):
    t5 = models.load_model(tiny_model, "text_encoder_2", dtype)
    table = weights(t5)["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    for length in (300, 7):
        found = relative_attention(t5).compute_bias(length, length).asnumpy()
        buckets = [[exact_bucket(key - query) for key in range(length)] for query in range(length)]
        np.testing.assert_array_equal(found, table[np.array(buckets)].transpose(2, 0, 1)[None])


@pytest.mark.parametrize("distance, bucket", [(16, 10), (32, 12), (64, 14)])
def test_the_forward_of_the_loaded_t5_uses_them(tiny_model, distance, bucket):
    """Among distance + 1 tokens one pair alone is that far apart: a change of its bucket changes the output."""
    import mindspore as ms

    t5 = models.load_model(tiny_model, "text_encoder_2", "fp32")
    tokens = ms.Tensor(np.arange(distance + 1)[None] % 50, ms.int32)
    table = relative_attention(t5).relative_attention_bias
    parameter = next(iter(table.get_parameters()))
    values, before = parameter.asnumpy().copy(), t5(tokens)[0].asnumpy()
    values[bucket] += 50
    parameter.set_data(ms.Tensor(values))
    change = np.abs(t5(tokens)[0].asnumpy() - before)
    assert change[0, -1].max() > 1e-2


# --- the scheduler ------------------------------------------------------------------------------------------------


def test_the_schedulers_sigmas_run_from_1_down_with_their_timesteps(tiny_model):
    sigmas, timesteps = noise_levels.scheduler_sigmas(tiny_model)
    assert sigmas.shape == timesteps.shape == (1000,)
    assert sigmas.dtype == timesteps.dtype == np.float32
    assert sigmas[0] == 1 and (np.diff(sigmas) < 0).all() and sigmas[-1] > 0
    np.testing.assert_allclose(timesteps, 1000 * sigmas, rtol=1e-6)


def test_a_static_shift_of_the_scheduler_is_in_its_sigmas(checkpoint):
    """FLUX.1-schnell has shift 1, SD3 3: sigma becomes shift * sigma / (1 + (shift - 1) * sigma)."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": False, "shift": 3.0}))
    linear = np.linspace(1000, 1, 1000) / 1000
    np.testing.assert_allclose(noise_levels.scheduler_sigmas(checkpoint)[0], 3 * linear / (1 + 2 * linear), rtol=1e-5)
