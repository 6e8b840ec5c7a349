"""The arithmetic of whole networks, as fast as the device at hand allows.

``mlp`` evaluates Linear, LayerNorm, Mish stacks: with the library of :mod:`worldmpc.models.native` where it can (float32 on an x86
CPU, enough rows), else as a composition of PyTorch's functions: on GPUs, in compiled code, under ``torch.func``'s
derivatives, for second derivatives, and where there is no library. Both compute the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import pyfunctorch

from worldmpc.models import native
from worldmpc.models.native import CNet, Facts, constant_parameters

__all__ = [
    "NATIVE_FROM",
    "NORM_EPS",
    "ImaginedNets",
    "Layer",
    "Network",
    "constant_parameters",
    "mlp",
    "network_of",
    "returns",
    "rollout",
    "simnorm",
]

NORM_EPS = 1e-5
"""What LayerNorm adds to the variance; ``mlp.c`` has it as well."""
NATIVE_FROM = 8
"""Rows from which the library is faster than PyTorch, as it packs the weights first."""

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Weight [out, in], bias [out], and weight and bias of the LayerNorm [out], or None where neither it nor Mish follow; with a
leading dimension ``Q`` for networks of equal shape on the same input."""


class Network:
    """Parameters of a network, or of ``Q`` on the same input, and what has been found out about them.

    Args:
        layers: parameters, with or without ``Q``.
        groups: width of the groups of the SimNorm that takes the place of the last layer's Mish; 0: the last layer is linear.
        strided: layout of these groups.
    """

    def __init__(self, layers: Sequence[Layer], groups: int = 0, strided: bool = False) -> None:
        self.layers, self.groups, self.strided = layers, groups, strided
        self._fits: dict[int, bool] = {}
        self._packed: dict[tuple[Facts, int], native.Packed] = {}
        self._scope: object = None
        self.params = [None if part is None else part.contiguous() for layer in layers for part in layer]

    @property
    def members(self) -> int:
        """Number ``Q`` of networks; 1 for one without that dimension."""
        weight = self.layers[0][0]
        return 1 if weight.dim() == 2 else len(weight)

    def fits(self, width: int) -> bool:
        """Return whether the library can evaluate it on inputs of this width."""
        if width not in self._fits:
            self._fits[width] = _well_formed(self.layers, width, self.groups)
        return self._fits[width]

    def packed(self, facts: Facts, split: int, panel: int) -> native.Packed:
        """Return it packed for the library: once in every scope of constant parameters, each time outside of them."""
        scope = native.scope().packed
        if scope is not self._scope or scope is None:
            self._packed, self._scope = {}, scope
        key = facts, split
        if key not in self._packed:
            self._packed[key] = native.packed(self.params, facts, split, panel)
        return self._packed[key]


def network_of(owner: object, first: Tensor, frozen: bool, build: Callable[[], Network]) -> Network:
    """Return a module's network, found out about once in every scope of constant parameters; ``first``: its first parameter now."""
    known = None if torch.compiler.is_compiling() else native.scope().networks
    if known is None:
        return build()
    entry = known.get((id(owner), frozen))
    if entry is None or entry[0] is not owner or entry[1][0] is not first:  # type: ignore[index]
        entry = known[id(owner), frozen] = (owner, (first, build()))
    return entry[1][1]  # type: ignore[index,return-value]


