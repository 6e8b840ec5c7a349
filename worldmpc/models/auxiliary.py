"""Auxiliary value heads: one linear layer on the latent for several discounts (seed of multi-discount TD-MPC2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.config import MultiGammaConfig, auxiliary_gammas


class ValueHeads(nn.Module):
    """Two-hot logits of ``G`` values, by one linear layer for all of them or one for each.

    Weights begin at 0, as those of the other two-hot heads: no random numbers are drawn, so that everything else is what it is without
    these heads.
    """

    def __init__(self, latent_dim: int, num_bins: int, heads: int, joint: bool) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, latent_dim, heads * num_bins if joint else num_bins) for _ in range(1 if joint else heads)
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor) -> Tensor:
        """[..., Z] -> [..., G, K]."""
        logits = torch.cat([layer(z) for layer in self.layers], -1) if len(self.layers) > 1 else self.layers[0](z)
        return logits.unflatten(-1, (-1, self.num_bins))


class AuxiliaryValues(nn.Module):
    """Values at further discounts, which planner and policy never see.

    Args:
        latent_dim: width of the latent, Z.
        num_bins: of the two-hot distributions, K.
        gammas: discounts per decision, G of them.
        joint: one linear layer for all.
        slow: keep a slow copy, from which targets are made.
    """

    discounts: Tensor

    def __init__(self, latent_dim: int, num_bins: int, gammas: Sequence[float], joint: bool, slow: bool) -> None:
        super().__init__()
        self.gammas, self.head = tuple(gammas), "joint" if joint else "separate"
        self.heads = ValueHeads(latent_dim, num_bins, len(self.gammas), joint)
        self.slow = copy.deepcopy(self.heads).requires_grad_(False) if slow else None
        self.register_buffer("discounts", torch.tensor(self.gammas, dtype=torch.float32), persistent=False)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says about these heads."""
        return {"gammas": list(self.gammas), "head": self.head, "bootstrap": "primary" if self.slow is None else "self"}


def make_auxiliary(config: MultiGammaConfig, model: Any, discount: float) -> AuxiliaryValues | None:
    """Return the auxiliary values of a configuration for a world model, None where there are none to learn.

    Raises:
        ConfigError: discounts that cannot be used, see :func:`worldmpc.config.auxiliary_gammas`.
    """
    gammas = auxiliary_gammas(config, discount)
    if not gammas:
        return None
    return AuxiliaryValues(model.latent_dim, model.two_hot.num_bins, gammas, config.head == "joint", config.bootstrap == "self")


def record_of(auxiliary: AuxiliaryValues | None) -> dict[str, Any] | None:
    """Return what a checkpoint says about auxiliary values, None about none."""
    return None if auxiliary is None else auxiliary.record()


def check_record(auxiliary: AuxiliaryValues | None, record: Mapping[str, Any] | None) -> None:
    """Check that a checkpoint has the auxiliary values that an agent has.

    Raises:
        ValueError: it has none, or others.
    """
    if record_of(auxiliary) != record:
        raise ValueError(f"multi_gamma: the checkpoint has {record or 'no auxiliary values'}, the agent {record_of(auxiliary) or 'none'}")
