"""Output heads: two-hot scalars and the squashed Gaussian policy. Stateless functions of network outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from worldmpc.types import PolicySample


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|) (Hafner et al. 2023)."""
    return x.sign() * torch.log(1 + x.abs())


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp|x| - 1), the inverse of :func:`symlog`."""
    return x.sign() * (torch.exp(x.abs()) - 1)


class TwoHot(nn.Module):
    """Scalars as categorical distributions over ``num_bins`` bins, evenly spaced in symlog space (TD-MPC2 section 3)."""

    bins: Tensor

    def __init__(self, num_bins: int = 101, vmin: float = -10.0, vmax: float = 10.0) -> None:
        super().__init__()
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax
        self.width = (vmax - vmin) / (num_bins - 1)
        self.register_buffer("bins", torch.linspace(vmin, vmax, num_bins), persistent=False)

    def position(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower bin [...] int64 and the weight of the upper neighbour [...], for scalars [...]."""
        place = (symlog(x).clamp(self.vmin, self.vmax) - self.vmin) / self.width
        # NaN keeps a valid bin, because an index out of range would end the process on a GPU; the weight stays NaN.
        lower = place.nan_to_num().floor().clamp(max=self.num_bins - 2)
        return lower.long(), place - lower

    def encode(self, x: Tensor) -> Tensor:
        """Two-hot distribution: [...] -> [..., K]."""
        lower, weight = self.position(x)
        target = torch.zeros(*x.shape, self.num_bins, dtype=x.dtype, device=x.device)
        target.scatter_(-1, lower[..., None], (1 - weight)[..., None])
        return target.scatter_(-1, lower[..., None] + 1, weight[..., None])

    def decode(self, logits: Tensor) -> Tensor:
        """symexp of the expected bin: [..., K] -> [...]."""
        return symexp((logits.softmax(-1) * self.bins).sum(-1))  # no matrix product, which autocast would round

    def loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy of logits [..., K] against the two-hot distribution of scalars [...] -> [...]."""
        lower, weight = self.position(x)
        pair = torch.stack((lower, lower + 1), -1).expand(*logits.shape[:-1], 2)
        low, high = logits.log_softmax(-1).gather(-1, pair).unbind(-1)
        return -torch.lerp(low, high, weight)


def squashed_gaussian(raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float) -> PolicySample:
    """Sample tanh(mean + eps std) from the policy network's output.

    ``scaled_entropy`` follows the published code, where the squash correction cancels: it equals ``-A`` times the
    log-density before squashing.

    Args:
        raw: [..., 2 A] mean, then unbounded log standard deviation.
        eps: [..., A] standard normal noise.
        log_std_min: lower bound of the log standard deviation.
        log_std_max: upper bound of the log standard deviation.
    """
    mean, log_std = split_gaussian(raw, log_std_min, log_std_max)
    gaussian = (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    action = torch.tanh(mean + eps * log_std.exp())
    log_prob = gaussian - torch.log(torch.relu(1 - action.square()) + 1e-6).sum(-1)
    scaled = -log_prob * (gaussian * eps.shape[-1] / (log_prob + 1e-8))
    return PolicySample(action, torch.tanh(mean), log_std, log_prob, -log_prob, scaled)


def split_gaussian(raw: Tensor, log_std_min: float, log_std_max: float) -> tuple[Tensor, Tensor]:
    """Return mean [..., A] and bounded log standard deviation [..., A] from [..., 2 A]."""
    mean, log_std = raw.chunk(2, dim=-1)
    return mean, log_std_min + 0.5 * (log_std_max - log_std_min) * (torch.tanh(log_std) + 1)
