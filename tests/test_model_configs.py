"""What is asked of models' configs; those of the published models and of the embedded one are right."""

import json

import pytest

from pipeline.flux import model_configs, pretrained
from pipeline.settings.experiment import EMBEDDED
from pipeline.settings.schema import adapter

FLUX_DEV = pretrained.PUBLISHED_CONFIGS / "FLUX.1-dev"


def numbers_of_configs():
    """Every number, or list of numbers, that a config says of a model, by component."""
    for component, (_, cls) in model_configs.CONFIGS.items():
        for name, field in adapter(cls).json_schema()["properties"].items():
            each = field.get("anyOf", [field])[0]
            if each["type"] in ("integer", "number", "array"):
                yield component, name, each["type"]


@pytest.mark.parametrize("component, name, kind", [*numbers_of_configs()])
def test_a_number_of_a_config_that_no_model_can_have_is_said_by_its_name(component, name, kind):
    wrong: list = [True, "32", {}, -1e9, 1e9, 1e300, float("nan"), [1.5], [-1], [10**9], ["a"]]
    wrong += [2.5] if kind == "integer" else []
    wrong += [[]] if kind != "array" or name == "block_out_channels" else []
    folder = FLUX_DEV if component in pretrained.WEIGHTS else EMBEDDED
    path = folder / component / pretrained.CONFIG_NAMES.get(component, "config.json")
    whole = {"num_layers": 1, "num_single_layers": 1} if component == "controlnet" else json.loads(path.read_text())
    assert model_configs.problems(component, whole) == []
    for value in wrong:
        assert any(line.startswith(name) for line in model_configs.problems(component, whole | {name: value})), value
