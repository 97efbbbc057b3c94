"""Training a LoRA on a tiny checkpoint: what it makes, in both modes and dtypes, and what it refuses."""

import json

import numpy as np
import pytest
from lab import Lab
from model_files import edit

from pipeline.commands import main
from pipeline.errors import UserError
from pipeline.flux import models
from pipeline.flux.prediction import prediction
from pipeline.methods import lora_layers as lora
from pipeline.plan.run_folder import RunFolder
from pipeline.training import guard, team
from pipeline.training.batches import Batches
from pipeline.training.loss import item_loss, tensors_of

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def trained(plainly_trained) -> Lab:
    return plainly_trained


@pytest.fixture
def lab(encoded, tmp_path) -> Lab:
    return encoded.copy(tmp_path / "lab")


def test_training_again_gives_the_same_bytes(trained, lab):
    lab.run("TrainLoRA")
    name = lora.WEIGHTS_NAME
    assert (lab.run_folder / name).read_bytes() == (trained.run_folder / name).read_bytes()


def test_a_file_that_the_disk_does_not_give_is_named_in_one_line(lab, capsys):
    """/proc/self/mem opens, and reading it is an Input/output error, in which Python names no file."""
    needs = RunFolder(lab.run_folder).needs
    needs.parent.mkdir(parents=True)
    needs.symlink_to("/proc/self/mem")
    assert main(["run", "TrainLoRA", "--experiment", str(lab.path)]) == 1
    assert f"\nerror: {needs}: Input/output error; check" in f"\n{capsys.readouterr().err}"


def losses_of(lab: Lab) -> list[float]:
    return [json.loads(line)["loss"] for line in (lab.run_folder / "metrics.jsonl").read_text().splitlines()]


def test_compiled_training_has_the_losses_of_pynative(trained, lab):
    lab.set("train", mode="jit").run("TrainLoRA")
    np.testing.assert_allclose(losses_of(lab), losses_of(trained), rtol=1e-5)


