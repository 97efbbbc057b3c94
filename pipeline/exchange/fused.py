"""Between diffusers' layers of FLUX.1 and those that were published, in which several of them are one."""

from collections.abc import Mapping

import numpy as np

from pipeline.errors import UserError
from pipeline.exchange.change import Change
from pipeline.flux import published
from pipeline.flux.published import SWAPPED, Layers, published_name, swapped


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
    return Change(down, swapped(up) if name == SWAPPED else up)


def split(changes: Mapping[str, Change], outputs: Mapping[str, int]) -> dict[str, Change]:
    """The inverse of `fuse`: what is all zeros is left out, and so are ranks that a part does not use.

    Raises UserError for a layer that FLUX.1 does not have, or one of another size.
    """
    names = published.names(outputs)
    found: dict[str, Change] = {}
    for name, change in changes.items():
        if name not in names:
            raise UserError(f"{name}: FLUX.1 has no such layer")
        parts, ups = names[name], swapped(change.up) if name == SWAPPED else change.up
        sizes = [outputs[part] for part in parts]
        if len(ups) != sum(sizes):
            raise UserError(f"{name}: {len(ups)} outputs, but the model's has {sum(sizes)}")
        for part, up in zip(parts, np.split(ups, np.cumsum(sizes)[:-1])):
            used = np.flatnonzero(up.any(axis=0))
            if len(used):
                found[part] = Change(np.ascontiguousarray(change.down[used]), np.ascontiguousarray(up[:, used]))
    return found
