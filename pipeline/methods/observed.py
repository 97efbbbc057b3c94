"""The measured precision of every model behind a training or a picture."""

from collections.abc import Callable
from typing import Any

from cache import Entries, load_json
from pipeline.devices import dtypes
from pipeline.plan.method import Trainee
from pipeline.plan.needs import IMAGES
from pipeline.plan.plan import Plan


def precision(plan: Plan, trainee: Trainee, run: Callable[[], object]) -> dict[str, dict]:
    """What is found of every component: see `dtypes.found_in`.

    ``run()`` computes with all models in this process once, in PyNative.  Of the encoders, which have left the device,
    it is what their stages' records say.  Raises UserError where a model in this process is not what its policy says.
    """
    frozen, family = trainee.frozen, plan.family
    made = {family.image_encoder: (plan.image_needs[0].entries, IMAGES)}
    made |= {each.component: (plan.entries_of(each.kind), each.stage) for each in family.caption_encoders.values()}
    table: dict[str, Any] = {name: _recorded(*by) for name, by in made.items() if name not in frozen}
    cells, policies = dict(frozen), {name: plan.policy(name) for name in frozen}
    kept = {name: [each for each in cell.get_parameters() if not each.requires_grad] for name, cell in frozen.items()}
    if trainee.layer:
        name, cells[name] = trainee.layer[0], trainee.layer[1]
        policies[name], kept[name] = plan.precision.trained, trainee.trained
    outputs = dtypes.outputs_of(cells, policies, run)
    for name, policy in policies.items():
        simulated = policy.simulated and name in frozen  # what trains is kept in float32 in any case
        table[name] = {"parameters": dtypes.parameters_by_dtype(kept[name], simulated), "output": outputs[name]}
        dtypes.check(name, policy, table[name], family.keeps_fp32(name))
    return table


def _recorded(entries: Entries, stage: str) -> dict | None:
    """What the stage that encoded the entries found; None where nobody has left a record of it here."""
    try:
        return load_json((entries.path / "records" / f"{stage}.json").read_bytes())["outcome"]["precision"]
    except (OSError, ValueError, KeyError):
        return None
