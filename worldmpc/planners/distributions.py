"""What candidates are sampled from, for both kinds of actions: a Gaussian per step and action dimension, or a categorical per step.

Both are made from standard-normal noise of the same shape, and both are refitted by the same weighted mean of elites.
Shapes: parameters [H, E, A], elites and samples [H, E, n, A], weights [1, E, n, 1]; all but ``refit`` take any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldmpc.models.heads import one_hot_argmax
from worldmpc.noise import gumbel


class Gaussian:
    """Box actions in [-1, 1]: clamped normal samples.

    Args:
        min_std: lower bound of the standard deviation.
        max_std: its initial value and upper bound.
    """

    rest = 0.0
    """Mean of a step that nothing is known about."""

    def __init__(self, min_std: float, max_std: float) -> None:
        self.min_std, self.max_std = min_std, max_std

    def start(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [H, E, A] of the first iteration, from the warm start's mean."""
        return mean, torch.full_like(mean, self.max_std)

    def sample(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """[..., A] each -> actions [..., A]."""
        return (mean + std * eps).clamp(-1, 1)

    def uniform(self, eps: Tensor) -> Tensor:
        """Uniform actions 2 Phi(eps) - 1: [..., A] -> [..., A]."""
        return torch.erf(eps * math.sqrt(0.5))

    def refit(self, elites: Tensor, weight: Tensor, mean: Tensor, std: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
        """Return mean and std [H, E, A] of weighted elites; ``momentum`` is the share of the former ones that stays."""
        center = (weight * elites).sum(2)
        spread = (weight * (elites - center[:, :, None]).square()).sum(2).sqrt().clamp(self.min_std, self.max_std)
        return (center.lerp(mean, momentum), spread.lerp(std, momentum)) if momentum else (center, spread)

    def mode(self, mean: Tensor) -> Tensor:
        """Most likely actions: [..., A] -> [..., A]."""
        return mean.clamp(-1, 1)

    def disturb(self, action: Tensor, eps: Tensor, amount: float) -> Tensor:
        """Add noise of standard deviation ``amount``: [..., A] each -> [..., A]."""
        return (action + amount * eps).clamp(-1, 1)

    def explore(self, action: Tensor, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """Exploring action [E, A]: the chosen one with noise of the plan's standard deviation."""
        return (action + std * eps).clamp(-1, 1)


class Categorical:
    """One-hot actions: the mean holds the probabilities of a step's choices.

    Args:
        choices: number of actions, A.
        uniform_mix: share of the uniform distribution in what is sampled from, so that no choice is ever ruled out.
    """

    def __init__(self, choices: int, uniform_mix: float) -> None:
        self.rest, self.uniform_mix = 1.0 / choices, uniform_mix

    def start(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and their std [H, E, A] of the first iteration: the warm start's, mixed half-half with uniform."""
        probs = 0.5 * mean + 0.5 * self.rest
        return probs, self._std(probs)

    def sample(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """[..., A] each -> one-hot actions [..., A], where every choice keeps at least its part of ``uniform_mix``."""
        return self.disturb(mean, eps, self.uniform_mix)

    def uniform(self, eps: Tensor) -> Tensor:
        """Uniform choices: [..., A] -> one-hot [..., A]."""
        return one_hot_argmax(eps)

    def refit(self, elites: Tensor, weight: Tensor, mean: Tensor, std: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
        """Return probabilities and their std [H, E, A] of weighted elites; ``momentum`` is the share of the former ones that stays."""
        probs = (weight * elites).sum(2)
        if momentum:
            probs = probs.lerp(mean, momentum)
        return probs, self._std(probs)

    def mode(self, mean: Tensor) -> Tensor:
        """Most likely choices: [..., A] -> one-hot [..., A]."""
        return one_hot_argmax(mean)

    def disturb(self, action: Tensor, eps: Tensor, amount: float) -> Tensor:
        """Sample choices from probabilities, one-hot ones included, mixed with ``amount`` of uniform: [..., A] each -> one-hot [..., A]."""
        probs = (1 - amount) * action + amount * self.rest
        return one_hot_argmax(probs.log() + gumbel(eps))

    def explore(self, action: Tensor, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """Exploring action [E, A]: a choice by the refined probabilities."""
        return self.sample(mean, std, eps)

    @staticmethod
    def _std(probs: Tensor) -> Tensor:
        return (probs * (1 - probs)).clamp_min(0).sqrt()  # rounding may carry a probability beyond 1
