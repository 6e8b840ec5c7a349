"""Parameters in the order in which the library of :mod:`worldmpc.models.native` reads them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.models.native import CNet


class Facts(NamedTuple):
    """What a network is, apart from its parameters."""

    heads: int
    """Members evaluated on the same input, Q."""
    simnorm: int
    """Width of the groups of the SimNorm behind the last LayerNorm; 0: the last layer is linear."""
    strided: bool
    bf16: bool


class Packed(NamedTuple):
    """A network's parameters as the library reads them, and room for their packed forms."""

    net: CNet
    room: Tensor
    flags: ctypes.Array[ctypes.c_uint8]
    """Whether the room holds the present parameters, per layer, direction and member."""
    keep_alive: tuple[object, ...]

    def forget(self) -> None:
        """Have the library pack anew."""
        ctypes.memset(self.flags, 0, len(self.flags))


class _Scope:
    """What has been packed within :func:`constant_parameters`."""

    def __init__(self) -> None:
        self.packed: dict[tuple[object, ...], Packed] = {}


class _Scopes(threading.local):
    """The scope of each thread, and memory of its earlier ones, by size: new memory would come from the system each time, page by page."""

    def __init__(self) -> None:
        self.now: _Scope | None = None
        self.rooms: dict[int, list[Tensor]] = {}


_scopes = _Scopes()


def current_scope() -> _Scope | None:
    """Return the scope of constant parameters that this thread is in."""
    return _scopes.now


@contextmanager
def constant_parameters() -> Iterator[None]:
    """Promise that no parameter changes inside, so that each network is packed once; backward passes belong inside."""
    if _scopes.now is not None:
        yield
        return
    scope = _scopes.now = _Scope()
    try:
        yield
    finally:
        for made in scope.packed.values():
            _scopes.rooms.setdefault(made.room.numel(), []).append(made.room)
        scope.packed.clear()
        _scopes.now = None


def packed(params: Sequence[Tensor | None], facts: Facts, split: int, panel: int) -> Packed:
    """Return a network's parameters ready for the library: per layer weight [members, out, in], bias, LayerNorm weight and bias or None.

    ``split``: columns of the first part of the input; ``panel``: of the library.
    """
    if _scopes.now is None:
        return pack(params, facts, panel)
    known = _scopes.now.packed
    key = (facts, split, *((0, None) if param is None else (param.data_ptr(), param.shape) for param in params))
    made = known.get(key)
    if made is None:
        made = known[key] = pack(params, facts, panel, _scopes.rooms)
    return made


def pack(params: Sequence[Tensor | None], facts: Facts, panel: int, rooms: Mapping[int, list[Tensor]] = MappingProxyType({})) -> Packed:
    """Do what :func:`packed` does, in room of its own, or in that of an earlier scope."""
    net = CNet()
    net.layers, net.simnorm, net.strided, net.bf16 = len(params) // 4, facts.simnorm, facts.strided, facts.bf16
    first = params[0]
    assert first is not None
    members = first.numel() // (first.shape[-1] * first.shape[-2])
    flags = (ctypes.c_uint8 * (2 * net.layers * members))()
    sizes = []
    for index in range(net.layers):
        weight = params[4 * index]
        assert weight is not None
        out, in_ = weight.shape[-2:]
        # As mlp.c counts: panels of columns, each with the bias and room to pad both parts of the input.
        sizes += [members * (in_ + 34) * _up(out, panel), members * out * (_up(in_, panel) + panel)]
    free = rooms.get(sum(sizes))
    room = free.pop() if free else torch.empty(sum(sizes), device="cpu", dtype=torch.float32)
    offset = 0
    for index in range(net.layers):
        layer = net.layer[index]
        weight, bias, ln_weight, ln_bias = params[4 * index : 4 * index + 4]
        assert weight is not None and bias is not None
        layer.weight, layer.bias = weight.data_ptr(), bias.data_ptr()
        if ln_weight is not None and ln_bias is not None:
            layer.ln_weight, layer.ln_bias = ln_weight.data_ptr(), ln_bias.data_ptr()
        layer.out, layer.in_ = weight.shape[-2:]
        layer.packed = room.data_ptr() + 4 * offset
        layer.packed_back = layer.packed + 4 * sizes[2 * index]
        offset += sizes[2 * index] + sizes[2 * index + 1]
        layer.ready = ctypes.addressof(flags) + 2 * index * members
        layer.ready_back = layer.ready + members
    return Packed(net, room, flags, tuple(params))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
