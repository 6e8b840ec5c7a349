"""Pure maths of DQN, SAC and TD3: targets and losses, functions of network outputs."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from worldmpc.types import TransitionBatch


def td_target(batch: TransitionBatch, value: Tensor) -> Tensor:
    """Return reward + discount (1 - terminated) value [B], with the value [B] of ``next_obs``."""
    return batch.reward + batch.discount * (1 - batch.terminated) * value


def greedy_value(q: Tensor, chooser: Tensor) -> Tensor:
    """Return the value of the action that another network finds best: [B, A], [B, A] -> [B].

    ``q`` from the target network and ``chooser`` from the online one is double DQN (van Hasselt et al. 2016, eq. 4), the same values
    twice are plain DQN (Mnih et al. 2015).
    """
    return q.gather(-1, chooser.argmax(-1, keepdim=True)).squeeze(-1)


def chosen(q: Tensor, action: Tensor) -> Tensor:
    """Return the values of one-hot actions: [..., B, A], [B, A] -> [..., B]."""
    return (q * action).sum(-1)


def huber_loss(q: Tensor, target: Tensor) -> Tensor:
    """Return the mean Huber loss: [B], [B] -> [] (Mnih et al. 2015, errors clipped at 1)."""
    return F.smooth_l1_loss(q, target)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Return half the squared error, mean over the batch and sum over critics: [Q, B], [B] -> [] (Haarnoja et al. 2018, eq. 5)."""
    return 0.5 * (q - target).square().mean(-1).sum()


def categorical_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of a categorical distribution in nats: [..., A] -> [...]."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def expected_value(q: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over a categorical policy of the smaller of the critics' values: [Q, B, A], [B, A] -> [B]."""
    return (logits.softmax(-1) * q.amin(0)).sum(-1)


def soft_value(value: Tensor, entropy: Tensor, alpha: Tensor) -> Tensor:
    """Return value plus weighted entropy: [B], [B], [] -> [] each (Haarnoja et al. 2018, eq. 3; Christodoulou 2019, eq. 10)."""
    return value + alpha * entropy


def temperature_loss(alpha: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """Return alpha times the policy's surplus of entropy: [], [B] -> [] (Haarnoja et al. 2018, eq. 18).

    Its gradient lowers alpha where the entropy is above the target.
    """
    return alpha * (entropy.detach().mean() - target_entropy)


def default_target_entropy(action_dim: int, discrete: bool) -> float:
    """Return -A for Box actions (Haarnoja et al. 2018), half of the largest possible entropy, log A, for Discrete ones."""
    return 0.5 * math.log(action_dim) if discrete else -float(action_dim)


def smoothed_action(action: Tensor, eps: Tensor, std: float, clip: float) -> Tensor:
    """Add clipped noise to a target policy's action: [B, A], [B, A] standard normal -> [B, A] in [-1, 1] (Fujimoto et al. 2018, eq. 14)."""
    return (action + (std * eps).clamp(-clip, clip)).clamp(-1.0, 1.0)


def exploration_epsilon(decisions: int, total: float, start: float, end: float) -> float:
    """Return the probability of a random action, which falls linearly from ``start`` to ``end`` within ``total`` decisions."""
    progress = min(decisions / total, 1.0) if total > 0 else 1.0
    return end + (start - end) * (1.0 - progress)
