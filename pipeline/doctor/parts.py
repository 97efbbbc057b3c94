"""What the doctor runs on the device, each part in a process of its own: one may be killed, or never end.

A part reports its findings, a line of JSON each, as it goes: what was found before a crash is not lost.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.devices import device
from pipeline.devices.device import COMPUTES
from pipeline.doctor import golden, kernels
from pipeline.doctor.finding import Finding, failed, ok, skipped
from pipeline.doctor.kernel_cases import CASES
from pipeline.doctor.kernels import TOLERANCE
from pipeline.errors import UserError
from pipeline.flux.pretrained import one_line
from pipeline.settings.fields import Train

NUM_TENSORS = 380
"""That a LoRA trains of FLUX.1-dev by default."""


def first_operation(target: str) -> Iterator[Finding]:
    """`device.use` touches no device: what is wrong with one appears at the first operation."""
    import mindspore as ms
    from mindspore import mint

    half, ones = ms.Tensor(np.full((64, 64), 0.5, np.float32)), ms.Tensor(np.eye(64, dtype=np.float32))
    if not (mint.matmul(half, ones).asnumpy() == 0.5).all():
        yield failed("first operation", "a matrix product with ones gives something else", "please send us this report")
        return
    peaks = device.peak_memory_bytes(target)
    yield ok("first operation", f"MindSpore {ms.__version__} on {target}; {max(peaks.values()) / 1e6:.0f} MB in use")


def all_kernels(target: str) -> Iterator[Finding]:
    """Each layer of the models, forward and backward, against NumPy."""
    for short, dtype in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        if short not in COMPUTES[target]:
            yield skipped(f"kernels, {short}", f"{target} does not compute it; it is simulated below")
            continue
        errors, limit = {}, TOLERANCE[dtype]
        for case in CASES:
            try:
                errors[case.name] = kernels.worst(case, dtype, "pynative")
            except Exception as error:  # whatever a driver, a compiler or a kernel raises is the finding
                todo = "please send us this report"
                yield failed(f"{case.name}, {short}", f"{type(error).__name__}: {one_line(error)[:200]}", todo)
                _forget_half_a_gradient()
        for name, (where, found) in errors.items():
            if found > limit:
                said = f"{where} is {found:.1e} from NumPy's, at most {limit:.0e}"
                yield failed(f"{name}, {short}", said, "please send us this report")
        right = [found for _, found in errors.values() if found <= limit]
        if right:
            said = f"{len(right)} of {len(CASES)} layers, gradients too: {max(right):.1e} from NumPy's at most"
            yield ok(f"kernels, {short}", said)


def _forget_half_a_gradient() -> None:
    """An operation that fails while a gradient is recorded would spoil the next one."""
    from mindspore.common.api import _pynative_executor

    _pynative_executor.clear_res()


def large_update(target: str) -> Iterator[Finding]:
    """One update of as many tensors as a LoRA of FLUX.1-dev trains, against AdamW's formula, twice."""
    rng = np.random.default_rng(0)
    shapes = [(8, 4), (4, 8)] * (NUM_TENSORS // 2)
    start, gradients = ([rng.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(2))
    found, again = _updated(start, gradients), _updated(start, gradients)
    wanted = _adamw(start, gradients)
    far = golden.distance(np.concatenate([a.ravel() for a in found]), np.concatenate([a.ravel() for a in wanted]))
    what = f"update of {NUM_TENSORS} tensors"
    if far > 1e-5:
        yield failed(what, f"{far:.1e} from AdamW's formula, at most 1e-05", "please send us this report")
    elif any((one != two).any() for one, two in zip(found, again)):
        yield failed(what, "twice the same, and two results", "please send us this report")
    else:
        yield ok(what, f"{far:.1e} from AdamW's formula; twice, equal to the last bit")


def _updated(start: list[np.ndarray], gradients: list[np.ndarray]) -> list[np.ndarray]:
    import mindspore as ms

    from pipeline.training.optimizer import Optimizer

    trained = [ms.Parameter(ms.Tensor(values), name=f"p{number}") for number, values in enumerate(start)]
    Optimizer(trained, Train(), [0] * len(trained)).update([ms.Tensor(each) for each in gradients], [1e-2])
    return [parameter.asnumpy() for parameter in trained]


def _adamw(start: list[np.ndarray], gradients: list[np.ndarray]) -> list[np.ndarray]:
    """Algorithm 2 of arXiv:1711.05101, its first step, behind the clipping of the global norm; float64."""
    settings, rate = Train(), 1e-2
    norm = np.sqrt(sum((each.astype(np.float64) ** 2).sum() for each in gradients))
    factor = min(1, settings.max_grad_norm / (norm + 1e-6))
    found = []
    for values, gradient in zip(start, gradients):
        step = gradient * factor / (np.abs(gradient * factor) + settings.adam_epsilon)
        found.append(values.astype(np.float64) * (1 - rate * settings.weight_decay) - rate * step)
    return found


def model(target: str, preset: str, mode: str = "pynative") -> Iterator[Finding]:
    """The embedded model through all stages, beside golden numbers."""
    label = preset if preset in COMPUTES[target] else f"{preset} simulated"
    label += ", compiled" if mode == "jit" else ""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        try:
            outputs, repeated = golden.run(Path(folder) / "model", preset, target, mode)
        except UserError as error:
            yield failed(f"model, {label}", one_line(error), "please send us this report")
            return
    for finding in [*golden.compared(outputs, golden.golden(), preset), *repeated]:
        yield dataclasses.replace(finding, what=f"{finding.what}, {label}")


Parts = dict[str, Callable[[str], Iterator[Finding]]]


def parts_of(target: str) -> Parts:
    """By name, in the order in which they run."""
    parts: Parts = {"first operation": first_operation, "kernels": all_kernels, "update": large_update}
    for preset in ("fp32", "fp16", "bf16"):
        parts[f"model {preset}"] = functools.partial(model, preset=preset)
    if target != "CPU":
        parts["model compiled"] = functools.partial(model, preset="bf16", mode="jit")
    return parts


def run(name: str, target: str, out: Path) -> None:
    """Run a part in this process; its findings go to the file ``out``."""
    with open(out, "a") as file:

        def report(finding: Finding) -> None:
            file.write(json.dumps(dataclasses.asdict(finding)) + "\n")
            file.flush()

        try:
            device.use(target)
            for finding in parts_of(target)[name](target):
                report(finding)
        except UserError as error:
            report(failed(name, one_line(error), "the lines above say what to look at first"))
        except Exception as error:  # some errors of the driver are bare Exceptions, RuntimeErrors, or KeyErrors
            report(failed(name, f"{type(error).__name__}: {one_line(error)[:300]}", "please send us this report"))
