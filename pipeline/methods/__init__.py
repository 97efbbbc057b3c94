"""What can be trained: each method is a class that `pipeline.plan.method` describes, and a line here.

An installed package may bring more: entry points of the group ``pipeline.methods``, each a `Method` object.
"""

from importlib.metadata import entry_points

from pipeline.methods.controlnet import ControlNet
from pipeline.methods.lora import LoRA
from pipeline.plan.method import Method
from pipeline.settings.experiment import Experiment

LORA, CONTROLNET = LoRA(), ControlNet()
METHODS: dict[str, Method] = {method.name: method for method in (LORA, CONTROLNET)}
for _point in entry_points(group="pipeline.methods"):
    _method = _point.load()
    if _method.reads_conditions:
        raise ImportError(f"{_point.value}: a method of another package cannot read conditions yet")
    METHODS[_method.name] = _method


def method_of(experiment: Experiment) -> Method:
    """What an experiment file is about, where nobody says it: a method whose table it has, else a LoRA."""
    others = [method for name, method in METHODS.items() if name in experiment.tables and method != LORA]
    return others[0] if others else LORA