def simnorm(x: Tensor, width: int, strided: bool) -> Tensor:
    """Softmax within groups of ``width`` entries, neighbours or strided: [..., Z] -> [..., Z]."""
    if strided:
        return x.unflatten(-1, (width, -1)).softmax(-2).flatten(-2)
    return x.unflatten(-1, (-1, width)).softmax(-1).flatten(-2)


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
        return _plain(parts, network, heads, keep)
    members = _all_members(network.members) if heads is None else heads
    if not _fit(members, keep, parts, network):
        return _plain(parts, network, heads, keep)
    single = network.layers[0][0].dim() == 2
    members, lead = members.contiguous(), parts[0].shape[:-1]
    facts = Facts(len(members), network.groups, network.strided, torch.is_autocast_enabled("cpu"))
    x1 = parts[0]
    shared = len(parts) == 2 and x1.dim() > 2 and not _mapped(*parts) and x1.stride(-2) == 0 and not torch.is_grad_enabled()
    x1 = (x1[..., 0, :] if shared else x1).reshape(1, -1, x1.shape[-1]).contiguous()
    x2 = parts[1].reshape(1, -1, parts[1].shape[-1]).contiguous() if len(parts) == 2 else None
    if keep is not None:
        keep = keep.reshape(1, len(members), -1, keep.shape[-1]).contiguous()
    if _mapped(x1, x2, keep, members, *network.params):
        out: Tensor = _MappedMLP.apply(x1, x2, keep, members, facts, *network.params)  # type: ignore[assignment]
    elif torch.is_grad_enabled():
        out = _MLP.apply(x1, x2, keep, members, facts, network, *network.params)  # type: ignore[assignment]
    else:
        out = _forward(x1, x2, keep, members, facts, False, network)[0]
    return out.view(*(() if single else (len(members),)), *lead, out.shape[-1])


