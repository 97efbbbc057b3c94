"""What `python -m pipeline plan` says of an experiment whose weights or photos are not here, or not known yet."""

import dataclasses
import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest
from lab import Lab
from terminals import terminal

from cache.terminal.output import show
from cache.terminal.words import human_bytes
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.estimate import listing, memory, model, preflight, report
from pipeline.flux import pretrained
from pipeline.methods import CONTROLNET, LORA
from pipeline.settings.experiment import Experiment
from pipeline.settings.reading import load_experiment
from pipeline.synthetic import shapes

DEV = "black-forest-labs/FLUX.1-dev"
PROMPTS = '[sample]\nprompts = ["a cat", "a dog"]\nconditions = ["1.png", "2.png"]\n'


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache, and no network to ask."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    return tmp_path / "hub"


def experiment_of(folder: Path, text: str, target: str = "Ascend", memory_gb: float = 64.0) -> Experiment:
    path = folder / "e.toml"
    path.write_text(f'[device]\ntarget = "{target}"\nmemory_gb = {memory_gb}\n{text}')
    return load_experiment(path)


def real(folder: Path, text: str = "", trains: str = LORA, **device_settings) -> dict:
    """The plan of an experiment with FLUX.1-dev's configs."""
    return preflight.of_experiment(experiment_of(folder, text, **device_settings), trains, "FLUX.1-dev")


# --- every stage --------------------------------------------------------------------------------------------------


def test_every_stage_of_the_real_model_is_planned_to_the_parameter_and_the_byte(tmp_path):
    shapes.draw_shapes(tmp_path / "photos", 3, size=48)
    found = real(tmp_path, '[data]\nimages = "photos"\nresolution = 1024\n' + PROMPTS, CONTROLNET)
    rows = found["stages"]
    assert list(rows) == [
        *("EncodeCLIP", "EncodeT5", "EncodeImages", "EncodeControls"),
        *("SampleControlNetLatents", "SampleControlNet"),
    ]
    trained = 1_442_333_696
    expected = [123_060_480, 4_762_310_656, 83_819_683, 83_819_683, 11_901_408_320 + trained, 83_819_683]
    assert [row["parameters"] for row in rows.values()] == expected
    drawing = rows["SampleControlNetLatents"]
    assert drawing["weights_bytes"] == found["training"]["weights_bytes"] == 2 * 11_901_408_320 + 4 * trained
    assert drawing["weights_bytes"] < drawing["peak_bytes"] < found["training"]["peak_bytes"]
    sizes = {name: row["item_bytes"] for name, row in rows.items()}
    crc = 4
    assert sizes["EncodeCLIP"] == 768 * 2 + crc and sizes["EncodeT5"] == 512 * 4096 * 2 + crc
    assert sizes["EncodeImages"] == sizes["EncodeControls"] == 32 * 128 * 128 * 2 + crc
    assert sizes["SampleControlNetLatents"] == 16 * 128 * 128 * 4 + crc
    assert [row["items"] for row in rows.values()] == [5, 5, 3, 2, 4, 4]
    assert found["model"]["weights_bytes"] == 2 * sum(expected[:3]) + 2 * 11_901_408_320


def test_without_prompts_no_pictures_are_planned(tmp_path):
    assert list(real(tmp_path)["stages"]) == ["EncodeCLIP", "EncodeT5", "EncodeImages"]


def test_t5_in_fp16_keeps_a_part_in_fp32(tmp_path):
    found = real(tmp_path, '[precision]\npreset = "fp16"\n')["stages"]["EncodeT5"]
    assert found["weights_bytes"] == 2 * 4_762_310_656 + 2 * 24 * 10_240 * 4096


def test_loading_is_on_the_host_and_its_cost_stands_in_one_place(tmp_path, monkeypatch):
    before, loading = real(tmp_path), memory.LOADING
    monkeypatch.setattr(memory, "LOADING", 1.0)
    after = real(tmp_path)
    for found, copies in ((before, loading), (after, 1.0)):
        row = found["stages"]["EncodeT5"]
        assert row["host_loading_bytes"] == memory.LIBRARIES_BYTES["Ascend"] + int(copies * row["weights_bytes"])
        assert row["files_bytes"] == 2 * row["parameters"]
    assert before["stages"]["EncodeT5"]["peak_bytes"] == after["stages"]["EncodeT5"]["peak_bytes"]
    on_cpu = [real(tmp_path, target="CPU")["stages"]["EncodeT5"]["peak_bytes"]]
    monkeypatch.setattr(memory, "LOADING", 2.0)
    on_cpu += [real(tmp_path, target="CPU")["stages"]["EncodeT5"]["peak_bytes"]]
    assert on_cpu[0] < on_cpu[1]


