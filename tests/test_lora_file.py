"""The saved LoRA: how strong it is to each of its readers, in this version's files and in older ones."""

import json

import numpy as np
import pytest
from lab import Lab
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pipeline.errors import UserError
from pipeline.flux import models
from pipeline.methods import lora_layers as lora
from pipeline.methods.tokens import pooled_reader
from pipeline.plan.run_folder import RunFolder
from pipeline.settings.fields import Lora
from pipeline.training import loop

pytestmark = pytest.mark.usefixtures("cpu")

RANK, ALPHA = 8, 3.0


@pytest.fixture(scope="module")
def lab(encoded, tmp_path_factory) -> Lab:
    """A LoRA of the transformer and of CLIP, trained with an alpha that is not its rank."""
    found = encoded.copy(tmp_path_factory.mktemp("lora-file") / "lab")
    found.set("lora", rank=RANK, alpha=ALPHA, train_text_encoder=True)
    return found.set("train", learning_rate=1e-2, text_encoder_lr=1e-2).run("TrainLoRA")


@pytest.fixture(scope="module")
def path(lab):
    return lab.run_folder / lora.WEIGHTS_NAME


@pytest.fixture(scope="module")
def as_trained(lab) -> lora.Adapted:
    """The models as training left them: the run's last checkpoint has lora_B without alpha / rank."""
    adapted = adapted_with(lab, lab.experiment.lora)
    (newest, *_) = RunFolder(lab.run_folder).list_checkpoints()
    state = load_file(newest)
    for parameter in adapted.trained:
        lora.set_values(parameter, state[f"trained.{parameter.name}"])
    return adapted


def adapted_with(lab: Lab, settings: Lora) -> lora.Adapted:
    return lora.Adapted(lab.plan.load_frozen(), settings, lab.plan.precision.trained, seed=9)


def input_of(layer) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 5, layer.in_features), dtype=np.float32)


def changes(adapted: lora.Adapted) -> dict[str, tuple[np.ndarray, float]]:
    """What the LoRA adds to each layer's output, by the layer's diffusers key; and the largest output, for rounding."""
    import mindspore as ms

    found = {}
    for prefix, cell in adapted.cells.items():
        for name, layer in cell.cells_and_names():
            if hasattr(layer, "lora_B"):
                x = ms.Tensor(input_of(layer))
                output = layer(x)
                change = (output - layer.base_layer(x)).asnumpy()
                found[f"{prefix}.{name}"] = change, np.abs(output.asnumpy()).max()
    return found


# --- readers of others --------------------------------------------------------------------------------------------


def scale_in_diffusers(file, key: str) -> float:
    prefix = key.partition(".")[0]
    declared = json.loads(file.metadata()["lora_adapter_metadata"])
    return declared[f"{prefix}.lora_alpha"] / declared[f"{prefix}.r"]


def scale_in_comfyui(file, key: str) -> float:
    if f"{key}.alpha" not in file.keys():
        return 1.0
    return file.get_tensor(f"{key}.alpha").item() / len(file.get_tensor(f"{key}.lora_A.weight"))


@pytest.mark.parametrize("scale_in", [scale_in_diffusers, scale_in_comfyui])
def test_every_reader_adds_what_training_added(path, as_trained, scale_in):
    """Each reader's rule, from its code; all of them add scale * lora_B @ lora_A to the layer's weight.

    diffusers: `_load_sft_state_dict_metadata` in utils/state_dict_utils.py, `_create_lora_config` in
    utils/peft_utils.py; PEFT: `LoraLayer.update_layer` in tuners/lora/layer.py.
    ComfyUI: `load_lora` in comfy/lora.py, `LoRAAdapter.calculate_weight` in comfy/weight_adapter/lora.py.
    """
    own = changes(as_trained)
    assert {key.partition(".")[0] for key in own} == {"transformer", "text_encoder"}
    layers = {f"{prefix}.{name}": each for prefix, c in as_trained.cells.items() for name, each in c.cells_and_names()}
    with safe_open(path, "np") as file:
        assert {key.partition(".lora_")[0] for key in file.keys()} == own.keys()
        for key, (change, largest) in own.items():
            a, b = (file.get_tensor(f"{key}.lora_{which}.weight").astype(np.float64) for which in "AB")
            theirs = input_of(layers[key]) @ (scale_in(file, key) * b @ a).T
            np.testing.assert_allclose(theirs, change, atol=1e-6 * largest, err_msg=key)
            assert np.abs(change).max() > 1e-3 * largest


