"""The guard: what is frozen has the same bytes after a training as before, or the training has failed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.flux.weights import name_in_file


def frozen_digests(cells: dict) -> dict[str, str]:
    """A digest of the bytes of every parameter that does not train, by its model's name and its own."""
    return {
        f"{prefix}.{parameter.name}": hashlib.blake2b(_bytes_of(parameter.asnumpy()), digest_size=16).hexdigest()
        for prefix, cell in cells.items()
        for parameter in cell.get_parameters()
        if not parameter.requires_grad
    }


def _bytes_of(array: np.ndarray) -> memoryview:
    """The array's bytes, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_frozen(cells: dict, before: dict[str, str], trained: Iterable = ()) -> None:
    """Raise UserError that names every parameter whose bytes differ from ``before``, but for those that are trained."""
    after = {name.replace(".base_layer.", "."): value for name, value in frozen_digests(cells).items()}
    own = {id(parameter) for parameter in trained}
    after |= {
        name: before[name]
        for prefix, cell in cells.items()
        for parameter in cell.get_parameters()
        if id(parameter) in own and (name := f"{prefix}.{parameter.name}") in before
    }
    changed = sorted(name for name in before if after.get(name) != before[name])
    if changed:
        raise UserError(f"training changed frozen weights, so its result is refused: {', '.join(changed[:10])}")


def check_finite(folder: Path, cells: dict) -> None:
    """Raise UserError that names a weight, of the models in ``folder``, that is infinite or not a number."""
    for component, cell in cells.items():
        for parameter in cell.get_parameters():
            if not parameter.requires_grad and not np.isfinite(parameter.asnumpy().astype(np.float32)).all():
                name = name_in_file(parameter.name.replace(".base_layer.", "."))
                raise UserError(
                    f"{folder / component}: {name} has numbers that are not finite, which no training can mend; fetch "
                    "the model again, or choose another precision for it"
                )