@lru_cache
def _all_members(number: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(number, device="cpu")


def _library_for(parts: Sequence[Tensor], network: Network) -> native.Library | None:
    """Return the library, where it can do it; what it cannot, PyTorch can, or refuses with its own words."""
    x = parts[0]
    if torch.compiler.is_compiling() or not x.is_cpu or len(parts) > 2 or x.numel() < NATIVE_FROM * x.shape[-1] or not x.numel():
        return None
    for part in parts[1:]:
        if part.shape[:-1] != x.shape[:-1] or not part.numel():
            return None
    if not all(_plain_float(part) for part in parts) or not network.fits(sum(part.shape[-1] for part in parts)):
        return None
    library = native.library()
    if isinstance(library, str):
        return None
    if torch.is_autocast_enabled("cpu") and not (library.bf16 and torch.get_autocast_dtype("cpu") is torch.bfloat16):
        return None
    return library if _transforms_are_one_vmap() else None


def _well_formed(layers: Sequence[Layer], width: int, groups: int) -> bool:
    """Whether the parameters belong together: widths follow on each other, LayerNorms everywhere but perhaps in the end."""
    if len(layers) > native.MAX_LAYERS:
        return False
    last = len(layers) - 1
    lead = layers[0][0].shape[:-2]
    for index, (weight, bias, ln_weight, ln_bias) in enumerate(layers):
        shape = weight.shape[:-1]
        if weight.shape[-1] != width or shape[:-1] != lead or bias.shape != shape or (ln_weight is None) != (ln_bias is None):
            return False
        if ln_weight is None or ln_bias is None:
            if index < last or groups:
                return False
        elif ln_weight.shape != shape or ln_bias.shape != shape or not (_plain_float(ln_weight) and _plain_float(ln_bias)):
            return False
        if not (_plain_float(weight) and _plain_float(bias)):
            return False
        width = shape[-1]
    # A LayerNorm in the end comes with SimNorm, and SimNorm with whole groups.
    return (layers[last][2] is None) == (groups == 0) and (groups == 0 or width % groups == 0)


def _plain_float(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


def _fit(members: Tensor, keep: Tensor | None, parts: Sequence[Tensor], network: Network) -> bool:
    """Whether heads are different ones that exist, and dropout factors have the shape of what they are for."""
    weight = network.layers[0][0]
    if members.dtype is not torch.int64 or members.dim() != 1 or not members.is_cpu:
        return False
    if weight.dim() == 3 and members is not _all_members(len(weight)) and not _mapped(members):
        chosen = members.tolist()
        if len(set(chosen)) != len(chosen) or not chosen or min(chosen) < 0 or max(chosen) >= len(weight):
            return False
    if keep is None:
        return True
    lead = () if weight.dim() == 2 else (len(members),)
    return not keep.requires_grad and _plain_float(keep) and keep.shape == (*lead, *parts[0].shape[:-1], weight.shape[-2])


def _transforms_are_one_vmap() -> bool:
    """Whether no transform of torch.func is active, or torch.vmap alone, for which the functions below have rules."""
    if torch._C._functorch.peek_interpreter_stack() is None:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    active = pyfunctorch.retrieve_all_functorch_interpreters()
    return len(active) == 1 and isinstance(active[0], pyfunctorch.VmapInterpreter)


def _mapped(*tensors: Tensor | None) -> bool:
    """Whether one of them stands for a batch, under torch.func or in ``torch.autograd.grad(..., is_grads_batched=True)``."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(wrapped(tensor) or batched(tensor) for tensor in tensors if tensor is not None)


def _plain(parts: Sequence[Tensor], network: Network, heads: Tensor | None, keep: Tensor | None) -> Tensor:
    """Do the same with PyTorch's functions, one member after the other: on a CPU this beats the batched product by a third."""
    layers, groups, strided = network.layers, network.groups, network.strided
    x = parts[0] if len(parts) == 1 else torch.cat([part.expand(*parts[-1].shape[:-1], -1) for part in parts], -1)
    if layers[0][0].dim() == 2:
        return _plain_member(x, layers, keep, groups, strided)
    chosen = [
        [None if part is None else (part if heads is None else part.index_select(0, heads)).unbind() for part in layer] for layer in layers
    ]
    outputs = []
    for member in range(len(layers[0][0]) if heads is None else len(heads)):
        own: Any = [[None if part is None else part[member] for part in layer] for layer in chosen]
        outputs.append(_plain_member(x, own, None if keep is None else keep[member], groups, strided))
    return torch.stack(outputs)


def _plain_member(x: Tensor, layers: Sequence[Layer], keep: Tensor | None, groups: int, strided: bool) -> Tensor:
    for index, (weight, bias, ln_weight, ln_bias) in enumerate(layers):
        x = F.linear(x, weight, bias)
        if index == 0 and keep is not None:
            x = x * keep
        if ln_weight is not None and ln_bias is not None:
            x = F.layer_norm(x, ln_weight.shape, ln_weight, ln_bias, NORM_EPS)
            x = simnorm(x, groups, strided) if groups and index == len(layers) - 1 else F.mish(x)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()  # autocast rounds inside networks alone


def _prepare(
    x1: Tensor, x2: Tensor | None, keep: Tensor | None, members: Tensor, facts: Facts, network: Network
) -> tuple[native.Library, CNet, tuple[object, ...]]:
    """Return the library and a call of it with everything but results filled in; the last tuple must outlive the call."""
    library = native.library()
    assert not isinstance(library, str)
    packed = network.packed(facts, x1.shape[2], library.panel)
    net = CNet.from_buffer_copy(packed.net)
    net.seeds, net.heads, net.rows = x1.shape[0], facts.heads, x1.shape[1] if x2 is None else x2.shape[1]
    net.repeat, net.d1, net.threads = net.rows // x1.shape[1], x1.shape[2], torch.get_num_threads()
    net.x1, net.members = x1.data_ptr(), members.data_ptr()
    if x2 is not None:
        net.x2, net.d2 = x2.data_ptr(), x2.shape[2]
    if keep is not None:
        net.keep = keep.data_ptr()
    return library, net, (packed, members)


def _call(function: Any, net: CNet | native.CReturns) -> None:
    if function(net):
        raise MemoryError("no memory left for evaluating a network")


def _forward(
    x1: Tensor, x2: Tensor | None, keep: Tensor | None, members: Tensor, facts: Facts, save: bool, network: Network
) -> tuple[Tensor, Tensor | None]:
    """Return the result [S, Q, M, out], and what the backward pass needs, flat."""
    library, net, alive = _prepare(x1, x2, keep, members, facts, network)
    out = x1.new_empty(net.seeds, facts.heads, net.rows, net.layer[net.layers - 1].out)
    net.out = out.data_ptr()
    saved = None
    if save:
        rows = net.seeds * facts.heads * net.rows
        saved = x1.new_empty(rows * _saved_width(net))
        _place_saved(net, saved, rows)
    _call(library.forward, net)
    del alive
    return out, saved


def _saved_width(net: CNet) -> int:
    """Floats per row that :func:`_place_saved` points at."""
    return sum(layer.out + 1 for layer in net.layer[: net.layers] if layer.ln_weight)


def _place_saved(net: CNet, saved: Tensor, rows: int, first: int = 0) -> None:
    """Point a call at its rows, from ``first`` on, of the normalised values and reciprocal deviations of its layers."""
    at = saved.data_ptr()
    for index in range(net.layers):
        layer = net.layer[index]
        if layer.ln_weight:
            layer.xhat, layer.rstd = at + 4 * first * layer.out, at + 4 * (rows * layer.out + first)
            at += 4 * rows * (layer.out + 1)


class _Gradients:
    """Room for the gradients of a network's parameters and for what lies between its two backward passes."""

    def __init__(
        self, library: native.Library, net: CNet, rows: int, params: Sequence[Tensor | None], needed: Sequence[bool], whole: bool
    ) -> None:
        self.grads: list[Tensor | None] = []
        for index, (param, need) in enumerate(zip(params, needed, strict=True)):
            # Weights of members that are not evaluated stay 0; biases and norms are summed into.
            fresh = torch.empty_like if index % 4 == 0 and whole else torch.zeros_like
            self.grads.append(fresh(param) if need and param is not None else None)
        self.weights = any(gradient is not None for gradient in self.grads[::4])
        widths = [-(-layer.out // library.tile) * library.tile for layer in net.layer[: net.layers]]
        pairs = net.seeds * net.heads
        self.behind = torch.empty(pairs * rows * sum(widths), device="cpu", dtype=torch.float32) if self.weights else None
        self.places = [pairs * rows * sum(widths[:index]) for index in range(net.layers)]
        self.rows, self.tile = rows, library.tile

    def place(self, net: CNet, first: int = 0) -> None:
        """Point a call at this room, its rows of the second kind beginning at ``first``."""
        net.dh_rows = self.rows
        for index in range(net.layers):
            layer = net.layer[index]
            if self.behind is not None:
                layer.dh = self.behind.data_ptr() + 4 * (self.places[index] + first * self.tile)
            for name, gradient in zip(("dweight", "dbias", "dln_weight", "dln_bias"), self.grads[4 * index : 4 * index + 4], strict=True):
                setattr(layer, name, 0 if gradient is None else gradient.data_ptr())


def _is_whole(members: Tensor, params: Sequence[Tensor | None]) -> bool:
    weight = params[0]
    assert weight is not None
    return members.numel() * weight.shape[-1] * weight.shape[-2] == weight.numel()


class _MLP(torch.autograd.Function):
    """The library's networks with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor | None,
        keep: Tensor | None,
        members: Tensor,
        facts: Facts,
        network: Network,
        *params: Tensor | None,
    ) -> Tensor:
        out, saved = _forward(x1, x2, keep, members, facts, any(ctx.needs_input_grad), network)
        ctx.save_for_backward(x1, x2, keep, members, out if facts.simnorm else None, saved, *params)
        ctx.facts, ctx.network = facts, network
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, keep, members, out, saved, *params = ctx.saved_tensors
        if torch.is_grad_enabled() or _mapped(grad):
            return _gradients_of_plain(ctx, x1, x2, keep, members, params, grad)
        library, net, alive = _prepare(x1, x2, keep, members, ctx.facts, ctx.network)
        _place_saved(net, saved, net.seeds * net.heads * net.rows)
        if out is not None:
            net.layer[net.layers - 1].y = out.data_ptr()
        gradients = _Gradients(library, net, net.rows, params, ctx.needs_input_grad[6:], _is_whole(members, params))
        gradients.place(net)
        grad = grad.contiguous()
        dx1, dx2 = (torch.empty_like(x) if need else None for x, need in zip((x1, x2), ctx.needs_input_grad, strict=False))
        net.grad = grad.data_ptr()
        net.dx1, net.dx2 = (0 if dx is None else dx.data_ptr() for dx in (dx1, dx2))
        _call(library.backward_rows, net)
        if gradients.weights:
            _call(library.backward_weights, net)
        del alive
        return dx1, dx2, None, None, None, None, *gradients.grads


def _with_seeds(tensor: Any, dim: int | None, seeds: int) -> Any:
    """Bring the mapped dimension to the front, or repeat what is not mapped."""
    if tensor is None:
        return None
    return (tensor.expand(seeds, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).contiguous()


class _Mapped(torch.autograd.Function):
    """A function that exists under ``torch.vmap`` alone, where the mapped dimension becomes the library's seeds."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        raise AssertionError("a mapped network was called outside of torch.vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _MappedMLP(_Mapped):
    """:class:`_MLP` under ``torch.vmap``."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        seeds, facts = info.batch_size, args[4]
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        x1, x2, keep = (_with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[:3], dims[:3], strict=True))
        members = _with_seeds(args[3], dims[3], seeds)
        params = [_with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[5:], dims[5:], strict=True)]
        # The seed dimension of one seed goes.
        x1, x2, keep = x1[:, 0], None if x2 is None else x2[:, 0], None if keep is None else keep[:, 0]
        own = params[0].shape[1] if params[0].dim() == 4 else 1
        members = (members + own * torch.arange(seeds, device="cpu")[:, None]).contiguous()
        network = _flat_network(params, facts)
        if torch.is_grad_enabled():
            return _MLP.apply(x1, x2, keep, members, facts, network, *params)[:, None], 0  # type: ignore[index]
        return _forward(x1, x2, keep, members, facts, False, network)[0][:, None], 0


class _MappedRollout(_Mapped):
    """:class:`_Rollout` under ``torch.vmap``."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        seeds, facts = info.batch_size, args[2]
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        z, actions = (_with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[:2], dims[:2], strict=True))
        params = [_with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[3:], dims[3:], strict=True)]
        steps = actions[:, :, 0].transpose(0, 1).contiguous()  # [N, T, 1, M, A] -> [T, N, M, A]
        return _Rollout.apply(z[:, 0].contiguous(), steps, facts, _flat_network(params, facts), *params)[:, :, None], 1  # type: ignore[index]


class _Rollout(torch.autograd.Function):
    """A network applied to its own result, with a new second input at every step; the weights' gradients are one product."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, actions: Tensor, facts: Facts, network: Network, *params: Tensor | None) -> Tensor:
        """[S, M, Z], [T, S, M, A] -> [T+1, S, M, Z]."""
        members = _all_members(len(z))
        steps, rows = len(actions), z.shape[0] * z.shape[1]
        zs = z.new_empty(steps + 1, *z.shape)
        zs[0] = z
        library, net, alive = _prepare(zs[0], actions[0], None, members, facts, network)
        saved = z.new_empty(steps * rows * _saved_width(net))
        for step in range(steps):
            net.x1, net.x2, net.out = zs[step].data_ptr(), actions[step].data_ptr(), zs[step + 1].data_ptr()
            _place_saved(net, saved, steps * rows, step * rows)
            _call(library.forward, net)
        del alive
        ctx.save_for_backward(z, zs, actions, members, saved, *params)
        ctx.facts, ctx.network = facts, network
        return zs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, zs, actions, members, saved, *params = ctx.saved_tensors
        if torch.is_grad_enabled() or _mapped(grad):
            return _rollout_gradients_of_plain(ctx, z, actions, params, grad)
        steps, seeds, batch = len(actions), zs.shape[1], zs.shape[2]
        library, net, alive = _prepare(zs[0], actions[0], None, members, ctx.facts, ctx.network)
        # Rows of all steps in one product where they lie side by side, as for one seed.
        together = seeds == 1
        gradients = _Gradients(library, net, steps * batch if together else batch, params, ctx.needs_input_grad[4:], True)
        grad, dz = grad.clone(memory_format=torch.contiguous_format), torch.empty_like(zs[0])
        for step in reversed(range(steps)):
            net.x1, net.x2, net.grad, net.dx1 = (x.data_ptr() for x in (zs[step], actions[step], grad[step + 1], dz))
            _place_saved(net, saved, steps * seeds * batch, step * seeds * batch)
            net.layer[net.layers - 1].y = zs[step + 1].data_ptr()
            gradients.place(net, step * batch if together else 0)
            _call(library.backward_rows, net)
            grad[step] += dz
            if gradients.weights and not together:
                net.accumulate = step < steps - 1
                _call(library.backward_weights, net)
        if gradients.weights and together:
            net.rows = steps * batch
            gradients.place(net)
            _call(library.backward_weights, net)
        del alive
        return grad[0], None, None, None, *gradients.grads


def rollout(z: Tensor, actions: Tensor, network: Network) -> Tensor:
    """Apply a network that ends in SimNorm to its own result: z [..., Z], actions [T, ..., A] without gradient -> [T+1, ..., Z]."""
    first = network.layers[0][0]
    fits = network.groups and first.dim() == 2 and network.layers[-1][0].shape[-2] == z.shape[-1]
    if not fits or not len(actions) or actions.requires_grad or _library_for((z, actions[0]), network) is None:
        return _plain_rollout(z, actions, network)
    rows = z.reshape(1, -1, z.shape[-1]).contiguous()
    steps = actions.reshape(len(actions), 1, -1, actions.shape[-1]).contiguous()
    facts = Facts(1, network.groups, network.strided, torch.is_autocast_enabled("cpu"))
    if _mapped(rows, steps, *network.params):
        zs: Tensor = _MappedRollout.apply(rows, steps, facts, *network.params)  # type: ignore[assignment]
    else:
        zs = _Rollout.apply(rows, steps, facts, network, *network.params)  # type: ignore[assignment]
    return zs.view(len(actions) + 1, *z.shape)


def _plain_rollout(z: Tensor, actions: Tensor, network: Network) -> Tensor:
    zs = [z]
    for action in actions:
        zs.append(_plain((zs[-1], action), network, None, None))
    return torch.stack(zs)


def _rollout_gradients_of_plain(ctx: Any, z: Tensor, actions: Tensor, params: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by PyTorch's own functions."""
    with torch.enable_grad():
        outputs = [_plain_rollout(z[seed], actions[:, seed], _network_of_seed(params, seed, len(z), ctx.facts)) for seed in range(len(z))]
        return _differentiate(ctx, torch.stack(outputs, 1), (z, None, None, None, *params), grad)


def _flat_network(params: Sequence[Any], facts: Facts) -> Network:
    return Network([tuple(params[index : index + 4]) for index in range(0, len(params), 4)], facts.simnorm, facts.strided)  # type: ignore[misc]


def _network_of_seed(params: Sequence[Any], seed: int, seeds: int, facts: Facts) -> Network:
    """Parameters of one seed; those of a single seed are not stacked."""
    return _flat_network([param if param is None or seeds == 1 else param[seed] for param in params], facts)


def _differentiate(ctx: Any, out: Tensor, inputs: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed and x is not None]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=not _mapped(grad)))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


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
    one = _all_members(1)
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
    if _mapped(z, actions, eps, nets.dynamics.layers[0][0]) or z.stride(1) != 0 or not _plain_float(nets.support) or not _plain_float(eps):
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
    _call(library.returns, call)
    del alive
    return out


def _gradients_of_plain(
    ctx: Any, x1: Tensor, x2: Tensor | None, keep: Tensor | None, members: Tensor, params: Sequence[Any], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by PyTorch's own functions."""
    facts: Facts = ctx.facts
    seeds = len(x1)
    chosen = members.view(seeds, facts.heads)
    outputs = []
    with torch.enable_grad():
        for seed in range(seeds):
            network = _network_of_seed(params, seed, seeds, facts)
            parts = [part[seed] for part in (x1, x2) if part is not None]
            if network.layers[0][0].dim() == 2:
                out = _plain(parts, network, None, None if keep is None else keep[seed, 0])[None]
            else:
                out = _plain(parts, network, chosen[seed] - seed * network.members, None if keep is None else keep[seed])
            outputs.append(out)
        return _differentiate(ctx, torch.stack(outputs), (x1, x2, None, None, None, None, *params), grad)
