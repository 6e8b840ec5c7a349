"""The squashed Gaussian policy, a stateless function of a network's output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldmpc.types import PolicySample


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