# --- what does not fit --------------------------------------------------------------------------------------------

BIG = '[data]\nresolution = 1024\n[train]\nbatch_size = 4\n[precision]\npreset = "fp32"\n[sample]\nbatch_size = 2\n'


@pytest.mark.parametrize("trains", [LORA, CONTROLNET], ids=str)
@pytest.mark.parametrize("memory_gb", [0.4, 4.0, 14.0, 32.0, 60.0, 64.0])
def test_what_is_advised_makes_a_stage_take_what_is_said(tmp_path, trains, memory_gb):
    text = BIG + PROMPTS.removeprefix("[sample]\n")
    found = real(tmp_path, text, trains, memory_gb=memory_gb)
    several = {**found["stages"], "training": found["training"]}
    assert {name for name, row in several.items() if not row["fits"]} == {
        name for name, row in several.items() if row["peak_bytes"] > memory_gb * 1e9
    }
    for name, row in several.items():
        if not row["fits"]:
            advised = followed(tmp_path, text, row["advice"]["settings"], trains, memory_gb)
            again = advised["training"] if name == "training" else advised["stages"][name]
            assert again["peak_bytes"] == row["advice"]["peak_bytes"] and again["fits"] == row["advice"]["fits"]


def followed(folder: Path, text: str, settings: list[str], trains: str, memory_gb: float) -> dict:
    experiment = experiment_of(folder, text, memory_gb=memory_gb)
    for each in settings:  # such as [train] batch_size = 1
        for table, values in tomllib.loads(each.replace("] ", "]\n")).items():
            changed = dataclasses.replace(getattr(experiment, table), **values)
            experiment = dataclasses.replace(experiment, **{table: changed})
    return preflight.of_experiment(experiment, trains, "FLUX.1-dev")


def test_a_lora_at_1024_px_needs_checkpointing_on_64_gb_and_the_plan_says_so(tmp_path):
    text = "[data]\nresolution = 1024\n[train]\ngradient_checkpointing = "
    assert not (found := real(tmp_path, text + "false\n"))["training"]["fits"]
    assert found["training"]["advice"]["settings"] == ["[train] gradient_checkpointing = true"]
    assert one_line(found).startswith(
        "does not fit: TrainLoRA takes ~105 GB, one device has 64 GB set [train] gradient_checkpointing = true: ~"
    )
    assert (found := real(tmp_path, text + "true\n"))["training"]["fits"]
    assert one_line(found).startswith("fits one device: TrainLoRA takes the most, ~42.6 GB of 64 GB")


def test_what_no_setting_makes_fit_is_said(tmp_path):
    said = one_line(real(tmp_path, memory_gb=8))
    assert "GB even with [train] gradient_checkpointing = true and [data] resolution = 128: it takes a device" in said
    said = one_line(real(tmp_path, "[data]\nmax_sequence_length = 64\n", memory_gb=8))
    assert "EncodeT5 takes ~9.54 GB, one device has 8 GB no setting changes that: it takes a device with more" in said


def one_line(found: dict) -> str:
    return " ".join(text_of(found).split())


def text_of(found: dict) -> str:
    return "\n".join(map(str, report.parts(found)))


# --- models that are not here -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FLUX.1-dev", "FLUX.1-schnell"])
def test_a_known_hub_id_is_planned_before_it_is_downloaded(tmp_path, hub, name):
    experiment = experiment_of(tmp_path, f'[model]\npath = "black-forest-labs/{name}"\n')
    found = preflight.of_experiment(experiment, LORA)
    assert found["training"] == preflight.of_experiment(experiment, LORA, name)["training"]
    assert not found["model"]["is_here"] and found["model"]["download_bytes"] == found["model"]["weights_bytes"]
    assert str(hub) in [folder for disk in found["disks"] for folder in disk["folders"]]
    assert "nor downloaded from the Hub yet; run GetModel" in found["notes"][0]
    assert f"model black-forest-labs/{name}, 33." in one_line(found)


@pytest.mark.parametrize("path", ["someone/else", "someone/FLUX.1-dev", "black-forest-labs/FLUX.2"])
def test_of_an_unknown_hub_id_the_plan_says_what_to_do(tmp_path, path):
    experiment = experiment_of(tmp_path, f'[model]\npath = "{path}"\n')
    with pytest.raises(UserError, match=f"{path}: .* run GetModel, .*: --model-config FLUX.1-dev, FLUX.1-schnell"):
        preflight.of_experiment(experiment, LORA)


