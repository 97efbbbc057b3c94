"""The preflight against what is then really loaded, written and trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import ENCODERS, Lab

from pipeline import stages
from pipeline.errors import UserError
from pipeline.estimate import estimates, preflight, report
from pipeline.methods import CONTROLNET
from pipeline.plan.plan import resolve
from pipeline.settings.fields import Train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lab(tiny_model, tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("preflight") / "lab", tiny_model).run("CheckData")


def plan_command(*arguments: str) -> dict:
    command = [sys.executable, "-m", "pipeline", "plan", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_full_size_flux_on_ascend_from_configs_alone(tmp_path):
    """The numbers are those of the models themselves, once made in full size."""
    path = tmp_path / "e.toml"
    path.write_text('[device]\ntarget = "Ascend"\n')
    found = plan_command(str(path), "--model-config", "FLUX.1-dev")
    assert found["preset"] == "bf16"
    assert {name: row["parameters"] for name, row in found["stages"].items()} == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    }
    assert found["stages"]["text_encoder_2"]["weights_bytes"] == 2 * 4_762_310_656
    own = found["training"]
    assert (own["parameters"], own["trained_parameters"]) == (11_906_077_760, 4_669_440)
    assert own["weights_bytes"] == 2 * 11_901_408_320 + 4 * 4_669_440
    own = plan_command(str(path), "--model-config", "FLUX.1-dev", "--controlnet")["training"]
    assert own["trained_parameters"] == 1_442_333_696 and own["optimizer_bytes"] == 8 * 1_442_333_696


def test_what_is_planned_is_what_is_encoded_and_trained(lab, tmp_path):
    other = lab.copy(tmp_path / "lab").set("train", checkpoint_every=1, ema_decay=0.9)
    plan = other.plan
    before = preflight.of_plan(plan)
    assert {name: (row["items"], row["missing"]) for name, row in before["stages"].items()} == {
        name: (3, 3) for name in ENCODERS
    }
    assert not before["training"]["is_done"]
    other.encode()
    other.run("TrainLoRA")
    for name, entries in zip(ENCODERS, (plan.pooled, plan.txt, other.latents)):
        row = before["stages"][name]
        assert row["parameters"] == sum(other.record(name)["outcome"]["precision"]["parameters"].values())
        rows_bytes = sum(path.stat().st_size for path in entries.path.rglob("c.0*") if path.is_file())
        assert rows_bytes == pytest.approx(row["store_bytes"], rel=0.1)
    result = json.loads((other.run_folder / "result.json").read_text())
    assert before["training"]["trained_parameters"] == result["trained_parameters"]
    kept = bytes_in(other.run_folder / "checkpoints")  # two of them, of the three that there are for a moment
    assert kept * 3 / 2 == pytest.approx(before["training"]["checkpoints_bytes"], rel=0.15)
    after = preflight.of_plan(other.plan)
    assert after["training"]["is_done"] and {row["missing"] for row in after["stages"].values()} == {0}
    assert [disk["needed_bytes"] for disk in after["disks"]] == [0]


def test_luigi_encodes_nothing_that_the_disk_has_no_room_for(lab, tmp_path, monkeypatch):
    other = lab.copy(tmp_path / "lab")
    assert other.done("CheckRoom")
    usage = preflight.shutil.disk_usage(other.folder)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert not other.done("CheckRoom")
    with pytest.raises(UserError, match=r"store and .*runs: .* kB will be written there, 1 kB are free"):
        stages.run("CheckRoom", other.experiment)


def test_room_for_a_controlnet_is_not_asked_for_by_a_lora(lab, tmp_path):
    other = lab.copy(tmp_path / "lab").set("controlnet", init_from="nowhere")
    assert other.done("CheckRoom") and not other.done("CheckControlNetRoom")
    other.set("controlnet", init_from="", condition="grey", num_double_layers=9)
    with pytest.raises(UserError, match="num_double_layers: 9, but the transformer has 2"):
        stages.run("CheckControlNetRoom", other.experiment)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"steps": 500}, 3),
        ({"steps": 501}, 6),
        ({"steps": 5000}, 9),
        ({"steps": 5000, "ema_decay": 0.9}, 12),
        ({"steps": 5000, "checkpoint_every": 0}, 3),
        ({"epochs": 3}, 9),
    ],
)
def test_checkpoints_take_what_is_kept_and_one_more(settings, copies):
    assert estimates.checkpoints_bytes(100, Train(**settings)) == 100 * copies


def test_targets_that_no_layer_has_are_said_before_anything_is_encoded(lab, tmp_path):
    other = lab.copy(tmp_path / "lab").set("lora", targets=["to_q", "to_nothing"])
    assert not other.done("CheckRoom")
    with pytest.raises(UserError, match="no linear layer of the transformer is named to_nothing"):
        stages.run("CheckRoom", other.experiment)


def test_sizes_of_batches_and_both_kinds_of_training_are_counted(lab, tmp_path):
    other = lab.copy(tmp_path / "lab").set("data", resolution=[32, 48])
    assert preflight.of_plan(other.plan)["training"]["num_shapes"] == 2
    other.set("controlnet", condition="grey", num_double_layers=1)
    plan = resolve(other.experiment, CONTROLNET)
    found = preflight.of_plan(plan)
    assert found["stages"]["EncodeControls"]["items"] == 6
    assert "training a ControlNet; steps in PyNative:" in map(str, report.parts(found))


def test_it_imports_no_mindspore(lab):
    code = (
        "import sys; from pipeline.commands import main; main(['plan', sys.argv[1]]); print('mindspore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(lab.path)], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
