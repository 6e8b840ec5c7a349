"""Networks of Linear, LayerNorm and Mish layers as lists of parameters, and what they compute, in PyTorch's functions."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmpc.models import native, packing
from worldmpc.models.packing import Facts

NORM_EPS = 1e-5
"""What LayerNorm adds to the variance; ``mlp.c`` has it as well."""

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Weight [out, in], bias [out], and weight and bias of the LayerNorm [out], or None where neither it nor Mish follow; with a
leading dimension ``Q`` for networks of equal shape on the same input."""


class Network:
    """Parameters of a network, or of ``Q`` on the same input, and what has been found out about them.

    Args:
        layers: parameters, with or without ``Q``.
        groups: width of the groups of the SimNorm that takes the place of the last layer's Mish; 0: the last layer is linear.
        strided: layout of these groups.
        lasting: keep the room for packed parameters from scope to scope.
    """

    def __init__(self, layers: Sequence[Layer], groups: int = 0, strided: bool = False, lasting: bool = False) -> None:
        self.layers, self.groups, self.strided, self.lasting = layers, groups, strided, lasting
        self._fits: dict[int, bool] = {}
        self._packed: dict[tuple[Facts, int], packing.Packed] = {}
        self._scope: object = None
        self._thread: int | None = None
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

    def packed(self, facts: Facts, split: int, panel: int) -> packing.Packed:
        """Return it packed for the library: once in every scope of constant parameters, each time outside of them."""
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if thread != self._thread:  # as a backward pass may be in another one, while this one uses the room
            return packing.pack(self.params, facts, panel)
        scope = packing.current_scope()
        if scope is not self._scope or scope is None:
            self._scope = scope
            if self.lasting:
                for made in self._packed.values():
                    made.forget()
            else:
                self._packed = {}
        key = facts, split
        if key not in self._packed:
            own = self.lasting  # others share the room of their scope
            self._packed[key] = packing.pack(self.params, facts, panel) if own else packing.packed(self.params, facts, split, panel)
        return self._packed[key]


class _Known(threading.local):
    """Networks of modules that :func:`network_of` has found out about, in each thread."""

    def __init__(self) -> None:
        self.networks: WeakKeyDictionary[nn.Module, dict[bool, _Entry]] = WeakKeyDictionary()


_Place = tuple[int, torch.Size, torch.dtype] | None
"""Where a contiguous parameter is and what."""


class _Entry(NamedTuple):
    first: Tensor
    params: list[Tensor | None]
    places: list[_Place]
    network: Network
    scope: object


_known = _Known()


def network_of(
    owner: nn.Module, first: Tensor, frozen: bool, layers: Callable[[], Sequence[Layer]], groups: int = 0, strided: bool = False
) -> Network:
    """Return a module's network; found out about anew only where its parameters are other tensors, or elsewhere, than last time.

    Within a scope of constant parameters only ``first``, its first parameter now, is looked at. ``frozen``: ``layers`` have no gradient.
    """
    if torch.compiler.is_compiling() or not plain_float(first) or is_wrapped(first):
        return Network(layers(), groups, strided)
    scope, entries = packing.current_scope(), _known.networks.get(owner)
    entry = None if entries is None else entries.get(frozen)
    if entry is not None and (entry.network.groups, entry.network.strided) != (groups, strided):
        entry = None
    if entry is not None and entry.first is first and scope is not None and entry.scope is scope:
        return entry.network
    params = _parameters(owner, [])
    known = entry is not None and len(params) == len(entry.params) and all(map(operator.is_, params, entry.params))
    if not known and any(part is not None and is_wrapped(part) for part in params):
        return Network(layers(), groups, strided)
    places = _places(params)
    if places is None:
        return Network(layers(), groups, strided)
    if entry is not None and known and places == entry.places:
        network = entry.network
    else:
        now = layers()
        # Weights that are computed from parameters have to be computed anew each time.
        own = {place[0] for place in places if place is not None}
        if any(part is not None and part.data_ptr() not in own for layer in now for part in layer):
            return Network(now, groups, strided)
        network = Network(now, groups, strided, lasting=True)
    _known.networks.setdefault(owner, {})[frozen] = _Entry(first, params, places, network, scope)
    return network


def _places(params: Sequence[Tensor | None]) -> list[_Place] | None:
    """Return where parameters are, or None where one is not contiguous."""
    found: list[_Place] = []
    for part in params:
        if part is not None and not part.is_contiguous():
            return None
        found.append(None if part is None else (part.data_ptr(), part.shape, part.dtype))
    return found


def _parameters(module: nn.Module, found: list[Tensor | None]) -> list[Tensor | None]:
    """Collect the parameters of a module and its children; ``parameters()`` takes ten times longer."""
    found += module._parameters.values()
    for child in module._modules.values():
        if child is not None:
            _parameters(child, found)
    return found


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for others within torch.func's transforms, and has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


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
        elif ln_weight.shape != shape or ln_bias.shape != shape or not (plain_float(ln_weight) and plain_float(ln_bias)):
            return False
        if not (plain_float(weight) and plain_float(bias)):
            return False
        width = shape[-1]
    # A LayerNorm in the end comes with SimNorm, and SimNorm with whole groups.
    return (layers[last][2] is None) == (groups == 0) and (groups == 0 or width % groups == 0)


def plain_float(tensor: Tensor) -> bool:
    """Return whether a tensor is what the library takes: float32 on the CPU."""
    return tensor.dtype is torch.float32 and tensor.is_cpu


def flat_network(params: Sequence[Any], facts: Facts) -> Network:
    """Return the network of parameters that come one after the other, four per layer."""
    return Network([tuple(params[index : index + 4]) for index in range(0, len(params), 4)], facts.simnorm, facts.strided)  # type: ignore[misc]


def network_of_seed(params: Sequence[Any], seed: int, seeds: int, facts: Facts) -> Network:
    """Parameters of one seed; those of a single seed are not stacked."""
    return flat_network([param if param is None or seeds == 1 else param[seed] for param in params], facts)


def simnorm(x: Tensor, width: int, strided: bool) -> Tensor:
    """Softmax within groups of ``width`` entries, neighbours or strided: [..., Z] -> [..., Z]."""
    if strided:
        return x.unflatten(-1, (width, -1)).softmax(-2).flatten(-2)
    return x.unflatten(-1, (-1, width)).softmax(-1).flatten(-2)


def plain(parts: Sequence[Tensor], network: Network, heads: Tensor | None, keep: Tensor | None) -> Tensor:
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


def plain_rollout(z: Tensor, actions: Tensor, network: Network) -> Tensor:
    """Apply a network to its own result: [..., Z], [T, ..., A] -> [T+1, ..., Z]."""
    zs = [z]
    for action in actions:
        zs.append(plain((zs[-1], action), network, None, None))
    return torch.stack(zs)
