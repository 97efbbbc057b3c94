"""What models were found to be, not what the policy asked for: dtypes of parameters and of outputs."""

import json
from collections import Counter
from collections.abc import Callable, Iterable

from cache import Entries
from pipeline.devices import simulation
from pipeline.devices.precision import LONG_NAMES, Policy
from pipeline.errors import UserError
from pipeline.plan.plan import Plan

SIMULATED = "bfloat16, simulated"
KEEPS_FP32 = {"text_encoder_2": "fp16"}
"""Of T5 in float16, mindone keeps the feed-forward's last projections, which overflow there, in float32."""


def parameters_by_dtype(parameters: Iterable, simulated: bool = False) -> dict[str, int]:
    """How many weights are kept in each dtype, such as {"float16": 4, ...}; whole numbers, such as seeds, are none."""
    counts = Counter()
    for parameter in parameters:
        counts[dtype_of(parameter, simulated)] += parameter.size
    return {dtype: count for dtype, count in counts.items() if "int" not in dtype}


def found_in(cell, output, policy: Policy) -> dict:
    """What the records say of a model: ``parameters`` by dtype, and the dtype of an ``output`` of it."""
    simulated = policy.simulated
    return {"parameters": parameters_by_dtype(cell.get_parameters(), simulated), "output": dtype_of(output, simulated)}


def dtype_of(output, simulated: bool = False) -> str:
    """The dtype of the first tensor of an output that may be nested in lists and dictionaries' values.

    simulated: where that is float32 with bfloat16's values alone, SIMULATED.
    """
    while not hasattr(output, "dtype"):
        several = output.values() if isinstance(output, dict) else output
        output = next(each for each in several if each is not None)
    dtype = str(output.dtype).lower()
    return SIMULATED if simulated and dtype == "float32" and simulation.is_rounded(output) else dtype


def check(component: str, policy: Policy, found: dict) -> None:
    """Raise UserError where a model is not what its policy says; say where it keeps a part of itself in float32."""
    names = LONG_NAMES | ({"bf16": SIMULATED} if policy.simulated else {})
    params, compute = names[policy.params], names[policy.compute]
    others = set(found["parameters"]) - {params}
    if KEEPS_FP32.get(component) == policy.params and others == {"float32"}:
        kept = found["parameters"]["float32"]
        print(f"{component}: {kept:,} parameters stay in float32, as their products overflow in {params}", flush=True)
        others = set()
    if others or found["output"] != compute:
        raise UserError(
            f"{component}: the policy asks for parameters in {params} and outputs in {compute}, found "
            f"{found['parameters']} and {found['output']}; this version of mindone does not do as it is told: "
            "choose another preset, and report it"
        )


def precision(plan: Plan, photos, frozen: dict, trained: dict, run: Callable) -> dict[str, dict]:
    """What is found of every component: see `found_in`.

    frozen: the models in this process that do not train, by name.  trained: by name, a cell whose output is looked at,
    and the parameters that train.  ``run()`` computes with all of them once, in PyNative.
    Of the encoders, which have left the device, it is what their stages' records say.
    Raises UserError where a model in this process is not what its policy says.
    """
    latents = plan.image_needs(photos)[0].entries
    stages = {"vae": (latents, "EncodeImages"), "text_encoder": (plan.pooled, "EncodeCLIP")}
    stages["text_encoder_2"] = plan.txt, "EncodeT5"
    table = {name: _recorded(*of) for name, of in stages.items() if name not in frozen}
    policies = {name: getattr(plan.precision, name) for name in frozen} | dict.fromkeys(trained, plan.precision.trained)
    kept = {name: [each for each in cell.get_parameters() if not each.requires_grad] for name, cell in frozen.items()}
    kept |= {name: parameters for name, (_, parameters) in trained.items()}
    outputs = _outputs(frozen | {name: cell for name, (cell, _) in trained.items()}, policies, run)
    for name, policy in policies.items():
        simulated = policy.simulated and name in frozen  # what trains is kept in float32 in any case
        table[name] = {"parameters": parameters_by_dtype(kept[name], simulated), "output": outputs[name]}
        check(name, policy, table[name])
    return table


def _recorded(entries: Entries, stage: str) -> dict | None:
    """What the stage that encoded the entries found; None where nobody has left a record of it here."""
    try:
        return json.loads((entries.path / "records" / f"{stage}.json").read_text())["outcome"]["precision"]
    except (OSError, ValueError, KeyError):
        return None


def _outputs(cells: dict, policies: dict[str, Policy], run: Callable) -> dict[str, str]:
    """The dtype of each cell's output, observed while ``run`` computes."""
    found: dict[str, str] = {}

    def observer(name):
        def observe(cell, inputs, output):
            found[name] = dtype_of(output, policies[name].simulated)

        return observe

    handles = [cell.register_forward_hook(observer(name)) for name, cell in cells.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