def test_an_unknown_config_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(UserError, match="known by name: FLUX.1-dev, FLUX.1-schnell"):
        preflight.of_experiment(experiment_of(tmp_path, ""), LORA, "FLUX.2")


@pytest.mark.parametrize("component, key", [("transformer", "num_layers"), ("text_encoder_2", "d_ff")])
def test_a_config_that_lacks_a_size_is_said_by_file_and_key(tmp_path, component, key):
    configs = shutil.copytree(model.CONFIGS / "FLUX.1-dev", tmp_path / "configs")
    path = configs / component / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(UserError, match=f"{component}/config.json: {key}: missing; "):
        preflight.of_experiment(experiment_of(tmp_path, ""), LORA, str(configs))


def test_encoders_keep_their_components_names_in_the_json_of_a_plan_from_configs(tmp_path):
    found = json.loads(report.as_json(real(tmp_path, PROMPTS), by_component=True))
    assert list(found["stages"]) == ["text_encoder", "text_encoder_2", "vae", "SampleLatents", "Sample"]


@pytest.mark.parametrize("num_npus, said", [(0, "1 NPU is used, none is here"), (8, "1 of 8 NPUs is used")])
def test_how_many_npus_are_used_is_said(tmp_path, monkeypatch, num_npus, said):
    for name in ("davinci_manager", *(f"davinci{number}" for number in range(num_npus))):
        (tmp_path / name).touch()
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    found = real(tmp_path)
    assert (found["devices_used"], found["devices_here"]) == (1, num_npus) and said in text_of(found)


def test_a_training_by_eight_ranks_is_planned_for_one_of_them(tmp_path, monkeypatch):
    for number in range(8):
        (tmp_path / f"davinci{number}").touch()
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    batches = "[train]\naccumulate = 8\n[parallel]\n"
    alone = real(tmp_path, batches + "ranks = 1")
    found, sharing = (
        real(tmp_path, batches + text) for text in ('ranks = "auto"', "ranks = 8\nshard_optimizer = true")
    )
    said = text_of(found)
    assert "8 of 8 NPUs are used" in said and "in PyNative, on each of 8 ranks:" in said
    assert alone["ranks_host_bytes"] is None and "ranks on one host" not in text_of(alone)
    assert found["ranks_host_bytes"] == 8 * found["training"]["host_loading_bytes"]
    assert "8 ranks on one host take up to" in said
    assert found["training"]["optimizer_bytes"] == alone["training"]["optimizer_bytes"]
    assert sharing["training"]["optimizer_bytes"] == alone["training"]["optimizer_bytes"] // 8
    on_cpu = real(tmp_path, batches + "ranks = 8", target="CPU", memory_gb=1)
    assert on_cpu["ranks_host_bytes"] == 8 * on_cpu["training"]["peak_bytes"]  # float32 from files in bfloat16
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,3,4")
    with pytest.raises(UserError, match="train.accumulate = 9: 3 ranks share"):
        real(tmp_path, batches + 'ranks = "auto"')


