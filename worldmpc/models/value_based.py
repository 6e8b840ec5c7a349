"""Plain networks of Linear and ReLU layers: action values, twin critics, policies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from worldmpc.models.heads import squashed_gaussian
from worldmpc.noise import derive_seed
from worldmpc.types import PolicySample

ModuleT = TypeVar("ModuleT", bound=nn.Module)

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
"""Bounds of a Gaussian policy's log standard deviation."""


def mlp(in_dim: int, hidden: Sequence[int], out_dim: int) -> nn.Sequential:
    """Return Linear, ReLU layers and a last Linear one, without initial weights: see :func:`initialise`."""
    layers: list[nn.Module] = []
    for before, after in pairwise((in_dim, *hidden)):
        layers += [skip_init(nn.Linear, before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, skip_init(nn.Linear, (in_dim, *hidden)[-1], out_dim))


class StackedLinear(nn.Module):
    """``Q`` Linear layers of equal shape, weights [Q, in, out]."""

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(members, 1, out_features))

    def forward(self, x: Tensor, members: int) -> Tensor:
        """[Q', B, in] -> [Q', B, out] by the first ``Q'`` members."""
        weight, bias = self.weight[:members], self.bias[:members]
        if weight.shape[-1] == 1:  # batched products with a vector are slow on a CPU
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class StackedMLP(nn.Module):
    """``Q`` networks like :func:`mlp`'s on the same input, one matrix product per layer for all of them."""

    def __init__(self, members: int, in_dim: int, hidden: Sequence[int], out_dim: int) -> None:
        super().__init__()
        self.members = members
        self.layers = nn.ModuleList(StackedLinear(members, before, after) for before, after in pairwise((in_dim, *hidden, out_dim)))

    def forward(self, *parts: Tensor, members: int | None = None) -> Tensor:
        """Evaluate all members, or only the first ones: [B, in_1], [B, in_2] (the columns of the input) -> [Q', B, out]."""
        members = members or self.members
        x = torch.cat(parts, -1).expand(members, -1, -1)
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x, members).relu_()
        return last(x, members)


class QNetwork(nn.Module):
    """Values of all actions.

    ``dueling``: all hidden layers but the last are shared, then come a stream for the state's value and one for the advantages,
    ``Q = V + A - mean A`` (Wang et al. 2016, eq. 9).
    """

    def __init__(self, obs_dim: int, num_actions: int, hidden: Sequence[int], dueling: bool = False) -> None:
        super().__init__()
        self.dueling = dueling
        if not dueling:
            self.q = mlp(obs_dim, hidden, num_actions)
            return
        *shared, last = hidden
        self.trunk = nn.Sequential(mlp(obs_dim, shared[:-1], shared[-1]), nn.ReLU(inplace=True)) if shared else nn.Identity()
        self.value = mlp((obs_dim, *shared)[-1], [last], 1)
        self.advantage = mlp((obs_dim, *shared)[-1], [last], num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        """[..., O] -> [..., A]."""
        if not self.dueling:
            return self.q(obs)
        features = self.trunk(obs)
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(-1, keepdim=True)


class GaussianActor(nn.Module):
    """A squashed Gaussian policy."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp(obs_dim, hidden, 2 * action_dim)

    def forward(self, obs: Tensor, eps: Tensor) -> PolicySample:
        """Sample an action with standard normal noise: [..., O], [..., A] -> :class:`~worldmpc.types.PolicySample`."""
        return squashed_gaussian(self.net(obs), eps, LOG_STD_MIN, LOG_STD_MAX)


class DeterministicActor(nn.Module):
    """A policy without randomness."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp(obs_dim, hidden, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """[..., O] -> [..., A] in [-1, 1]."""
        return torch.tanh(self.net(obs))


class Temperature(nn.Module):
    """Weight of a policy's entropy: learned, as its logarithm, or fixed."""

    def __init__(self, alpha: float, learned: bool) -> None:
        super().__init__()
        if learned:
            self.log_alpha = nn.Parameter(torch.tensor(alpha).log())
        else:
            self.register_buffer("alpha", torch.tensor(alpha))
        self.learned = learned

    def forward(self) -> Tensor:
        """Return it, []."""
        return self.log_alpha.exp() if self.learned else self.get_buffer("alpha")


@torch.no_grad()
def initialise(networks: Iterable[nn.Module], seed: int) -> None:
    """Draw weights and biases uniformly within 1 / sqrt(inputs), PyTorch's default, from the stream of a seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "init"))
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, nn.Linear | StackedLinear):
                bound = (layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[1]) ** -0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)


def target_of(network: ModuleT) -> ModuleT:
    """Return a copy that no gradient changes."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: Tensor) -> None:
    """Move a target network towards its source: ``target += tau (source - target)``, ``tau`` []; 1 copies it."""
    slow: list[Tensor] = list(target.parameters())
    fast: list[Tensor] = list(source.parameters())
    torch._foreach_lerp_(slow, fast, [tau] * len(slow))  # pyright: ignore[reportPrivateImportUsage]
