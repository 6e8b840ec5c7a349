"""Mean and scale of data as buffers, so that networks see and predict numbers near 1 whatever the units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONSTANT = 1e-6
"""A dimension whose standard deviation is at most this share of its mean's size does not vary: float32 resolves little more."""
TINY = 1e-12
"""The same, absolutely, where the mean is 0."""


class Normalizer(nn.Module):
    """Shifts and scales the last dimension; the identity until :meth:`fit`.

    A dimension that did not vary in the data carries no information and has scale 0: it normalises to 0 whatever its value, and is
    restored as the constant that it was. So nothing is ever divided by a standard deviation near 0.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def fit(self, data: Tensor) -> None:
        """Take mean and standard deviation over rows: [N, D]; computed in float64."""
        wide = data.double()
        mean, std = wide.mean(0), wide.std(0, correction=0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > (CONSTANT * mean.abs()).clamp(min=TINY), std, 0.0))

    @property
    def varies(self) -> Tensor:
        """[D] bool: which dimensions varied in the data."""
        return self.scale > 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise: [..., D] -> [..., D]."""
        return (x - self.mean) * torch.where(self.varies, self.scale.reciprocal(), 0.0)

    def restore(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`: [..., D] -> [..., D]."""
        return self.mean + self.scale * x
