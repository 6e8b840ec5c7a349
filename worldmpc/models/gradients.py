"""Networks by the library of :mod:`worldmpc.models.native` as functions that autograd and ``torch.vmap`` can go through."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch._utils import _unflatten_dense_tensors

from worldmpc.models import native
from worldmpc.models.native import CNet
from worldmpc.models.networks import Network, flat_network, network_of_seed, plain, plain_rollout
from worldmpc.models.packing import Facts


@lru_cache
def all_members(number: int) -> Tensor:
    """0, 1, ..., as int64 on the CPU."""
    with torch.inference_mode(False):
        return torch.arange(number, device="cpu")


def transforming() -> bool:
    """Return whether a transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def transforms_are_one_vmap() -> bool:
    """Return whether no transform of torch.func is active, or torch.vmap alone, for which the functions below have rules."""
    if not transforming():
        return True
    active = pyfunctorch.retrieve_all_functorch_interpreters()
    return len(active) == 1 and isinstance(active[0], pyfunctorch.VmapInterpreter)


def mapped(*tensors: Tensor | None) -> bool:
    """Return whether one of them stands for a batch, under torch.func or in ``torch.autograd.grad(..., is_grads_batched=True)``."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(wrapped(tensor) or batched(tensor) for tensor in tensors if tensor is not None)


def evaluate(x1: Tensor, x2: Tensor | None, keep: Tensor | None, members: Tensor, facts: Facts, network: Network) -> Tensor:
    """Evaluate networks with a gradient where one is wanted, within ``torch.vmap`` as well.

    Args:
        x1: [1, M1, in_1], contiguous like all others, the first part of the input; each of its rows counts for M / M1 rows.
        x2: [1, M, in_2] the second part, or None.
        keep: [1, Q, M, hidden] dropout factors, or None.
        members: [Q] int64.
        facts: of the network.
        network: fits the input.

    Returns:
        [1, Q, M, out].
    """
    if mapped(x1, x2, keep, members) or (transforming() and mapped(*network.params)):
        return _MappedMLP.apply(x1, x2, keep, members, facts, *network.params)  # type: ignore[return-value]
    if torch.is_grad_enabled():
        return _MLP.apply(x1, x2, keep, members, facts, network, *network.params)  # type: ignore[return-value]
    return _forward(x1, x2, keep, members, facts, False, network)[0]


def evaluate_rollout(z: Tensor, actions: Tensor, facts: Facts, network: Network) -> Tensor:
    """Apply a network to its own result: z [1, M, Z], actions [T, 1, M, A] -> [T+1, 1, M, Z]; see :func:`evaluate`."""
    if mapped(z, actions) or (transforming() and mapped(*network.params)):
        return _MappedRollout.apply(z, actions, facts, *network.params)  # type: ignore[return-value]
    return _Rollout.apply(z, actions, facts, network, *network.params)  # type: ignore[return-value]


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


def invoke(function: Any, argument: Any) -> None:
    """Call a function of the library.

    Raises:
        MemoryError: it found none.
    """
    if function(argument):
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
    invoke(library.forward, net)
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

    def __init__(self, library: native.Library, net: CNet, rows: int, params: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        # Zeros, as biases and norms are summed into, and weights of members that are not evaluated stay so; one after the other, as in
        # the optimiser, which then need not collect them.
        wanted = [param for param, need in zip(params, needed, strict=True) if need and param is not None]
        room = torch.zeros(sum(param.numel() for param in wanted), device="cpu", dtype=torch.float32)
        views = iter(_unflatten_dense_tensors(room, wanted) if wanted else ())
        self.grads = [next(views) if need and param is not None else None for param, need in zip(params, needed, strict=True)]
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
        if torch.is_grad_enabled() or mapped(grad):
            return _gradients_of_plain(ctx, x1, x2, keep, members, params, grad)
        library, net, alive = _prepare(x1, x2, keep, members, ctx.facts, ctx.network)
        _place_saved(net, saved, net.seeds * net.heads * net.rows)
        if out is not None:
            net.layer[net.layers - 1].y = out.data_ptr()
        gradients = _Gradients(library, net, net.rows, params, ctx.needs_input_grad[6:])
        gradients.place(net)
        grad = grad.contiguous()
        dx1, dx2 = (torch.empty_like(x) if need else None for x, need in zip((x1, x2), ctx.needs_input_grad, strict=False))
        net.grad = grad.data_ptr()
        net.dx1, net.dx2 = (0 if dx is None else dx.data_ptr() for dx in (dx1, dx2))
        invoke(library.backward_rows, net)
        if gradients.weights:
            invoke(library.backward_weights, net)
        del alive
        return dx1, dx2, None, None, None, None, *gradients.grads


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
            network = network_of_seed(params, seed, seeds, facts)
            parts = [part[seed] for part in (x1, x2) if part is not None]
            if network.layers[0][0].dim() == 2:
                out = plain(parts, network, None, None if keep is None else keep[seed, 0])[None]
            else:
                out = plain(parts, network, chosen[seed] - seed * network.members, None if keep is None else keep[seed])
            outputs.append(out)
        return differentiate(ctx, torch.stack(outputs), (x1, x2, None, None, None, None, *params), grad)


class _Rollout(torch.autograd.Function):
    """A network applied to its own result, with a new second input at every step; the weights' gradients are one product."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, actions: Tensor, facts: Facts, network: Network, *params: Tensor | None) -> Tensor:
        """[S, M, Z], [T, S, M, A] -> [T+1, S, M, Z]."""
        members = all_members(len(z))
        steps, rows = len(actions), z.shape[0] * z.shape[1]
        zs = z.new_empty(steps + 1, *z.shape)
        zs[0] = z
        library, net, alive = _prepare(zs[0], actions[0], None, members, facts, network)
        saved = z.new_empty(steps * rows * _saved_width(net))
        for step in range(steps):
            net.x1, net.x2, net.out = zs[step].data_ptr(), actions[step].data_ptr(), zs[step + 1].data_ptr()
            _place_saved(net, saved, steps * rows, step * rows)
            invoke(library.forward, net)
        del alive
        ctx.save_for_backward(z, zs, actions, members, saved, *params)
        ctx.facts, ctx.network = facts, network
        return zs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, zs, actions, members, saved, *params = ctx.saved_tensors
        if torch.is_grad_enabled() or mapped(grad):
            return _rollout_gradients_of_plain(ctx, z, actions, params, grad)
        steps, seeds, batch = len(actions), zs.shape[1], zs.shape[2]
        library, net, alive = _prepare(zs[0], actions[0], None, members, ctx.facts, ctx.network)
        # Rows of all steps in one product where they lie side by side, as for one seed.
        together = seeds == 1
        gradients = _Gradients(library, net, steps * batch if together else batch, params, ctx.needs_input_grad[4:])
        grad, dz = grad.clone(memory_format=torch.contiguous_format), torch.empty_like(zs[0])
        for step in reversed(range(steps)):
            net.x1, net.x2, net.grad, net.dx1 = (x.data_ptr() for x in (zs[step], actions[step], grad[step + 1], dz))
            _place_saved(net, saved, steps * seeds * batch, step * seeds * batch)
            net.layer[net.layers - 1].y = zs[step + 1].data_ptr()
            gradients.place(net, step * batch if together else 0)
            invoke(library.backward_rows, net)
            grad[step] += dz
            if gradients.weights and not together:
                net.accumulate = step < steps - 1
                invoke(library.backward_weights, net)
        if gradients.weights and together:
            net.rows = steps * batch
            gradients.place(net)
            invoke(library.backward_weights, net)
        del alive
        return grad[0], None, None, None, *gradients.grads


