"""The arithmetic of whole networks, as fast as the device at hand allows.

``mlp`` evaluates Linear, LayerNorm, Mish stacks: with the library of :mod:`worldmpc.models.native` where it can (float32 on an x86
CPU, enough rows), else as a composition of PyTorch's functions: on GPUs, in compiled code, under ``torch.func``'s
derivatives, for second derivatives, and where there is no library. Both compute the same to rounding. ``rollout`` and ``returns`` do so for
networks applied to their own results, and for whole imagined returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from worldmpc.models import native
from worldmpc.models.gradients import all_members, evaluate, evaluate_rollout, invoke, mapped, transforming, transforms_are_one_vmap
from worldmpc.models.native import CNet, CReturns
from worldmpc.models.networks import Layer, Network, plain, plain_float, plain_rollout
from worldmpc.models.packing import Facts

NATIVE_FROM = 8
"""Rows from which the library is faster than PyTorch, as it packs the weights first."""


def mlp(
    parts: Sequence[Tensor],
    layers: Sequence[Layer] | Network,
    *,
    heads: Tensor | None = None,
    keep: Tensor | None = None,
    groups: int = 0,
    strided: bool = False,
) -> Tensor:
    """Evaluate a network, or ``Q`` networks of equal shape on the same input.

    Args:
        parts: the columns of the input in one or two tensors [..., in_i], float32.
        layers: parameters, with or without ``Q``; or a :class:`Network`, which knows ``groups`` and ``strided``.
        heads: [Q'] int64, which of the ``Q``; None for all.
        keep: dropout factors [Q', ..., hidden] before the LayerNorm of the first layer, or None.
        groups: width of the groups of the SimNorm that takes the place of the last layer's Mish; 0: the last layer is linear.
        strided: layout of these groups.

    Returns:
        [..., out] or [Q', ..., out] float32.
    """
    network = layers if isinstance(layers, Network) else Network(layers, groups, strided)
    if _library_for(parts, network) is None:
        return plain(parts, network, heads, keep)
    members = all_members(network.members) if heads is None else heads
    if not _fit(members, keep, parts, network) or (transforming() and not mapped(*parts, keep, members, *network.params)):
        return plain(parts, network, heads, keep)
    single = network.layers[0][0].dim() == 2
    members, lead = members.contiguous(), parts[0].shape[:-1]
    facts = Facts(len(members), network.groups, network.strided, torch.is_autocast_enabled("cpu"))
    x1 = parts[0]
    shared = len(parts) == 2 and x1.dim() > 2 and not mapped(*parts) and x1.stride(-2) == 0 and not torch.is_grad_enabled()
    x1 = (x1[..., 0, :] if shared else x1).reshape(1, -1, x1.shape[-1]).contiguous()
    x2 = parts[1].reshape(1, -1, parts[1].shape[-1]).contiguous() if len(parts) == 2 else None
    if keep is not None:
        keep = keep.reshape(1, len(members), -1, keep.shape[-1]).contiguous()
    out = evaluate(x1, x2, keep, members, facts, network)
    return out.view(*(() if single else (len(members),)), *lead, out.shape[-1])


def rollout(z: Tensor, actions: Tensor, network: Network) -> Tensor:
    """Apply a network that ends in SimNorm to its own result: z [..., Z], actions [T, ..., A] without gradient -> [T+1, ..., Z]."""
    first = network.layers[0][0]
    fits = network.groups and first.dim() == 2 and network.layers[-1][0].shape[-2] == z.shape[-1]
    if not fits or not len(actions) or actions.requires_grad or _library_for((z, actions[0]), network) is None:
        return plain_rollout(z, actions, network)
    if transforming() and not mapped(z, actions, *network.params):
        return plain_rollout(z, actions, network)
    rows = z.reshape(1, -1, z.shape[-1]).contiguous()
    steps = actions.reshape(len(actions), 1, -1, actions.shape[-1]).contiguous()
    facts = Facts(1, network.groups, network.strided, torch.is_autocast_enabled("cpu"))
    return evaluate_rollout(rows, steps, facts, network).view(len(actions) + 1, *z.shape)


def _library_for(parts: Sequence[Tensor], network: Network) -> native.Library | None:
    """Return the library, where it can do it; what it cannot, PyTorch can, or refuses with its own words."""
    x = parts[0]
    library = library_for(x)
    if library is None or len(parts) > 2:
        return None
    for part in parts[1:]:
        if part.shape[:-1] != x.shape[:-1] or not part.numel() or not plain_float(part):
            return None
    return library if network.fits(sum(part.shape[-1] for part in parts)) and _precision_fits(library) else None


def library_for(x: Tensor) -> native.Library | None:
    """Return the library where it is there and pays for the rows of a tensor [..., n]; it knows no forward derivatives."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or not plain_float(x)
        or x.numel() < NATIVE_FROM * x.shape[-1]
        or not x.numel()
    ):
        return None
    library = native.library()
    return library if not isinstance(library, str) and transforms_are_one_vmap() else None


def _fit(members: Tensor, keep: Tensor | None, parts: Sequence[Tensor], network: Network) -> bool:
    """Whether heads are different ones that exist, and dropout factors have the shape of what they are for."""
    weight = network.layers[0][0]
    if members.dtype is not torch.int64 or members.dim() != 1 or not members.is_cpu:
        return False
    if weight.dim() == 3 and members is not all_members(len(weight)) and not mapped(members):
        chosen = members.tolist()
        if len(set(chosen)) != len(chosen) or not chosen or min(chosen) < 0 or max(chosen) >= len(weight):
            return False
    if keep is None:
        return True
    lead = () if weight.dim() == 2 else (len(members),)
    return not keep.requires_grad and plain_float(keep) and keep.shape == (*lead, *parts[0].shape[:-1], weight.shape[-2])


class ImaginedNets(NamedTuple):
    """Networks that returns of imagined sequences need, and what belongs to their heads."""

    dynamics: Network
    reward: Network
    policy: Network
    critics: Network
    termination: Network | None
    support: Tensor
    """[K] bins in symlog space."""
    log_std: tuple[float, float]
    hard: bool
    state_values: bool = False
    """Critics read the latent alone: returns end in V(z), and the policy is not evaluated."""
    clipped: bool = False
    """The policy's actions are clip(tanh(mean) + eps std, -1, 1) instead of tanh(mean + eps std)."""


def returns(nets: ImaginedNets, z: Tensor, actions: Tensor, discount: float, eps: Tensor, critics: Tensor) -> Tensor | None:
    """Returns of imagined sequences (:func:`worldmpc.planners.rollout_return`) in one call of the library, without gradient.

    Args:
        nets: of a TD-MPC2 world model.
        z: [E, S, Z] starts, those of an environment being one latent expanded.
        actions: [H, E, S, A].
        discount: per decision.
        eps: [E, S, A]; with ``state_values`` it is not looked at.
        critics: [2].

    Returns:
        [E, S], or None where the library cannot do it.
    """
    if torch.is_grad_enabled() or z.dim() != 3 or actions.dim() != 4 or not actions.shape[0]:
        return None
    if nets.state_values:
        eps = actions[0]  # stands in for noise that no policy reads
    if z.shape[:2] != eps.shape[:2] or eps.shape != actions.shape[1:]:
        return None
    latent, dim, bins = z.shape[-1], actions.shape[-1], nets.support.shape[0]
    networks = {
        "dynamics": (nets.dynamics, latent + dim, latent),
        "reward": (nets.reward, latent + dim, bins),
        "critics": (nets.critics, latent if nets.state_values else latent + dim, bins),
    }
    if not nets.state_values:
        networks["policy"] = nets.policy, latent, 2 * dim
    if nets.termination is not None:
        networks["termination"] = nets.termination, latent, 1
    if not _imaginable(networks, z, actions, eps, nets.support) or not _fit(critics, None, (z,), nets.critics):
        return None
    envs, samples = z.shape[:2]
    starts, actions, eps, critics = z[:, 0].contiguous(), actions.contiguous(), eps.contiguous(), critics.contiguous()
    out = z.new_empty(envs, samples)
    call, library = _imagination(nets, networks, starts, eps, critics, samples, actions.shape[0])
    call.bins, call.hard, call.discount = bins, nets.hard, discount
    call.actions, call.support, call.out = actions.data_ptr(), nets.support.data_ptr(), out.data_ptr()
    invoke(library.returns, call)
    return out


def proposals(nets: ImaginedNets, z: Tensor, eps: Tensor) -> Tensor | None:
    """Sample sequences of actions from the policy prior, each action followed by the dynamics, without gradient.

    Args:
        nets: of a TD-MPC2 world model, of which dynamics and policy are used.
        z: [E, Z] starts.
        eps: [H, E, P, A].

    Returns:
        [H, E, P, A], or None where the library cannot do it.
    """
    if torch.is_grad_enabled() or z.dim() != 2 or eps.dim() != 4 or eps.shape[1] != z.shape[0] or not eps.shape[0] or not eps.shape[2]:
        return None
    many = z[:, None].expand(-1, eps.shape[2], -1)
    latent, dim = z.shape[-1], eps.shape[-1]
    networks = {"dynamics": (nets.dynamics, latent + dim, latent), "policy": (nets.policy, latent, 2 * dim)}
    if not _imaginable(networks, many, eps):
        return None
    z, eps = z.contiguous(), eps.contiguous()
    out = torch.empty_like(eps)
    call, library = _imagination(nets, networks, z, eps, all_members(1), eps.shape[2], eps.shape[0])
    call.out = out.data_ptr()
    invoke(library.proposals, call)
    return out


_Networks = dict[str, tuple[Network, int, int]]
"""Name -> network, widths of its input and of its result."""


def _imaginable(networks: _Networks, z: Tensor, *others: Tensor) -> bool:
    """Return whether the library can imagine with these networks from z [E, S, Z], those of an environment being one latent expanded."""
    library = library_for(z)
    if library is None or transforming() or not _precision_fits(library) or not all(map(plain_float, others)):
        return False
    if not all(network.layers[-1][0].shape[-2] == width and network.fits(inputs) for network, inputs, width in networks.values()):
        return False
    return z.shape[1] == 1 or z.stride(1) == 0


def _precision_fits(library: native.Library) -> bool:
    """Return whether the library has the precision that autocast asks for, if any."""
    return not torch.is_autocast_enabled("cpu") or (library.bf16 and torch.get_autocast_dtype("cpu") is torch.bfloat16)


def _imagination(
    nets: ImaginedNets, networks: _Networks, z: Tensor, eps: Tensor, critics: Tensor, samples: int, horizon: int
) -> tuple[CReturns, native.Library]:
    """Return a call with what all imagination needs filled in; it keeps the arguments alive itself."""
    library = native.library()
    assert not isinstance(library, str)
    call, bf16, action_dim, envs = CReturns(), torch.is_autocast_enabled("cpu"), eps.shape[-1], z.shape[0]
    alive: list[object] = [z, eps, critics]
    for name, (network, inputs, _) in networks.items():
        members = critics if name == "critics" else all_members(1)
        packed = network.packed(Facts(members.shape[0], network.groups, network.strided, bf16), z.shape[-1], library.panel)
        setattr(call, name, packed.net)
        net: CNet = getattr(call, name)
        steps = horizon if name in ("dynamics", "reward", "termination") else 1
        net.seeds, net.heads, net.rows, net.repeat, net.members = 1, members.shape[0], steps * envs * samples, 1, members.data_ptr()
        net.d1, net.d2 = z.shape[-1], inputs - z.shape[-1]
        alive.append(packed)
    call.envs, call.samples, call.horizon, call.actions_dim, call.threads = envs, samples, horizon, action_dim, torch.get_num_threads()
    call.log_std_min, call.log_std_max = nets.log_std
    call.clipped, call.z, call.eps = nets.clipped, z.data_ptr(), eps.data_ptr()
    call.alive = alive
    return call, library
