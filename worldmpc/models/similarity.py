"""How near a latent is to a goal, which is a latent itself: the reward of those who follow goals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Similarity = Callable[[Tensor, Tensor], Tensor]
"""``(latent [..., Z], goal [..., Z]) -> [...]``."""


def in_groups(z: Tensor, dim: int, strided: bool) -> Tensor:
    """Entries of SimNorm's groups of ``dim`` beside each other: [..., Z] -> [..., Z / dim, dim]."""
    return z.unflatten(-1, (dim, -1)).transpose(-1, -2) if strided else z.unflatten(-1, (-1, dim))


def cosine_max(z: Tensor, goal: Tensor) -> Tensor:
    """<z, goal> / max(|z|, |goal|)^2, cosine times ratio of lengths, 1 where they are equal: [..., Z], [..., Z] -> [...].

    Hafner et al. 2022, "Deep Hierarchical Planning from Pixels", eq. 7.
    """
    longer = torch.maximum(z.square().sum(-1), goal.square().sum(-1))
    return (z * goal).sum(-1) / longer.clamp(min=1e-12)


def make_similarity(kind: str, dim: int, strided: bool) -> Similarity:
    """Return a similarity of latents whose groups have ``dim`` entries.

    ``groupwise``: mean of :func:`cosine_max` over the groups, which are distributions: in [0, 1]. ``cosine``: that of the whole latent.
    ``l2``: minus the distance.
    """
    kinds: dict[str, Similarity] = {
        "groupwise": lambda z, goal: cosine_max(in_groups(z, dim, strided), in_groups(goal, dim, strided)).mean(-1),
        "cosine": cosine_max,
        "l2": lambda z, goal: -(z - goal).square().sum(-1).sqrt(),
    }
    return kinds[kind]
