"""The dtypes that models really have: of parameters and outputs, measured instead of taken from the policy."""

from collections import Counter
from collections.abc import Callable, Iterable

from pipeline.devices import fp32, simulation
from pipeline.devices.precision import LONG_NAMES, Policy
from pipeline.errors import UserError
from pipeline.process.progress import say

SIMULATED = "bfloat16, simulated"


def parameters_by_dtype(parameters: Iterable, simulated: bool = False) -> dict[str, int]:
    """How many weights are kept in each dtype, such as {"float16": 4, ...}; whole numbers, such as seeds, are none."""
    counts: Counter[str] = Counter()
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


def check(component: str, policy: Policy, found: dict, keeps_fp32: str = "") -> None:
    """Raise UserError where a model is not what its policy says.

    keeps_fp32: the dtype in which this component keeps some parameters in float32, which is said, not refused.
    """
    names = LONG_NAMES | ({"bf16": SIMULATED} if policy.simulated else {})
    params, compute = names[policy.params], names[policy.compute]
    others = set(found["parameters"]) - {params}
    if keeps_fp32 == policy.params and others == {"float32"}:
        kept = found["parameters"]["float32"]
        say(f"{component}: {kept:,} parameters stay in float32, as their products overflow in {params}")
        others = set()
    if others or found["output"] != compute:
        raise UserError(
            f"{component}: the policy asks for parameters in {params} and outputs in {compute}, found "
            f"{found['parameters']} and {found['output']}; this version of mindone does not do as it is told: "
            "choose another preset, and report it"
        )
    if policy.compute_on_device == "fp32" and (rounding := fp32.rounding_operations()):
        raise UserError(
            f"{component}: the policy asks for float32, but this device rounds the inputs of {', '.join(rounding)} to "
            "fewer bits: choose another preset, and report it"
        )


def outputs_of(cells: dict, policies: dict[str, Policy], run: Callable) -> dict[str, str]:
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