def test_mindone_loads_clips_part_too(lab, path, as_trained):
    from mindone.diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    plan = lab.plan
    tokens = pooled_reader(plan)([plan.caption_items[0]])
    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    theirs = models.load_model(plan.model_folder, "text_encoder", "fp32")
    base = pooled_of(theirs, tokens)
    state = {key: array for key, array in load_file(path).items() if key.startswith("text_encoder.")}
    FluxLoraLoaderMixin.load_lora_into_text_encoder(
        tensors(state), network_alphas=None, text_encoder=theirs, prefix="text_encoder", metadata=metadata
    )
    mine, found = pooled_of(as_trained.cells["text_encoder"], tokens), pooled_of(theirs, tokens)
    np.testing.assert_allclose(found, mine, atol=1e-5)
    assert np.abs(mine - base).max() > 1e-3


def pooled_of(encoder, tokens: np.ndarray) -> np.ndarray:
    import mindspore as ms

    return encoder(ms.Tensor(tokens))[1].asnumpy()


def tensors(arrays: dict) -> dict:
    import mindspore as ms

    return {key: ms.Parameter(ms.Tensor(array), name=key) for key, array in arrays.items()}


# --- our own ------------------------------------------------------------------------------------------------------


def write_as_older_versions(path, adapted: lora.Adapted) -> None:
    """lora_B as it was trained; alpha is declared."""
    state = {
        f"{prefix}.{parameter.name.replace('.default.', '.')}": parameter.asnumpy()
        for prefix, cell in adapted.cells.items()
        for parameter in cell.trainable_params()
    }
    declared = {f"{prefix}.{key}": n for prefix in adapted.cells for key, n in (("r", RANK), ("lora_alpha", 3))}
    save_file(state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(declared)})


def test_a_file_of_any_version_is_loaded_at_its_own_strength_whatever_the_settings_say(lab, path, as_trained, tmp_path):
    own, loaded = changes(as_trained), adapted_with(lab, Lora(rank=RANK, alpha=5.0))
    loaded.load(path)
    for key, (change, largest) in changes(loaded).items():
        np.testing.assert_allclose(change, own[key][0], atol=1e-6 * largest)
    write_as_older_versions(tmp_path / "older.safetensors", as_trained)
    loaded.load(tmp_path / "older.safetensors")
    for key, (change, _) in changes(loaded).items():
        np.testing.assert_array_equal(change, own[key][0])
    loaded.save(tmp_path, {parameter.name: parameter for parameter in loaded.trained}, {})
    again, saved = load_file(tmp_path / lora.WEIGHTS_NAME), load_file(path)
    assert all(again[key].tobytes() == saved[key].tobytes() for key in saved)


def test_the_file_still_says_which_rank_and_alpha_were_asked_for(path):
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["lora"]) == {"rank": RANK, "alpha": ALPHA}


def test_a_removed_file_is_written_again_from_the_last_checkpoint_without_a_step(lab, path, tmp_path, monkeypatch):
    other = lab.copy(tmp_path / "lab")
    removed = other.run_folder / lora.WEIGHTS_NAME
    removed.unlink()
    assert not other.done("TrainLoRA")
    monkeypatch.setattr(loop.Training, "advance", None)
    other.run("TrainLoRA")
    assert removed.read_bytes() == path.read_bytes()


# --- what a file declares -----------------------------------------------------------------------------------------


def test_a_file_that_declares_nothing_has_an_alpha_equal_to_its_rank(tmp_path):
    save_file({"transformer.x.lora_B.weight": np.zeros((1, 4), np.float32)}, tmp_path / "plain.safetensors")
    assert lora.scale_of(tmp_path / "plain.safetensors") == 1


@pytest.mark.parametrize(
    "declared",
    [
        '{"transformer.r"',
        "[]",
        '{"text_encoder.r": 8, "text_encoder.lora_alpha": 3}',
        '{"transformer.r": 0, "transformer.lora_alpha": 3}',
        '{"transformer.r": 8, "transformer.lora_alpha": "3"}',
        '{"transformer.r": 8, "transformer.lora_alpha": NaN}',
    ],
)
def test_a_damaged_declaration_is_an_error_rather_than_another_strength(tmp_path, declared):
    path = tmp_path / "damaged.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, path, {"lora_adapter_metadata": declared})
    with pytest.raises(UserError, match="has no usable transformer.lora_alpha and transformer.r; remove the file"):
        lora.scale_of(path)


def test_a_file_that_is_cut_short_cannot_be_read(path, tmp_path):
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="short.safetensors: cannot be read: .*; remove the file and run TrainLoRA"):
        lora.scale_of(tmp_path / "short.safetensors")
