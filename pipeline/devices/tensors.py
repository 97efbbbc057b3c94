"""Between arrays of the host and tensors of the device, in the dtypes that a policy names."""

import numpy as np

from pipeline.devices import simulation
from pipeline.devices.precision import Policy


def as_input(tensor, policy: Policy):
    """A float32 tensor as a model under the policy takes it."""
    if policy.simulated:
        return simulation.rounding()(tensor)
    dtype = mindspore_dtype(policy.compute)
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)  # to its own dtype it takes 0.2 ms on CPU


def mindspore_dtype(name: str):
    import mindspore as ms

    return {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}[name]


def to_storage(tensor, dtype: str) -> np.ndarray:
    """A device tensor as a host array of the storage ``dtype``; bfloat16 as ml_dtypes has it."""
    import mindspore as ms
    import ml_dtypes

    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if tensor.dtype == ms.bfloat16:  # every bfloat16 is a float32, so nothing is rounded on the way
        tensor = tensor.astype(ms.float32)
    return tensor.asnumpy().astype(target)