def _rollout_gradients_of_plain(ctx: Any, z: Tensor, actions: Tensor, params: Sequence[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by PyTorch's own functions."""
    with torch.enable_grad():
        outputs = [plain_rollout(z[seed], actions[:, seed], network_of_seed(params, seed, len(z), ctx.facts)) for seed in range(len(z))]
        return differentiate(ctx, torch.stack(outputs, 1), (z, None, None, None, *params), grad)


def differentiate(
    ctx: Any, out: Tensor | Sequence[Tensor], inputs: Sequence[Tensor | None], grad: Tensor | Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients that a function's context asks for, such that they can be differentiated again."""
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed and x is not None]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=not mapped(*([grad] if isinstance(grad, Tensor) else grad))))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def with_seeds(tensor: Any, dim: int | None, seeds: int) -> Any:
    """Bring the mapped dimension to the front, or repeat what is not mapped."""
    if tensor is None:
        return None
    return (tensor.expand(seeds, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).contiguous()


class Mapped(torch.autograd.Function):
    """A function that exists under ``torch.vmap`` alone, where the mapped dimension becomes the library's seeds."""

    @staticmethod
    def forward(*args: Any) -> Any:
        """Cannot be reached."""
        raise AssertionError("a mapped network was called outside of torch.vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Do nothing, as the mapped rule calls a function with a context of its own."""


class _MappedMLP(Mapped):
    """:class:`_MLP` under ``torch.vmap``."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        seeds, facts = info.batch_size, args[4]
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        x1, x2, keep = (with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[:3], dims[:3], strict=True))
        members = with_seeds(args[3], dims[3], seeds)
        params = [with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[5:], dims[5:], strict=True)]
        # The seed dimension of one seed goes.
        x1, x2, keep = x1[:, 0], None if x2 is None else x2[:, 0], None if keep is None else keep[:, 0]
        own = params[0].shape[1] if params[0].dim() == 4 else 1
        members = (members + own * torch.arange(seeds, device="cpu")[:, None]).contiguous()
        network = flat_network(params, facts)
        if torch.is_grad_enabled():
            return _MLP.apply(x1, x2, keep, members, facts, network, *params)[:, None], 0  # type: ignore[index]
        return _forward(x1, x2, keep, members, facts, False, network)[0][:, None], 0


class _MappedRollout(Mapped):
    """:class:`_Rollout` under ``torch.vmap``."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        seeds, facts = info.batch_size, args[2]
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        z, actions = (with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[:2], dims[:2], strict=True))
        params = [with_seeds(tensor, dim, seeds) for tensor, dim in zip(args[3:], dims[3:], strict=True)]
        steps = actions[:, :, 0].transpose(0, 1).contiguous()  # [N, T, 1, M, A] -> [T, N, M, A]
        return _Rollout.apply(z[:, 0].contiguous(), steps, facts, flat_network(params, facts), *params)[:, :, None], 1  # type: ignore[index]
