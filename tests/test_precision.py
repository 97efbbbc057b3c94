import re

import pytest

from pipeline.devices import precision
from pipeline.devices.device import COMPUTES
from pipeline.devices.precision import Policy
from pipeline.errors import UserError
from pipeline.settings.fields import PrecisionSettings
from pipeline.settings.values import PRECISION_COMPONENTS

PRESETS = ("bf16", "fp16", "bf16-text-fp32", "fp16-text-fp32", "fp32", "auto")


def resolved(device, preset="auto", **tables):
    return precision.resolve(PrecisionSettings(preset, **tables), device, COMPUTES[device])


def refusal(device, preset="auto", **tables):
    with pytest.raises(UserError) as error:
        resolved(device, preset, **tables)
    heading, *lines = str(error.value).split("\n  ")
    return heading, lines


@pytest.mark.parametrize(
    "device, preset, half, text",
    [
        ("Ascend", "bf16", "bf16", "bf16"),
        ("Ascend", "fp16", "fp16", "fp16"),
        ("Ascend", "bf16-text-fp32", "bf16", "fp32"),
        ("Ascend", "fp16-text-fp32", "fp16", "fp32"),
        ("Ascend", "fp32", "fp32", "fp32"),
        ("Ascend", "auto", "bf16", "bf16"),
        ("CPU", "fp16", "fp16", "fp16"),
        ("CPU", "fp16-text-fp32", "fp16", "fp32"),
        ("CPU", "fp32", "fp32", "fp32"),
        ("CPU", "auto", "fp32", "fp32"),
    ],
)
def test_presets_are_the_table_of_the_design(device, preset, half, text):
    found = resolved(device, preset)
    assert (found.vae, found.transformer) == (Policy(half, half, half),) * 2
    assert (found.text_encoder, found.text_encoder_2) == (Policy(text, text, text),) * 2
    assert (found.trained.params, found.trained.compute) == ("fp32", half)


@pytest.mark.parametrize("device", COMPUTES)
@pytest.mark.parametrize("preset", PRESETS)
def test_trained_parameters_are_fp32_wherever_a_preset_resolves(device, preset):
    try:
        assert resolved(device, preset).trained.params == "fp32"
    except UserError:
        assert (device, preset[:4]) == ("CPU", "bf16")


def test_what_auto_chose_is_in_the_result():
    assert resolved("CPU").preset == "fp32"
    assert resolved("Ascend").preset == "bf16"


@pytest.mark.parametrize(
    "preset, refused",
    [("bf16", PRECISION_COMPONENTS), ("bf16-text-fp32", ("vae", "transformer", "trained"))],
)
def test_bf16_on_cpu_is_refused_for_each_component_by_name(preset, refused):
    heading, lines = refusal("CPU", preset)
    assert preset in heading
    assert [line.partition(":")[0] for line in lines] == list(refused)
    assert all("CPU does not compute bf16" in line for line in lines)


def test_the_presets_that_a_refusal_suggests_do_resolve():
    _, lines = refusal("CPU", "bf16")
    for line in lines:
        suggested = line.partition("presets that work: ")[2].split(", ")
        assert set(suggested) == {"fp32", "fp16", "fp16-text-fp32"}
        for preset in suggested:
            assert resolved("CPU", preset).preset == preset


@pytest.mark.parametrize("component", PRECISION_COMPONENTS[:-1])
def test_a_component_can_be_set_apart_from_the_preset(component):
    found = resolved("Ascend", "bf16", **{component: {"params": "fp32", "compute": "fp32"}})
    for name in PRECISION_COMPONENTS[:-1]:
        dtype = "fp32" if name == component else "bf16"
        assert getattr(found, name) == Policy(dtype, dtype, dtype)
    assert found.trained == Policy("fp32", "bf16", "bf16")


@pytest.mark.parametrize("name", ["transformer", "trained"])
def test_a_storage_dtype_of_what_is_not_stored_is_refused(name):
    with pytest.raises(UserError, match=f"{name}: nothing of it is kept in the store"):
        resolved("CPU", "fp32", **{name: {"storage": "fp16"}})


def test_storage_follows_compute_unless_it_is_set():
    found = resolved("CPU", "fp32", vae={"storage": "bf16"}, text_encoder={"params": "fp16", "compute": "fp16"})
    assert found.vae == Policy("fp32", "fp32", "bf16")
    assert found.vae.storage_dtype == "bfloat16"
    assert found.text_encoder.storage_dtype == "float16"
    assert found.text_encoder_2.storage_dtype == "float32"


def test_an_override_that_the_device_cannot_compute_is_refused_with_dtypes_that_resolve():
    _, lines = refusal("CPU", "fp32", vae={"params": "bf16", "compute": "bf16"})
    (line,) = lines
    assert line.startswith("vae: CPU does not compute bf16; ")
    suggested = re.search(r"in \[precision.vae\] set one of (.+)", line)[1].split(", ")
    for dtype in suggested:
        assert resolved("CPU", "fp32", vae={"params": dtype, "compute": dtype}).vae.compute == dtype


def test_an_override_can_mend_a_preset():
    fp32 = {"params": "fp32", "compute": "fp32"}
    mended = {name: fp32 for name in PRECISION_COMPONENTS}
    assert resolved("CPU", "bf16", **mended).vae == Policy("fp32", "fp32", "fp32")
    _, lines = refusal("CPU", "bf16", **{**mended, "vae": {}})
    assert len(lines) == 1 and lines[0].startswith("vae: ")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_trained_parameters_cannot_be_set_to_a_half_type(dtype):
    _, lines = refusal("Ascend", "bf16", trained={"params": dtype})
    assert lines == ["trained: parameters must be fp32: MindSpore's optimizers step in the parameters' dtype"]


def test_parameters_and_arithmetic_of_different_dtypes_are_refused():
    _, (line,) = refusal("Ascend", "bf16", vae={"params": "fp32"})
    assert line.startswith("vae: parameters in fp32 with arithmetic in bf16 is not supported; set params and compute")
    assert "[precision.vae]" in line


def test_all_problems_are_reported_at_once():
    wrong = {"vae": {"compute": "fp16"}, "transformer": {"params": "bf16"}, "trained": {"params": "fp16"}}
    _, lines = refusal("CPU", "fp32", **wrong)
    assert {line.partition(":")[0] for line in lines} == {"vae", "transformer", "trained"}


# --- simulated ----------------------------------------------------------------------------------------------------


def test_a_device_without_bf16_simulates_it_where_asked_to():
    found = resolved("CPU", "bf16-text-fp32", simulate=True)
    assert found.vae == found.transformer == Policy("bf16", "bf16", "bf16", simulated=True)
    assert found.trained == Policy("fp32", "bf16", "bf16", simulated=True)
    assert found.text_encoder == Policy("fp32", "fp32", "fp32")
    assert found.simulated == ("vae", "transformer", "trained") and found.label == "bf16-text-fp32, simulated"
    assert (found.vae.params_on_device, found.vae.compute_on_device) == ("fp32", "fp32")


def test_a_device_with_bf16_computes_it_for_real():
    found = resolved("Ascend", "bf16", simulate=True)
    assert not found.simulated and found == resolved("Ascend", "bf16") and found.label == "bf16"


def test_simulating_where_nothing_is_bf16_is_refused():
    _, lines = refusal("CPU", "fp32", simulate=True)
    assert lines == ["simulate: nothing here is bf16; set precision.preset = 'bf16', or remove simulate"]


def test_a_refusal_of_bf16_names_the_simulation():
    assert "[precision] simulate = true simulates it" in refusal("CPU", "bf16")[1][0]
