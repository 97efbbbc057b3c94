"""Between diffusers' layers of FLUX.1 and those that were published, in which several of them are one."""

from collections.abc import Mapping

import numpy as np

from pipeline.errors import UserError
from pipeline.exchange.layers import BLOCKS, OUTSIDE, SWAPPED, Change, Layers, published_name, swapped


def fuse(changes: Mapping[str, Change], outputs: Mapping[str, int]) -> dict[str, Change]:
    """The changes of published layers, of those of diffusers' layers.

    outputs: of every linear layer of the transformer, also those that have no change: they are zeros of the fused one.
    A fused layer's down is that of its parts, one above the other, and its up is block-diagonal, so that
    nothing is lost; its rank is the sum of theirs.  Raises UserError for a layer that FLUX.1 does not have.
    """
    groups: Layers = {}
    for layer in changes:
        try:
            name, _, parts = published_name(layer)
        except KeyError:
            raise UserError(f"{layer}: FLUX.1 has no such layer") from None
        groups[name] = parts
    return {name: _fused(name, parts, changes, outputs) for name, parts in sorted(groups.items())}


def _fused(name: str, parts: tuple[str, ...], changes: Mapping[str, Change], outputs: Mapping[str, int]) -> Change:
    here = [part for part in parts if part in changes]
    down = np.concatenate([changes[part].down for part in here])
    up = np.zeros((sum(outputs[part] for part in parts), down.shape[0]), down.dtype)
    row = column = 0
    for part in parts:
        if part in changes:
            change = changes[part]
            up[row : row + outputs[part], column : column + change.rank] = change.up
            column += change.rank
        row += outputs[part]
    found = Change(down, up)
    return swapped(found) if name == SWAPPED else found


def split(changes: Mapping[str, Change], outputs: Mapping[str, int]) -> dict[str, Change]:
    """The inverse of `fuse`: what is all zeros is left out, and so are ranks that a part does not use.

    Raises UserError for a layer that FLUX.1 does not have, or one of another size.
    """
    names = _diffusers_names(outputs)
    found: dict[str, Change] = {}
    for name, change in changes.items():
        if name not in names:
            raise UserError(f"{name}: FLUX.1 has no such layer")
        parts, change = names[name], swapped(change) if name == SWAPPED else change
        sizes = [outputs[part] for part in parts]
        if change.up.shape[0] != sum(sizes):
            raise UserError(f"{name}: {change.up.shape[0]} outputs, but the model's has {sum(sizes)}")
        for part, up in zip(parts, np.split(change.up, np.cumsum(sizes)[:-1])):
            used = np.flatnonzero(up.any(axis=0))
            if len(used):
                found[part] = Change(np.ascontiguousarray(change.down[used]), np.ascontiguousarray(up[:, used]))
    return found


def _diffusers_names(outputs: Mapping[str, int]) -> Layers:
    """The published layers of a transformer, each with its parts; outputs: of diffusers' layers."""
    names: Layers = {name: parts for name, parts in OUTSIDE.items() if parts[0] in outputs}
    for kind, (published, table) in BLOCKS.items():
        numbers = {layer.split(".")[1] for layer in outputs if layer.startswith(f"{kind}.")}
        for number in numbers:
            for name, parts in table.items():
                names[f"{published}.{number}.{name}"] = tuple(f"{kind}.{number}.{part}" for part in parts)
    return names
