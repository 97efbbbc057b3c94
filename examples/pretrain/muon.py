"""Muon (kellerjordan.github.io/posts/muon) in float32: PyTorch's own computes in bfloat16, slow on many CPUs."""

from collections import defaultdict

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made orthogonal; of the size that AdamW's updates have, so one rate fits both."""

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._step(matrices, group)

    def _step(self, matrices: list[torch.Tensor], group: dict) -> None:
        updates = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices])
        size = 0.2 * max(updates.shape[1:]) ** 0.5
        for matrix, update in zip(matrices, orthogonal(updates)):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * size)

    def _momentum(self, matrix: torch.Tensor, momentum: float) -> torch.Tensor:
        """Nesterov's."""
        state = self.state[matrix]
        buffer = state.setdefault("momentum", torch.zeros_like(matrix))
        buffer.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(buffer, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrices, by Newton and Schulz's iteration.  matrices: (count, rows, columns)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
