"""The best change of a lower rank: of a matrix, and of a product of two thin ones."""

import numpy as np

from pipeline.exchange.change import Change

OVERSAMPLED, POWER_STEPS = 16, 6
EXACT_UP_TO = 256
"""Matrices that are no larger than this in one direction get a full singular value decomposition."""


def of_matrix(matrix: np.ndarray, rank: int, seed: int = 0) -> Change:
    """The change of at most this rank that comes nearest to ``matrix``, (outputs, inputs), in the Frobenius norm.

    Large matrices: by a random projection with power iterations (arXiv:0909.4061, algorithms 4.4 and 5.1), at a cost of
    a few products with a thin matrix.  Both factors get the same norm.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(EXACT_UP_TO, rank + OVERSAMPLED):
        left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return _balanced(left, values, right, rank)
    basis = np.random.default_rng(seed).standard_normal((matrix.shape[1], rank + OVERSAMPLED)).astype(np.float32)
    basis = np.linalg.qr(matrix @ basis)[0]
    for _ in range(POWER_STEPS):
        basis = np.linalg.qr(matrix.T @ basis)[0]
        basis = np.linalg.qr(matrix @ basis)[0]
    left, values, right = np.linalg.svd((basis.T @ matrix).astype(np.float64), full_matrices=False)
    return _balanced(basis.astype(np.float64) @ left, values, right, rank)


def of_product(change: Change, rank: int) -> tuple[Change, float, float]:
    """The same of up @ down, which is never formed; and the squared norms of what is left out and of the whole."""
    up, of_up = np.linalg.qr(change.up.astype(np.float64))
    down, of_down = np.linalg.qr(change.down.astype(np.float64).T)
    left, values, right = np.linalg.svd(of_up @ of_down.T)
    squares = values**2
    total, rest = float(squares.sum()), float(squares[rank:].sum())
    if change.rank <= rank:
        return change, 0.0, total
    return _balanced(up @ left, values, right @ down.T, rank), rest, total


def _balanced(left: np.ndarray, values: np.ndarray, right: np.ndarray, rank: int) -> Change:
    root = np.sqrt(values[:rank])
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return Change(np.ascontiguousarray(down, np.float32), np.ascontiguousarray(up, np.float32))
