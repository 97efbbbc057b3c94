"""ControlNets: what they are made of, what training them changes, what they are conditioned on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from kills import Killed, kill_at, kill_at_random, metrics_of, outcome
from lab import Lab
from pairs import add_conditions, encode, plan_of, run_folder
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.devices import tensors
from pipeline.devices.precision import Policy
from pipeline.errors import UserError
from pipeline.flux import models, weights
from pipeline.flux.prediction import prediction
from pipeline.methods import controlnet_model as controlnet
from pipeline.settings.experiment import Experiment
from pipeline.settings.fields import ControlNet
from pipeline.training import guard, loop, measure
from pipeline.training.batches import Batches
from pipeline.training.loss import flow_loss, tensors_of

pytestmark = pytest.mark.usefixtures("cpu")

FP32, FP16 = Policy("fp32", "fp32", "fp32"), Policy("fp32", "fp16", "fp16")


@pytest.fixture(scope="module")
def trained(encoded_pairs, tmp_path_factory) -> Lab:
    return encoded_pairs.copy(tmp_path_factory.mktemp("trained") / "lab").run("TrainControlNet")


def transformer_of(lab: Lab, dtype: str = "fp32"):
    return models.load_model(lab.model, "transformer", dtype)


def parameters_of(cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in cell.get_parameters()}


# --- what it is made of -------------------------------------------------------------------------------------------


def test_it_starts_as_the_transformers_first_blocks_with_nothing_coming_out(encoded_pairs):
    transformer = transformer_of(encoded_pairs)
    made = controlnet.make(transformer, encoded_pairs.experiment, FP32)
    weights, own = parameters_of(transformer), parameters_of(made)
    assert all(parameter.requires_grad for parameter in made.get_parameters())
    zero = {name for name, array in own.items() if not array.any() and "block" in name and "controlnet_" in name}
    assert {f"controlnet.controlnet_{kind}blocks.0.weight" for kind in ("", "single_")} <= zero
    assert not own["controlnet.controlnet_x_embedder.weight"].any()
    copied = {name for name in own if name.removeprefix("controlnet.") in weights}
    assert len(own) == len(copied) + 6
    for name in copied:
        np.testing.assert_array_equal(own[name], weights[name.removeprefix("controlnet.")])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_it_shares_no_memory_with_the_transformer(encoded_pairs, dtype):
    from mindspore import ops

    transformer = transformer_of(encoded_pairs, dtype)
    before = guard.frozen_digests({"transformer": transformer})
    for parameter in controlnet.make(transformer, encoded_pairs.experiment, FP32).get_parameters():
        ops.assign(parameter, parameter + 1.0)
    assert guard.frozen_digests({"transformer": transformer}) == before


@pytest.mark.parametrize("policy", [FP32, FP16], ids=["fp32", "fp16"])
def test_the_first_prediction_is_the_transformers_alone_exactly(encoded_pairs, policy):
    plan = plan_of(encoded_pairs)
    transformer = transformer_of(encoded_pairs, policy.compute)
    made = controlnet.make(transformer, encoded_pairs.experiment, policy)
    arguments = arguments_of(plan, policy, transformer, made)
    alone = prediction(transformer)(*arguments).asnumpy()
    beside = prediction(transformer, controlnet=made)(*arguments).asnumpy()
    assert alone.dtype == beside.dtype and alone.tobytes() == beside.tobytes()
    for parameter in made.get_parameters():
        if "controlnet_blocks" in parameter.name:
            parameter.set_data(parameter + 0.1)
    assert prediction(transformer, controlnet=made)(*arguments).asnumpy().tobytes() != alone.tobytes()


def arguments_of(plan, policy: Policy, *networks) -> tuple:
    """The arguments of a prediction for one batch."""
    arguments = list(tensors_of(plan, *networks)(Batches(plan).training(0)))
    dtype = tensors.mindspore_dtype(policy.compute)
    arguments = [each.astype(dtype) if index not in (1, 5, 6, 7) else each for index, each in enumerate(arguments)]
    x, _, txt, pooled, timestep, img_ids, txt_ids, _, guidance, control = arguments
    return x, txt, pooled, timestep, img_ids, txt_ids, guidance, control


def test_half_precision_computes_in_half_with_the_gradients_of_fp32(encoded_pairs):
    plan, found = plan_of(encoded_pairs), {}
    for policy in (FP32, FP16):
        transformer = transformer_of(encoded_pairs, policy.compute)
        made = controlnet.make(transformer, encoded_pairs.experiment, policy)
        for number, parameter in enumerate(made.get_parameters()):
            if parameter.name.startswith("controlnet.controlnet_"):
                values = np.random.default_rng(number).normal(size=parameter.shape) * 0.1
                parameter.set_data(as_tensor(values))
        x, txt, pooled, timestep, img_ids, txt_ids, guidance, control = arguments_of(plan, policy, transformer, made)
        double, single = made(x, control, None, 1.0, txt, pooled, timestep, img_ids, txt_ids, guidance)
        assert {str(each.dtype) for each in (*double, *single)} == {"Float32" if policy is FP32 else "Float16"}
        assert {str(parameter.dtype) for parameter in made.get_parameters()} == {"Float32"}
        target, weight = as_tensor(np.zeros(x.shape)), as_tensor(np.ones(len(x)))
        loss = flow_loss(prediction(transformer, controlnet=made))
        settings = dataclasses.replace(plan.experiment.train, mode="pynative")
        batch = x, target, txt, pooled, timestep, img_ids, txt_ids, weight, guidance, control
        training = loop.Training(loss, list(made.get_parameters()), settings)
        (value,), gradients = training.gradients([batch], scale=1024.0 if policy is FP16 else 1.0)
        flat = np.concatenate([gradient.asnumpy().ravel() for gradient in gradients])
        found[policy] = value.asnumpy(), flat
    (exact, expected), (rough, flat) = found[FP32], found[FP16]
    assert rough / 1024 == pytest.approx(float(exact), rel=1e-2)
    cosine = flat @ expected / np.linalg.norm(flat) / np.linalg.norm(expected)
    assert cosine > 0.999 and np.linalg.norm(flat) / 1024 == pytest.approx(np.linalg.norm(expected), rel=0.02)


def as_tensor(array):
    import mindspore as ms

    return ms.Tensor(np.asarray(array, np.float32))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_double_layers": 3}, "num_double_layers: 3, but the transformer has 2"),
        ({"num_single_layers": 9}, "has 2"),
    ],
)
def test_more_blocks_than_the_transformer_has_are_refused(encoded_pairs, settings, said):
    with pytest.raises(UserError, match=said):
        controlnet.make(
            transformer_of(encoded_pairs),
            dataclasses.replace(encoded_pairs.experiment, controlnet=ControlNet(**settings)),
            FP32,
        )


def test_the_default_depth_is_four_blocks_or_all_that_there_are():
    deep, shallow = {"num_layers": 19, "num_single_layers": 38}, {"num_layers": 2, "num_single_layers": 2}
    by_default, asked = Experiment(), Experiment(controlnet=ControlNet(num_double_layers=4))
    assert controlnet.depths(by_default, deep) == controlnet.depths(asked, deep) == (4, 0)
    assert controlnet.depths(by_default, shallow) == (2, 0)
    with pytest.raises(UserError, match="num_double_layers: the transformer has no double blocks; set num_single"):
        controlnet.check(by_default, {"num_layers": 0, "num_single_layers": 2})


def test_a_controlnet_that_cannot_be_made_is_said_before_anything_is_encoded(paired, tmp_path):
    lab = paired.copy(tmp_path / "lab").set("controlnet", init_from="nowhere")
    lab.run("CheckControls")
    with pytest.raises(UserError, match="nowhere/config.json: missing; check .controlnet. init_from"):
        lab.run("CheckControlNetRoom")
    assert not lab.done("CheckControlNetRoom")


# --- training -----------------------------------------------------------------------------------------------------


def test_training_changes_the_controlnet_and_not_the_transformer(encoded_pairs, trained):
    found = load_file(run_folder(trained) / controlnet.WEIGHTS_NAME)
    start = parameters_of(controlnet.make(transformer_of(encoded_pairs), encoded_pairs.experiment, FP32))
    start = {weights.name_in_file(name.removeprefix("controlnet.")): array for name, array in start.items()}
    assert found.keys() == start.keys()
    moved = {name for name in found if found[name].tobytes() != start[name].tobytes()}
    assert {"controlnet_blocks.0.weight", "controlnet_single_blocks.0.weight"} <= moved
    assert load_file(trained.model / "transformer/diffusion_pytorch_model.safetensors").keys() == set(
        map(weights.name_in_file, parameters_of(transformer_of(trained)))
    )
    result = json.loads((run_folder(trained) / "result.json").read_text())
    assert result["trained_parameters"] == sum(array.size for array in found.values())
    assert result["precision"]["controlnet"] == {
        "parameters": {"float32": result["trained_parameters"]},
        "output": "float32",
    }


@pytest.mark.parametrize("preset", ["fp32", pytest.param("fp16", marks=pytest.mark.slow), "fp16-text-fp32"])
def test_the_precision_of_the_design_is_what_is_measured(paired, tmp_path, preset):
    lab = paired.copy(tmp_path / "lab").set("precision", preset=preset).set("train", steps=1)
    encode(lab)
    lab.run("TrainControlNet")
    table = json.loads((run_folder(lab) / "result.json").read_text())["precision"]
    half, text = {"fp32": (32, 32), "fp16": (16, 16), "fp16-text-fp32": (16, 32)}[preset]
    parameters = {name: "+".join(row["parameters"]) for name, row in table.items()}
    outputs = {name: row["output"] for name, row in table.items()}
    kept = {"vae": half, "text_encoder": text, "text_encoder_2": text, "transformer": half, "controlnet": 32}
    expected = {name: f"float{bits}" for name, bits in kept.items()}
    if text == 16:
        expected["text_encoder_2"] = "float16+float32"  # the projections that overflow in float16
    assert parameters == expected
    assert outputs == {name: f"float{bits}" for name, bits in (kept | {"controlnet": half}).items()}


def test_a_killed_training_ends_as_the_unbroken_one(encoded_pairs, tmp_path, monkeypatch):
    lab = encoded_pairs.copy(tmp_path / "lab").set("train", steps=5, checkpoint_every=2, ema_decay=0.9)
    other = lab.copy(tmp_path / "other")
    lab.run("TrainControlNet")
    kills = [3, 5]
    kill_at(monkeypatch, kills)
    while kills:
        with pytest.raises(Killed):
            other.run("TrainControlNet")
    other.run("TrainControlNet")
    assert outcome(run_folder(lab)) == outcome(run_folder(other))


@pytest.mark.slow
def test_a_training_killed_by_the_kernel_ends_as_the_unbroken_one(encoded_pairs, tmp_path):
    lab = encoded_pairs.copy(tmp_path / "lab").set("train", steps=40, checkpoint_every=1)
    other = lab.copy(tmp_path / "other")
    kill_at_random(other, "TrainControlNet", run_folder(other), num_kills=6, steps=40)
    assert outcome(run_folder(lab.run("TrainControlNet"))) == outcome(run_folder(other))


@pytest.mark.slow
def test_compiled_training_has_the_losses_of_pynative(encoded_pairs, trained, tmp_path):
    lab = encoded_pairs.copy(tmp_path / "lab").set("train", mode="jit").run("TrainControlNet")
    found, expected = ([line["loss"] for line in metrics_of(run_folder(each))] for each in (lab, trained))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_checkpointing_changes_nothing(encoded_pairs, trained, tmp_path):
    lab = encoded_pairs.copy(tmp_path / "lab").set("train", gradient_checkpointing=True).run("TrainControlNet")
    found, expected = ([line["loss"] for line in metrics_of(run_folder(each))] for each in (lab, trained))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_conditioning_scale_reaches_the_prediction(trained, tmp_path):
    plan, transformer = plan_of(trained), transformer_of(trained)
    made = models.load_model(run_folder(trained) / "controlnet", "controlnet", "fp32")
    arguments = arguments_of(plan, FP32, transformer, made)
    alone = prediction(transformer)(*arguments).asnumpy()
    by_scale = [
        prediction(transformer, controlnet=made, conditioning_scale=s)(*arguments).asnumpy() for s in (0.0, 1.0)
    ]
    np.testing.assert_array_equal(by_scale[0], alone)
    assert np.abs(by_scale[1] - alone).max() > 1e-4
    other = trained.copy(tmp_path / "lab").set("controlnet", conditioning_scale=0.5)
    assert run_folder(other).name != run_folder(trained).name


# --- the result ---------------------------------------------------------------------------------------------------


def test_mindone_loads_the_result_and_its_metadata_name_its_origin(trained):
    from mindone.diffusers import FluxControlNetModel

    folder = run_folder(trained) / "controlnet"
    theirs = FluxControlNetModel.from_pretrained(str(folder)).set_train(False)
    ours = models.load_model(folder, "controlnet", "fp32")
    plan, transformer = plan_of(trained), transformer_of(trained)
    arguments = arguments_of(plan, FP32, transformer, ours)
    found, expected = (prediction(transformer, controlnet=each)(*arguments).asnumpy() for each in (theirs, ours))
    np.testing.assert_array_equal(found, expected)
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["run_id"] == plan.run_id and metadata["step"] == "3"
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "FluxControlNetModel"


@pytest.mark.parametrize(("dtype", "code"), [("bf16", "BF16"), ("fp16", "F16")])
def test_it_is_saved_in_the_dtype_asked_for(encoded_pairs, tmp_path, dtype, code):
    lab = encoded_pairs.copy(tmp_path / "lab").set("controlnet", save_dtype=dtype).set("train", steps=1)
    lab.run("TrainControlNet")
    with safe_open(run_folder(lab) / controlnet.WEIGHTS_NAME, "np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {code}


def test_another_dtype_of_the_result_trains_nothing_again(trained, tmp_path, capsys):
    lab = trained.copy(tmp_path / "lab").set("controlnet", save_dtype="fp16").run("TrainControlNet")
    assert "going on from step 3 of" in capsys.readouterr().out
    found, expected = (load_file(run_folder(each) / controlnet.WEIGHTS_NAME) for each in (lab, trained))
    assert all(array.tobytes() == expected[key].astype(np.float16).tobytes() for key, array in found.items())


def test_a_config_that_leaves_a_default_out_fits(trained):
    own = json.loads((trained.model / "transformer/config.json").read_text())
    del own["axes_dims_rope"], own["patch_size"]
    folder = run_folder(trained) / "controlnet"
    assert controlnet.check_fits(folder, own) is None
    with pytest.raises(UserError, match="for another transformer than .model. path has: in_channels 64 and not 128"):
        controlnet.check_fits(folder, own | {"in_channels": 128})


def test_init_from_goes_on_with_the_weights_of_another_run(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab")
    folder = run_folder(lab) / "controlnet"
    lab.set("controlnet", init_from=str(folder), num_double_layers=4)  # the folder says how many there are
    made = controlnet.make(transformer_of(lab), lab.experiment, FP32)
    start = {weights.name_in_file(k.removeprefix("controlnet.")): a.tobytes() for k, a in parameters_of(made).items()}
    assert start == {
        key: array.tobytes() for key, array in load_file(folder / "diffusion_pytorch_model.safetensors").items()
    }
    before = run_folder(lab).name
    lab.run("TrainControlNet")
    assert lab.done("TrainControlNet") and before == run_folder(lab).name
    moved = lab.folder / "moved"
    shutil.move(folder, moved)
    lab.set("controlnet", init_from="moved")
    assert run_folder(lab).name == before  # its content is what counts, not its place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 8}, "another transformer.*num_attention_heads 8 and not 4"),
        ({"num_mode": 6}, "num_mode is 6: a union of several conditions"),
        ({"conditioning_embedding_channels": 4}, "a pixel encoder"),
        ({"_class_name": "ControlNetModel"}, "class ControlNetModel, expected FluxControlNetModel"),
    ],
)
def test_a_controlnet_for_something_else_is_refused(trained, tmp_path, change, said):
    lab = trained.copy(tmp_path / "lab")
    folder = shutil.copytree(run_folder(lab) / "controlnet", tmp_path / "other")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        controlnet.make(transformer_of(lab), lab.set("controlnet", init_from=str(folder)).experiment, FP32)


def test_other_conditions_are_never_a_photos_own(trained):
    plan = plan_of(trained)
    batches = Batches(plan)
    for index, order in enumerate(measure.other_conditions(plan, batches)):
        rows = batches.evaluated(index, measure.SIZE)
        own = [row.photo.condition.digest for row in rows]
        assert all(own[row] != own[other] for row, other in enumerate(order))


@pytest.mark.slow
def test_where_all_conditions_are_alike_there_are_no_others(paired, tmp_path):
    lab = paired.copy(tmp_path / "lab")
    add_conditions(lab, lambda picture: Image.new("RGB", picture.size, "white"))
    encode(lab)
    lab.run("TrainControlNet", "MeasureControlNet")
    found = json.loads((run_folder(lab) / "loss.json").read_text())
    assert found["with_other_conditions"] is None and found["pairs"] == 64
