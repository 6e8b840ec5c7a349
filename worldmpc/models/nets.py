"""Building blocks of the TD-MPC2 networks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from worldmpc.models import kernels
from worldmpc.models.networks import NORM_EPS, Layer, Network, network_of, simnorm


class SimNorm(nn.Module):
    """Simplicial normalisation: softmax within groups of latent entries (Lavoie et al. 2022; TD-MPC2 eq. 4).

    Layout ``consecutive``: entries ``8 i .. 8 i + 7`` form group ``i`` (published). ``strided``: entries ``i, i + G, i + 2 G, ...``
    of ``G`` groups do. Both describe the same function class, the latent being a permutation of the other;
    the strided softmax is about 20 times faster on a CPU.
    """

    def __init__(self, dim: int = 8, layout: Literal["strided", "consecutive"] = "strided") -> None:
        super().__init__()
        self.dim, self.layout = dim, layout

    def forward(self, x: Tensor) -> Tensor:
        """[..., Z] -> [..., Z]."""
        return simnorm(x, self.dim, self.layout == "strided")


class NormedLinear(nn.Linear):
    """Parameters of a Linear with a LayerNorm behind it; :class:`MLP` evaluates whole stacks of them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.ln = nn.LayerNorm(out_features, eps=NORM_EPS)


class MLP(nn.Sequential):
    """Linear, LayerNorm, Mish layers, and a last one that is linear, or Linear, LayerNorm, SimNorm."""

    def __init__(self, in_dim: int, hidden: list[int], out_dim: int, simnorm: SimNorm | None = None) -> None:
        dims = [in_dim, *hidden]
        layers: list[nn.Module] = [NormedLinear(before, after) for before, after in zip(dims, dims[1:], strict=False)]
        layers.append(nn.Linear(dims[-1], out_dim) if simnorm is None else NormedLinear(dims[-1], out_dim))
        super().__init__(*layers)
        self.groups, self.strided = (0, False) if simnorm is None else (simnorm.dim, simnorm.layout == "strided")

    def network(self) -> Network:
        """Return the parameters for :mod:`worldmpc.models.kernels`."""
        first: Any = self._modules["0"]
        return network_of(self, first.weight, False, lambda: [_parameters(layer) for layer in self], self.groups, self.strided)

    def forward(self, *parts: Tensor) -> Tensor:
        """[..., in_1], [..., in_2] (the columns of the input) -> [..., out]."""
        return kernels.mlp(parts, self.network())

    def rollout(self, z: Tensor, actions: Tensor) -> Tensor:
        """Apply itself to its own result: [..., Z], [T, ..., A] (without gradient) -> [T+1, ..., Z]."""
        return kernels.rollout(z, actions, self.network())


def _parameters(layer: nn.Module) -> Layer:
    assert isinstance(layer, nn.Linear)
    return (
        (layer.weight, layer.bias, layer.ln.weight, layer.ln.bias)
        if isinstance(layer, NormedLinear)
        else (layer.weight, layer.bias, None, None)
    )


class StackedLinear(nn.Module):
    """Parameters of one layer of an ensemble, stacked over its ``Q`` members."""

    def __init__(self, members: int, in_features: int, out_features: int, norm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(members, out_features))
        self.ln = StackedNorm(members, out_features) if norm else None


class StackedNorm(nn.Module):
    """LayerNorm parameters stacked over members."""

    def __init__(self, members: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, features))
        self.bias = nn.Parameter(torch.zeros(members, features))


class EnsembleMLP(nn.Module):
    """``Q`` MLPs of equal shape over the same input, with dropout before the norm of their first layer."""

    def __init__(self, members: int, in_dim: int, hidden: list[int], out_dim: int) -> None:
        super().__init__()
        dims = [in_dim, *hidden, out_dim]
        self.members = members
        self.layers = nn.ModuleList(
            StackedLinear(members, before, after, norm=after_index < len(dims) - 1)
            for after_index, (before, after) in enumerate(zip(dims, dims[1:], strict=False), start=1)
        )

    def forward(self, *parts: Tensor, heads: Tensor | None = None, keep: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Evaluate all members, or only those of the given indices.

        Args:
            parts: [..., in_1], [..., in_2], the columns of the input.
            heads: [Q'] int64, or None for all members.
            keep: dropout factors [Q', ..., hidden] for the first layer, or None for no dropout.
            frozen: take the parameters as constants: gradients reach the input alone.

        Returns:
            [Q', ..., out].
        """
        return kernels.mlp(parts, self.network(frozen), heads=heads, keep=keep)

    def network(self, frozen: bool = False) -> Network:
        """Return the parameters for :mod:`worldmpc.models.kernels`, stacked over members; ``frozen`` as constants."""
        first: Any = self.layers._modules["0"]
        return network_of(self, first.weight, frozen, lambda: [_stacked_parameters(layer, frozen) for layer in self.layers])


def _stacked_parameters(layer: nn.Module, frozen: bool) -> Layer:
    assert isinstance(layer, StackedLinear)
    norm = layer.ln
    parts = (layer.weight, layer.bias, norm.weight if norm else None, norm.bias if norm else None)
    return tuple(part.detach() if frozen and part is not None else part for part in parts)  # type: ignore[return-value]


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise as published: weights from a normal of std 0.02 (cut at 2), biases 0, norms 1 and 0."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if ".ln." in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0, generator=generator)
