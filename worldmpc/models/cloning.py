"""Policies cloned from what somebody did: categorical over bins of every action, so that they may have several modes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.nets import MLP, init_weights
from worldmpc.noise import derive_seed

DECOY = "decoy"
"""What a saved clone of observations calls itself."""
BINS = 15
"""Bins of each Box action over [-1, 1]; an odd number, so that 0 has one."""


class Clone(nn.Module):
    """A stochastic policy: of Box actions a categorical over bins for each dimension, of Discrete ones a categorical over choices.

    A Gaussian can say neither that an action is at its bound, which bots' actions are most of the time, nor that it is one of two.

    Args:
        in_dim: what it reads: latent or observation dimensions.
        action_dim: A, action dimensions or choices.
        hidden: widths of the hidden layers.
        discrete: actions are choices.
        bins: K, of each Box action.
        seed: of the initial weights.
    """

    centres: Tensor

    def __init__(
        self, in_dim: int, action_dim: int, hidden: Sequence[int], *, discrete: bool = False, bins: int = BINS, seed: int = 1
    ) -> None:
        super().__init__()
        self.obs_shape, self.action_dim, self.discrete, self.bins = (in_dim,), action_dim, discrete, bins
        self.hidden = tuple(hidden)
        self.net = MLP(in_dim, list(hidden), action_dim if discrete else action_dim * bins)
        init_weights(self.net, torch.Generator().manual_seed(derive_seed(seed, "clone")))
        self.register_buffer("centres", torch.linspace(-1, 1, bins), persistent=False)

    def logits(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., A, K] of Box actions, [..., A] of Discrete ones."""
        raw = self.net(x)
        return raw if self.discrete else raw.unflatten(-1, (self.action_dim, self.bins))

    def log_prob(self, x: Tensor, action: Tensor) -> Tensor:
        """Log-probability of choices, or log-density of Box actions, constant within a bin: [..., I], [..., A] -> [...]."""
        log_probs = torch.log_softmax(self.logits(x), -1)
        if self.discrete:
            return (log_probs * action).sum(-1)
        chosen = log_probs.gather(-1, self.nearest(action)[..., None])[..., 0]
        return chosen.sum(-1) - self.action_dim * math.log(2 / self.bins)

    def nearest(self, action: Tensor) -> Tensor:
        """Bins that Box actions lie in: [..., A] -> [..., A] int64; all bins are of the same width, 2 / K."""
        return ((action.clamp(-1, 1) + 1) / 2 * self.bins).long().clamp(max=self.bins - 1)

    def mean(self, x: Tensor) -> Tensor:
        """Expected Box action, or the most likely choice: [..., I] -> [..., A]."""
        logits = self.logits(x)
        return one_hot_argmax(logits) if self.discrete else torch.softmax(logits, -1) @ self.centres

    def sample(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Sample with uniform numbers in [0, 1): [..., I], [..., A] (of choices the first entry is read) -> [..., A].

        A Box action is the centre of a bin, where the outermost ones are the bounds.
        """
        probs = torch.softmax(self.logits(x), -1)
        if self.discrete:
            chosen = (probs.cumsum(-1) < uniform[..., :1]).sum(-1).clamp(max=self.action_dim - 1)
            return nn.functional.one_hot(chosen, self.action_dim).to(probs.dtype)
        chosen = (probs.cumsum(-1) < uniform[..., None]).sum(-1).clamp(max=self.bins - 1)
        return self.centres[chosen]


def decoy_meta(clone: Clone) -> dict[str, Any]:
    """Return what a saved clone of observations says about itself."""
    return {
        "kind": DECOY,
        "architecture": {
            "in_dim": clone.obs_shape[0],
            "action_dim": clone.action_dim,
            "hidden": list(clone.hidden),
            "discrete": clone.discrete,
            "bins": clone.bins,
        },
    }


def build_decoy(architecture: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Clone:
    """Return the clone that :func:`decoy_meta` describes, with its parameters."""
    clone = Clone(**architecture)
    clone.load_state_dict(dict(parameters))
    return clone.requires_grad_(False)
