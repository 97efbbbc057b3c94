"""Numbers in the dtype of a file."""

from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.flux.weights import NAMES

DTYPES = tuple(NAMES)


def in_dtype(path: Path, key: str, array: np.ndarray, dtype: str | np.dtype) -> np.ndarray:
    """C-contiguous, in "fp32", "fp16" or "bf16", or in NumPy's dtype.

    A number by itself, as alpha is, stays float32: a rank above 256 is not exact in bf16.
    Raises UserError, which names the file and the tensor, where a finite number becomes infinite.
    """
    if array.ndim == 0:
        return array
    target = NAMES[dtype] if isinstance(dtype, str) else dtype
    with np.errstate(over="ignore"):  # said below
        found = np.asarray(array, order="C").astype(target)
    if not np.isfinite(found.astype(np.float32)).all() and np.isfinite(array).all():
        raise UserError(f"{path}: {key} has numbers that {target.name} does not hold; choose another dtype")
    return found
