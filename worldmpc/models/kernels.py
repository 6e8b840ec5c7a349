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

from worldmpc.models import native
from worldmpc.models.gradients import all_members, evaluate, evaluate_rollout, invoke, mapped, transforms_are_one_vmap
from worldmpc.models.native import CNet
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
    if not _fit(members, keep, parts, network):
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
    if not network.fits(sum(part.shape[-1] for part in parts)):
        return None
    if torch.is_autocast_enabled("cpu") and not (library.bf16 and torch.get_autocast_dtype("cpu") is torch.bfloat16):
        return None
    return library


def library_for(x: Tensor) -> native.Library | None:
    """Return the library where it is there and pays for the rows of a tensor [..., n]."""
    if torch.compiler.is_compiling() or not plain_float(x) or x.numel() < NATIVE_FROM * x.shape[-1] or not x.numel():
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


def returns(nets: ImaginedNets, z: Tensor, actions: Tensor, discount: float, eps: Tensor, critics: Tensor) -> Tensor | None:
    """Returns of imagined sequences (:func:`worldmpc.planners.rollout_return`) in one call of the library, without gradient.

    Args:
        nets: of a TD-MPC2 world model.
        z: [E, S, Z] starts, those of an environment being one latent expanded.
        actions: [H, E, S, A].
        discount: per decision.
        eps: [E, S, A].
        critics: [2].

    Returns:
        [E, S], or None where the library cannot do it.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or z.dim() != 3
        or actions.dim() != 4
        or eps.shape != actions.shape[1:]
        or not len(actions)
    ):
        return None
    joint, action_dim = (z, actions[0]), actions.shape[-1]
    # Name, network, input, width of the result, rows relative to those of one step, members.
    one = all_members(1)
    calls = [
        ("dynamics", nets.dynamics, joint, z.shape[-1], len(actions), one),
        ("reward", nets.reward, joint, len(nets.support), len(actions), one),
        ("policy", nets.policy, (z,), 2 * action_dim, 1, one),
        ("critics", nets.critics, joint, len(nets.support), 1, critics),
    ]
    if nets.termination is not None:
        calls.append(("termination", nets.termination, (z,), 1, len(actions), one))
    for _, network, parts, width, _, _ in calls:
        if _library_for(parts, network) is None or network.layers[-1][0].shape[-2] != width:
            return None
    if mapped(z, actions, eps, nets.dynamics.layers[0][0]) or z.stride(1) != 0 or not plain_float(nets.support) or not plain_float(eps):
        return None
    if not _fit(critics, None, joint, nets.critics):
        return None
    library = native.library()
    assert not isinstance(library, str)
    envs, samples, horizon = z.shape[0], z.shape[1], len(actions)
    starts, actions, eps, critics = z[:, 0].contiguous(), actions.contiguous(), eps.contiguous(), critics.contiguous()
    out = z.new_empty(envs, samples)
    call, alive = native.CReturns(), []
    bf16 = torch.is_autocast_enabled("cpu")
    for name, network, parts, _, steps, members in calls:
        members = members.contiguous()
        packed = network.packed(Facts(len(members), network.groups, network.strided, bf16), z.shape[-1], library.panel)
        setattr(call, name, packed.net)
        net: CNet = getattr(call, name)
        net.seeds, net.heads, net.rows, net.repeat, net.members = 1, len(members), steps * envs * samples, 1, members.data_ptr()
        net.d1, net.d2 = z.shape[-1], action_dim if len(parts) == 2 else 0
        alive += [packed, members]
    call.envs, call.samples, call.horizon, call.actions_dim, call.bins = envs, samples, horizon, action_dim, len(nets.support)
    call.hard, call.threads, call.discount = nets.hard, torch.get_num_threads(), discount
    call.log_std_min, call.log_std_max = nets.log_std
    call.z, call.actions, call.eps, call.support, call.out = (x.data_ptr() for x in (starts, actions, eps, nets.support, out))
    invoke(library.returns, call)
    del alive
    return out
