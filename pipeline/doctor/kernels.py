"""The cases of `kernel_cases`, and their gradients, run on this device and compared with NumPy."""

import functools

import numpy as np

from pipeline.doctor.kernel_cases import NUMPY

TOLERANCE = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6.4e-2}
"""Of the largest value: about 200 roundings to 24 bits, 16 to 11 or 8; reductions and a few operations in a row."""


def parameters(case, dtype):
    """A built case's parameters by their short names, filled with values that ``dtype`` holds exactly."""
    import mindspore as ms

    target = case.build()
    if not isinstance(target, ms.nn.Cell):
        return target, {}, {}
    generator = np.random.default_rng(7)
    found, values = {}, {}
    for name, parameter in target.parameters_and_names():
        name = name.removeprefix("inner.")
        value = 0.5 * generator.standard_normal(parameter.shape) + ("norm" in name)
        parameter.set_dtype(getattr(ms, dtype))
        parameter.set_data(_tensor(value, dtype))
        found[name], values[name] = parameter, value.astype(NUMPY[dtype]).astype(np.float64)
    return target, found, values


def outputs_and_gradients(case, dtype, mode):
    """Results, and gradients by inputs, then parameters, of the sum of the results weighted by `weights`."""
    import mindspore as ms

    target, found, _ = parameters(case, dtype)
    inputs = [_tensor(array, dtype) for array in case.arrays(dtype)]
    wanted = [ms.Tensor(array.astype(np.float32)) for array in weights(case, dtype)]

    def weighted_sum(*inputs):
        outputs = target(*inputs)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        total = 0.0
        for output, weight in zip(outputs, wanted):
            total = total + (output.astype(ms.float32) * weight).sum()
        return total, outputs

    differentiate = ms.value_and_grad(
        weighted_sum, tuple(range(len(inputs))), list(found.values()) or None, has_aux=True
    )
    if mode == "jit":
        differentiate = ms.jit(differentiate)
    (_, outputs), gradients = differentiate(*inputs)
    by_input, by_parameter = gradients if found else (gradients, ())
    return list(outputs), [*_as_tuple(by_input), *_as_tuple(by_parameter)]


def _tensor(array: np.ndarray, dtype: str):
    """Values that ``dtype`` holds exactly or is to round, as a tensor of it."""
    import mindspore as ms

    return ms.Tensor(array.astype(NUMPY[dtype]).astype(np.float32)).astype(getattr(ms, dtype))


def _as_tuple(value):
    return value if isinstance(value, (tuple, list)) else (value,)


@functools.cache
def expected(case, dtype):
    """Results in float64, and their central differences along every input and parameter."""
    _, _, values = parameters(case, dtype)
    arrays = case.arrays(dtype)

    def results():
        return _as_tuple(case.reference(*arrays, **values))

    outputs = [np.array(result, np.float64) for result in results()]
    wanted = _weights([output.shape for output in outputs])
    gradients = []
    for array in (*arrays, *values.values()):
        gradient = np.zeros_like(array)
        step = 1e-6 * max(np.abs(array).max(), 1e-3)
        for index in np.ndindex(array.shape):
            at, slope = array[index], 0.0
            for sign in (1, -1):
                array[index] = at + sign * step
                slope += sign * sum((w * result).sum() for w, result in zip(wanted, results()))
            array[index] = at
            gradient[index] = slope / (2 * step)
        gradients.append(gradient)
    return outputs, gradients


def weights(case, dtype):
    return _weights([output.shape for output in expected(case, dtype)[0]])


def _weights(shapes):
    generator = np.random.default_rng(3)
    return [generator.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in shapes]


def error(actual, expected: np.ndarray) -> float:
    """The largest difference, over the largest value that is expected; infinite where shapes differ."""
    import mindspore as ms

    if actual.shape != expected.shape:
        return float("inf")
    difference = np.abs(actual.astype(ms.float32).asnumpy().astype(np.float64) - expected).max()
    return float(difference / max(np.abs(expected).max(), 1e-2)) if np.isfinite(difference) else float("inf")


def worst(case, dtype: str, mode: str) -> tuple[str, float]:
    """Which result or gradient of a case is farthest from NumPy's, and how far."""
    outputs, gradients = outputs_and_gradients(case, dtype, mode)
    wanted_outputs, wanted_gradients = expected(case, dtype)
    errors = {f"result {number}": error(*pair) for number, pair in enumerate(zip(outputs, wanted_outputs, strict=True))}
    pairs = enumerate(zip(gradients, wanted_gradients, strict=True))
    errors |= {f"gradient {number}": error(*pair) for number, pair in pairs}
    name = max(errors, key=lambda each: errors[each])
    return name, errors[name]
