"""The records that stages leave: where they say their inputs and outputs are, somebody finds them there."""

from importlib.metadata import version

import pytest
from lab import ENCODERS, Lab

from cache import canonical, caption_item, digest

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def lab(cpu, tiny_model, tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("records") / "lab", tiny_model)
    lab.encode()
    return lab.run("TrainLoRA", "MeasureLoss")


def test_encoders_name_what_they_encoded_with_what_and_where_it_is(lab):
    plan, photos = lab.plan, lab.plan.photos
    items = {caption_item(photo.caption) for photo in photos}
    records = {name: lab.record(name) for name in ENCODERS}
    for name in ("EncodeCLIP", "EncodeT5"):
        inputs = records[name]["inputs"]
        assert (inputs["items"], inputs["items_digest"]) == (len(items), digest(canonical(sorted(items))))
    assert records["EncodeImages"]["inputs"]["items"] == len({photo.digest for photo in photos})
    assert records["EncodeCLIP"]["inputs"]["text_encoder"] == plan.pooled.recipe["encoder"]
    found = {name: record["outputs"]["entries"] for name, record in records.items()}
    assert found == {"EncodeCLIP": [plan.pooled.id], "EncodeT5": [plan.txt.id], "EncodeImages": [lab.latents.id]}


@pytest.mark.parametrize("stage", ["TrainLoRA", "MeasureLoss"])
def test_a_training_names_its_entries_its_model_and_its_run(lab, stage):
    record = lab.record(stage)
    assert record["inputs"]["entries"] == {name: lab.record(name)["outputs"]["entries"] for name in ENCODERS}
    assert record["inputs"]["transformer"] == lab.plan.network_digest["weights"]
    assert record["outputs"] == {"run": lab.plan.run_id}


@pytest.mark.parametrize("stage", [*ENCODERS, "TrainLoRA"])
def test_every_record_has_versions_device_policy_cost(lab, stage):
    record = lab.record(stage)
    assert record["stage"] == stage and record["device"] == "CPU" and record["precision"]["preset"] == "fp32"
    assert record["versions"]["mindspore"] == version("mindspore")
    assert record["seconds"] > 0 and record["peak_memory_bytes"]["process"] > 2**28
    assert "precision" in record["outcome"]
