"""Auxiliary value heads on the latent, for several discounts (first proposed without a paper; docs/variants.md)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.config import MultiGammaConfig, auxiliary_gammas
from worldmpc.models.nets import MLP, init_weights
from worldmpc.noise import derive_seed

_BEFORE = {"hidden_layers": 0}
"""What records of older checkpoints do not say."""


class ValueHeads(nn.Module):
    """Two-hot logits of ``G`` values, by one network for all of them or one for each.

    Last layers begin at 0, as those of the other two-hot heads. Random numbers come from a generator of their own, so that everything
    else is what it is without these heads.

    Args:
        latent_dim: width of the latent, Z.
        num_bins: of the two-hot distributions, K.
        heads: G.
        joint: one network for all.
        hidden: widths of its hidden layers; none: it is linear.
        seed: of the initial weights of hidden layers.
    """

    def __init__(self, latent_dim: int, num_bins: int, heads: int, joint: bool, hidden: Sequence[int] = (), seed: int = 1) -> None:
        super().__init__()
        self.num_bins = num_bins
        width = heads * num_bins if joint else num_bins
        with torch.device("meta"):  # where making layers draws nothing
            self.layers = nn.ModuleList(
                MLP(latent_dim, list(hidden), width) if hidden else nn.Linear(latent_dim, width) for _ in range(1 if joint else heads)
            )
        self.to_empty(device="cpu")
        init_weights(self, torch.Generator().manual_seed(derive_seed(seed, "auxiliary")))
        for layer in self.layers:
            nn.init.zeros_((layer[-1] if isinstance(layer, MLP) else layer).weight)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        """[..., Z] -> [..., G, K]."""
        logits = torch.cat([layer(z) for layer in self.layers], -1) if len(self.layers) > 1 else self.layers[0](z)
        return logits.to(z.dtype).unflatten(-1, (-1, self.num_bins))  # a linear layer alone is left in bfloat16 by autocast


class AuxiliaryValues(nn.Module):
    """Values at further discounts, which planner and policy never see.

    Args:
        latent_dim: width of the latent, Z.
        num_bins: of the two-hot distributions, K.
        gammas: discounts per decision, G of them.
        joint: one network for all.
        slow: keep a slow copy, from which targets are made.
        hidden: widths of its hidden layers.
        seed: of the initial weights of hidden layers.
    """

    discounts: Tensor

    def __init__(
        self, latent_dim: int, num_bins: int, gammas: Sequence[float], joint: bool, slow: bool, hidden: Sequence[int] = (), seed: int = 1
    ) -> None:
        super().__init__()
        self.gammas, self.head, self.hidden_layers = tuple(gammas), "joint" if joint else "separate", len(hidden)
        self.heads = ValueHeads(latent_dim, num_bins, len(self.gammas), joint, hidden, seed)
        self.slow = copy.deepcopy(self.heads).requires_grad_(False) if slow else None
        self.register_buffer("discounts", torch.tensor(self.gammas, dtype=torch.float32), persistent=False)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says about these heads."""
        kind = {"head": self.head, "hidden_layers": self.hidden_layers, "bootstrap": "primary" if self.slow is None else "self"}
        return {"gammas": list(self.gammas), **kind}


def make_auxiliary(config: MultiGammaConfig, model: Any, discount: float) -> AuxiliaryValues | None:
    """Return the auxiliary values of a configuration for a world model, None where there are none to learn.

    Raises:
        ConfigError: discounts that cannot be used, see :func:`worldmpc.config.auxiliary_gammas`.
    """
    gammas = auxiliary_gammas(config, discount)
    if not gammas:
        return None
    hidden = [model.hidden_dim] * config.hidden_layers
    joint, slow = config.head == "joint", config.bootstrap == "self"
    return AuxiliaryValues(model.latent_dim, model.two_hot.num_bins, gammas, joint, slow, hidden, model.seed)


def record_of(auxiliary: AuxiliaryValues | None) -> dict[str, Any] | None:
    """Return what a checkpoint says about auxiliary values, None about none."""
    return None if auxiliary is None else auxiliary.record()


def check_record(auxiliary: AuxiliaryValues | None, record: Mapping[str, Any] | None) -> None:
    """Check that a checkpoint has the auxiliary values that an agent has.

    Raises:
        ValueError: it has none, or others.
    """
    if record_of(auxiliary) != (record and {**_BEFORE, **record}):
        raise ValueError(f"multi_gamma: the checkpoint has {record or 'no auxiliary values'}, the agent {record_of(auxiliary) or 'none'}")