def test_ranks_on_a_cpu_have_the_mapped_weights_once(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab").set("train", accumulate=3).set("parallel", ranks=3)
    found = preflight.of_experiment(lab.experiment, LORA)
    one, weights = found["training"]["peak_bytes"], (lab.model / "transformer").glob("*.safetensors")
    mapped = sum(path.stat().st_size for path in weights)
    assert 0 < 3 * one - found["ranks_host_bytes"] <= 2 * mapped
    assert 3 * one - found["ranks_host_bytes"] == pytest.approx(2 * mapped, rel=0.05)
    assert "3 ranks on one host take ~" in text_of(found)


# --- photos that are not here, or not decoded ---------------------------------------------------------------------


def test_photos_are_counted_without_being_decoded(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, caption in {"1": "a cat", "2": "a cat", "3": "a dog", "4": ""}.items():
        (folder / f"{name}.png").write_bytes(b"no picture")
        (folder / f"{name}.txt").write_text(caption)
    text = '[data]\nimages = "photos"\nresolution = [512, 1024]\nflip = true\n[train]\ncaption_dropout = 0.1\n'
    found = real(tmp_path, text + '[sample]\nprompts = ["a cat", "a bird"]\n')
    assert [found["stages"][name]["items"] for name in ("EncodeCLIP", "EncodeT5", "EncodeImages")] == [4, 4, 3 * 4]
    assert {row["missing"] == row["items"] for row in found["stages"].values()} == {True}  # there is no store yet
    assert found["notes"][-1] == "1 more cannot be used; CheckData says why" and "3 photos" in found["notes"][-2]
    (tmp_path / "store").mkdir()
    found = real(tmp_path, text)
    assert {row["missing"] for row in found["stages"].values()} == {None} and " ?" in text_of(found)
    assert found["disks"][0]["is_complete"] and "store_bytes" in found["stages"]["EncodeT5"]["estimated"]


def test_where_no_photos_are_the_bytes_of_an_item_are_said(tmp_path):
    found = real(tmp_path, '[data]\nimages = "nowhere"\n')
    assert {(row["items"], row["store_bytes"]) for row in found["stages"].values()} == {(None, None)}
    assert all(row["item_bytes"] for row in found["stages"].values())
    assert "nowhere: no such folder yet" in found["notes"][-1] and "check [data] images" in found["notes"][-1]
    assert not found["disks"][0]["is_complete"] and "at least " in text_of(found)


@pytest.fixture
def small(tmp_path) -> Experiment:
    """Three photos for the embedded model, old enough to be remembered once they are decoded."""
    for path in shapes.draw_shapes(tmp_path / "photos", 3, size=48).rglob("*"):
        os.utime(path, (0, 0))
    return experiment_of(tmp_path, '[data]\nimages = "photos"\nresolution = 64\n', target="CPU")


def test_many_new_photos_are_left_to_check_data(small, monkeypatch):
    monkeypatch.setattr(listing, "QUICK_PHOTOS", 2)
    found = preflight.of_experiment(small, LORA)
    assert "run_folder" not in found["training"] and found["stages"]["EncodeImages"]["items"] == 3
    monkeypatch.setattr(listing, "QUICK_PHOTOS", 3)
    assert preflight.of_experiment(small, LORA)["stages"]["EncodeImages"]["missing"] == 3
    monkeypatch.setattr(listing, "QUICK_PHOTOS", 0)  # they are remembered by now
    assert "run_folder" in preflight.of_experiment(small, LORA)["training"]


def test_weights_that_nobody_has_read_are_left_to_get_model(small, monkeypatch):
    monkeypatch.setattr(pretrained, "QUICK_BYTES", 1)
    found = preflight.of_experiment(small, LORA)
    assert "run_folder" not in found["training"] and found["model"]["is_here"]


@pytest.mark.parametrize("trains", [LORA, CONTROLNET], ids=str)
def test_a_listing_gives_the_figures_of_the_plan_itself(tiny_model, tmp_path, trains):
    """Where no two photos are equal and nothing is cached."""
    lab = Lab(tmp_path / "lab", tiny_model).set("data", resolution=[32, 48], flip=True, crops=2)
    lab.set("train", caption_dropout=0.1).set("sample", prompts=["a cat"], resolution=48)
    (lab.pictures / "metadata.jsonl").touch()
    if trains == CONTROLNET:
        lab.set("controlnet", condition="grey", num_double_layers=1)
    experiment = lab.experiment
    plan = preflight.resolve(experiment, trains)
    counted = preflight.of_plan(plan)
    shutil.rmtree(lab.folder / "store", ignore_errors=True)
    own = model.model_of(experiment)
    listed = preflight.of_configs(own, experiment, trains, listing.listing(experiment))
    for name, row in counted["stages"].items():
        found = listed["stages"][name]
        assert found["store_bytes"] == pytest.approx(row["store_bytes"], abs=8)  # rounded up by recipe
        same = set(row) - {"store_bytes", "estimated"}
        assert {key: found[key] for key in same} == {key: row[key] for key in same}
    training = {key: value for key, value in counted["training"].items() if key not in ("is_done", "run_folder")}
    assert listed["training"] == training


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [LORA, CONTROLNET], ids=str)
@pytest.mark.parametrize("target", ["Ascend", "CPU"])
@pytest.mark.parametrize("text", ["", BIG + PROMPTS.removeprefix("[sample]\n"), f'[model]\npath = "{DEV}"\n' + PROMPTS])
def test_the_table_has_80_columns_and_marks_what_is_estimated(tmp_path, trains, target, text):
    text = text.replace('preset = "fp32"', 'preset = "fp16"')
    found = real(tmp_path, text, trains, target=target)
    with terminal() as seen:
        show(*report.parts(found))
    lines = seen.lines
    assert max(len(line) for line in lines if "/" not in line) <= 80
    for name, row in found["stages"].items():
        memory_line, disk_line = (line for line in lines if line.startswith(f"{name} "))
        assert f"~{human_bytes(row['peak_bytes'])}" in memory_line and f" {row['parameters']:,} " in memory_line
        assert ("~" in disk_line) == any(row.get(key) and key in row["estimated"] for key in ("items", "item_bytes"))
