"""Building blocks of the TD-MPC2 networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from worldmpc.models import kernels


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
        if self.layout == "strided":
            return x.unflatten(-1, (self.dim, -1)).softmax(-2).flatten(-2)
        return x.unflatten(-1, (-1, self.dim)).softmax(-1).flatten(-2)


class Linear(nn.Linear):
    """Linear layer with the product of :mod:`worldmpc.models.kernels`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return kernels.linear(x, self.weight, self.bias)


class NormedLinear(Linear):
    """Linear, LayerNorm, activation; None for Mish."""

    def __init__(self, in_features: int, out_features: int, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(in_features, out_features)
        self.ln = nn.LayerNorm(out_features, eps=kernels.NORM_EPS)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.activation is None:
            return kernels.normed_mish(x, self.weight, self.bias, self.ln.weight, self.ln.bias)
        return self.activation(self.ln(super().forward(x)))


def mlp(in_dim: int, hidden: list[int], out_dim: int, activation: Callable[[Tensor], Tensor] | None = None) -> nn.Sequential:
    """Stack NormedLinear layers; the last one is plain, or a NormedLinear with ``activation`` where that is given."""
    dims = [in_dim, *hidden]
    layers: list[nn.Module] = [NormedLinear(before, after) for before, after in zip(dims, dims[1:], strict=False)]
    layers.append(Linear(dims[-1], out_dim) if activation is None else NormedLinear(dims[-1], out_dim, activation))
    return nn.Sequential(*layers)


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

    def forward(self, x: Tensor, heads: Tensor | None = None, keep: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Evaluate all members, or only those of the given indices.

        Args:
            x: [..., in].
            heads: [Q'] int64, or None for all members.
            keep: dropout factors [Q', ..., hidden] for the first layer, or None for no dropout.
            frozen: take the parameters as constants: gradients reach the input alone.

        Returns:
            [Q', ..., out].
        """
        # One matrix product per member: on a CPU this beats the batched product by a third, and nothing unused is computed.
        layers = [[part if part is None else _members(part, heads, frozen) for part in _parts(layer)] for layer in self.layers]
        outputs = []
        for member in range(self.members if heads is None else len(heads)):
            hidden = x
            for index, layer in enumerate(layers):
                weight, bias, ln_weight, ln_bias = (part if part is None else part[member] for part in layer)
                assert weight is not None and bias is not None
                if ln_weight is None or ln_bias is None:
                    hidden = kernels.linear(hidden, weight, bias)
                else:
                    dropout = keep[member] if index == 0 and keep is not None else None
                    hidden = kernels.normed_mish(hidden, weight, bias, ln_weight, ln_bias, dropout)
            outputs.append(hidden)
        return torch.stack(outputs)


def _parts(layer: nn.Module) -> list[Tensor | None]:
    assert isinstance(layer, StackedLinear)
    norm = layer.ln
    return [layer.weight, layer.bias, norm.weight if norm else None, norm.bias if norm else None]


def _members(stacked: Tensor, heads: Tensor | None, frozen: bool) -> tuple[Tensor, ...]:
    stacked = stacked.detach() if frozen else stacked
    return (stacked if heads is None else stacked.index_select(0, heads)).unbind(0)


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