def test_metrics_have_one_line_per_step(trained):
    lines = [json.loads(line) for line in (trained.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["lr"] == 1e-3 and np.isfinite(line["loss"]) and line["step_seconds"] > 0 for line in lines)


def test_the_saved_lora_has_diffusers_keys_and_names_its_origin(trained):
    from safetensors import safe_open

    with safe_open(trained.run_folder / lora.WEIGHTS_NAME, "np") as file:
        keys, metadata = set(file.keys()), file.metadata()
        shape, dtype = file.get_slice(sorted(keys)[0]).get_shape(), file.get_slice(sorted(keys)[0]).get_dtype()
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight" in keys
    assert "transformer.single_transformer_blocks.1.attn.to_v.lora_A.weight" in keys
    assert len(keys) == 2 * (2 * 4 + 2 * 3)
    assert shape == [4, 128] and dtype == "F32"
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert set(adapter) == {f"transformer.{key}" for key in lora.ADAPTER_SETTINGS}
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"], adapter["transformer.peft_type"]) == (
        4,
        4,
        "LORA",
    )
    assert adapter["transformer.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    assert metadata["run_id"] == trained.plan.run_id
    assert metadata["step"] == "3" and json.loads(metadata["precision"])["preset"] == "fp32"


def test_mindone_loads_the_saved_lora_and_predicts_what_training_ended_with(trained):
    from mindone.diffusers import FluxTransformer2DModel

    plan = trained.plan
    batch = Batches(plan).evaluation(0, 2)
    ours = models.load_model(plan.model_folder, "transformer", "fp32")
    adapted = lora.Adapted({"transformer": ours}, plan.experiment.lora, plan.precision.trained, seed=7)
    arguments = tensors_of(plan, ours)(batch)
    base = item_loss(prediction(ours))(*arguments).asnumpy()
    adapted.load(trained.run_folder / lora.WEIGHTS_NAME)
    theirs = FluxTransformer2DModel.from_pretrained(str(plan.model_folder), subfolder="transformer")
    theirs.load_lora_adapter(str(trained.run_folder), weight_name=lora.WEIGHTS_NAME, prefix="transformer")
    found = item_loss(prediction(theirs.set_train(False)))(*arguments).asnumpy()
    np.testing.assert_allclose(found, item_loss(prediction(ours))(*arguments).asnumpy(), rtol=1e-5)
    assert np.abs(found - base).max() > 1e-4


def test_flux_schnell_format_trains_without_guidance(cpu, encoded, tiny_model, tmp_path):
    from pipeline.flux import tiny

    lab = encoded.copy(tmp_path / "lab")
    tiny.write_tiny_model(tmp_path / "schnell", guidance_embeds=False)
    lab.model = tmp_path / "schnell"
    lab.set("model", path=str(lab.model)).settle()
    assert lab.encode() == {}  # same seed, same encoders
    assert lab.run("TrainLoRA").done("TrainLoRA")


def test_half_precision_training_keeps_the_trained_parameters_in_fp32(lab):
    from safetensors.numpy import load_file

    lab.set("precision", preset="fp16").encode()
    lab.run("TrainLoRA")
    weights = load_file(lab.run_folder / lora.WEIGHTS_NAME)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    assert any(np.abs(value).max() > 0 for key, value in weights.items() if "lora_B" in key)


def test_the_loss_falls_by_more_than_three_standard_errors(lab):
    lab.set("train", steps=40, learning_rate=3e-3, mode="jit").run("TrainLoRA", "MeasureLoss")
    result = json.loads((lab.run_folder / "loss.json").read_text())
    assert result["pairs"] == 64
    assert result["gain"] > 3 * result["standard_error"] > 0
    assert result["gain"] == pytest.approx(result["before"] - result["after"])


def test_nothing_of_a_run_that_changed_a_frozen_weight_is_gone_on_from(encoded, tmp_path, monkeypatch):
    def refuse(*given):
        raise UserError("training changed frozen weights")

    lab = encoded.copy(tmp_path / "lab").set("train", checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="frozen"):
        patch.setattr(guard, "check_frozen", refuse)
        lab.run("TrainLoRA")
    run = RunFolder(lab.run_folder)
    assert not run.list_checkpoints() and not run.result.exists() and not list(run.path.glob("*.safetensors"))
    lab.run("TrainLoRA")
    assert json.loads(run.result.read_text())["steps"] == 3 and lab.done("TrainLoRA")


def test_a_changed_frozen_weight_is_named(encoded):
    transformer = models.load_model(encoded.model, "transformer", "fp32")
    before = guard.frozen_digests({"transformer": transformer})
    lora.inject(transformer, encoded.experiment.lora, encoded.plan.precision.trained, seed=0)
    guard.check_frozen({"transformer": transformer}, before)
    name = "transformer_blocks.1.attn.to_q.weight"
    parameter = next(p for p in transformer.get_parameters() if p.name.replace(".base_layer.", ".") == name)
    lora.set_values(
        parameter, parameter.asnumpy() + np.float32(1e-6) * (np.arange(parameter.size) == 5).reshape(parameter.shape)
    )
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        guard.check_frozen({"transformer": transformer}, before)


@pytest.mark.parametrize(
    "targets, message",
    [
        (("to_q", "nothing"), "no module of the transformer is named nothing"),
        ("everything", "no preset"),
        (("to_out",), "to_out is a CellList, expected linear layers"),
        (("norm_q",), "norm_q is a RMSNorm, expected linear layers"),
        (("single_transformer_blocks.*.nothing",), "no module of the transformer is named single_transformer_blocks"),
    ],
)
def test_lora_targets_must_be_linear_layers_that_exist(encoded, targets, message):
    settings = type(encoded.experiment.lora)(targets=targets)
    transformer = models.load_model(encoded.model, "transformer", "fp32")
    with pytest.raises(UserError, match=message):
        lora.inject(transformer, settings, encoded.plan.precision.trained, seed=0)


def test_lora_parameters_are_counted_as_its_shapes_say(encoded):
    """Per target: rank * (inputs + outputs); both kinds of blocks have width 128 here."""
    transformer = models.load_model(encoded.model, "transformer", "fp32")
    settings = type(encoded.experiment.lora)(rank=3)
    trained = lora.inject(transformer, settings, encoded.plan.precision.trained, seed=0)
    assert sum(parameter.size for parameter in trained) == 3 * (128 + 128) * (2 * 4 + 2 * 3)


def test_all_linear_trains_every_linear_layer_of_the_blocks_but_modulation(encoded):
    from mindspore import mint

    transformer = models.load_model(encoded.model, "transformer", "fp32")
    linear = {name for name, cell in transformer.cells_and_names() if isinstance(cell, mint.nn.Linear)}
    expected = {name for name in linear if "transformer_blocks" in name and ".norm" not in name}
    settings = type(encoded.experiment.lora)(targets="all-linear")
    trained = lora.inject(transformer, settings, encoded.plan.precision.trained, seed=0)
    assert {parameter.name.partition(".lora_")[0] for parameter in trained} == expected


def test_two_processes_do_not_train_one_run(lab):
    lab.run_folder.mkdir(parents=True, exist_ok=True)
    with team.locked(RunFolder(lab.run_folder)), pytest.raises(UserError, match="another process"):
        lab.run("TrainLoRA")


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_no_lora(lab):
    lab.set("train", learning_rate=1000.0, weight_decay=1000.0, steps=20)
    with pytest.raises(UserError, match="the loss is"):
        lab.run("TrainLoRA")
    assert not lab.done("TrainLoRA") and not (lab.run_folder / lora.WEIGHTS_NAME).exists()


def test_weights_that_are_not_finite_are_named_instead_of_the_learning_rate(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab", own_model=True)
    edit(lab.model, "transformer", lambda weights: weights["single_transformer_blocks.1.proj_out.bias"].fill(np.nan))
    with pytest.raises(UserError) as refusal:
        lab.run("TrainLoRA")
    name = "single_transformer_blocks.1.proj_out.bias"
    assert str(refusal.value).startswith(f"{lab.model / 'transformer'}: {name} has numbers that are not finite")
