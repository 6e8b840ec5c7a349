"""Policy and value that learn from what a planner did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmpc.models.actor_critic import Categorical, Distribution, Gaussian
from worldmpc.models.nets import MLP
from worldmpc.models.normalizer import Normalizer

LOG_STD_MIN, LOG_STD_MAX = -3.0, 0.0
"""Bounds of the log standard deviation of Box actions: proposals neither collapse nor fill the whole space."""


class BehaviourPolicy(nn.Module):
    """A policy to imitate with: Gaussian around a bounded mean, or categorical over one-hot actions.

    Args:
        normalizer: of observations; shared with its owner.
        obs_dim: observation dimensions.
        action_dim: action dimensions, or choices.
        hidden: widths of the hidden layers.
        discrete: actions are choices.
    """

    def __init__(self, normalizer: Normalizer, obs_dim: int, action_dim: int, hidden: Sequence[int], discrete: bool) -> None:
        super().__init__()
        self.normalizer, self.discrete = normalizer, discrete
        self.net = MLP(obs_dim, list(hidden), action_dim if discrete else 2 * action_dim)
        if discrete:
            self.probs = self._probs

    def distribution(self, obs: Tensor) -> Distribution:
        """[..., O] -> distribution over actions [..., A]."""
        raw = self.net(self.normalizer(obs))
        if self.discrete:
            return Categorical(F.log_softmax(raw, -1))
        mean, log_std = raw.chunk(2, -1)
        return Gaussian(torch.tanh(mean), LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * torch.sigmoid(log_std))

    def sample(self, obs: Tensor, eps: Tensor) -> Tensor:
        """Sample with standard normal noise, in [-1, 1] or one-hot: [..., O], [..., A] -> [..., A]."""
        action = self.distribution(obs).sample(eps)
        return action if self.discrete else action.clamp(-1, 1)

    def _probs(self, obs: Tensor) -> Tensor:
        """Probabilities of one-hot actions: [..., O] -> [..., A]."""
        return torch.softmax(self.net(self.normalizer(obs)), -1)


class BehaviourValue(nn.Module):
    """Expected return of what the planner does, within what rewards that were seen can add up to.

    A planner goes where it has never been if a value says so, and a network says anything there. The norms of its layers keep it from
    growing linearly with the distance to the data (Ball et al. 2023), and the bounds from promising what cannot be.

    Args:
        normalizer: of observations; shared with its owner.
        obs_dim: observation dimensions.
        hidden: widths of the hidden layers.
        discount: per decision.
    """

    low: Tensor
    high: Tensor

    def __init__(self, normalizer: Normalizer, obs_dim: int, hidden: Sequence[int], discount: float) -> None:
        super().__init__()
        self.normalizer, self.scale = normalizer, 1 / (1 - discount)
        self.net = MLP(obs_dim, list(hidden), 1)
        self.register_buffer("low", torch.tensor(-torch.inf))
        self.register_buffer("high", torch.tensor(torch.inf))

    @torch.no_grad()
    def bound(self, reward: Tensor) -> None:
        """Take the bounds from all rewards [N]: the least and the largest for ever, or nothing more at all after a termination."""
        self.low.copy_(reward.amin().clamp(max=0) * self.scale)
        self.high.copy_(reward.amax().clamp(min=0) * self.scale)

    def unbounded(self, obs: Tensor) -> Tensor:
        """Return the network's own answer, for learning: [..., O] -> [...]."""
        return self.scale * self.net(self.normalizer(obs)).squeeze(-1)

    def forward(self, obs: Tensor) -> Tensor:
        """[..., O] -> [...]."""
        return self.unbounded(obs).clamp(self.low, self.high)
