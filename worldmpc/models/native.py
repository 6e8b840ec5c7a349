"""Binding of ``csrc/mlp.c``: whole networks on a CPU, without PyTorch's operators between their parts.

The C code is compiled when the package is installed, for several generations of processors; the best library that this processor can
run is loaded when the first network is evaluated. Its threads are those of PyTorch's own OpenMP runtime. Where there is none (no
compiler at installation, another kind of processor or system) :func:`library` says why, and :mod:`worldmpc.models.kernels` uses
PyTorch's functions, which are slower.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LAYERS = 8
Pointer = ctypes.c_void_p


class CLayer(ctypes.Structure):
    """``Layer`` of ``mlp.c``."""

    _fields_ = [
        *((name, Pointer) for name in ("weight", "bias", "ln_weight", "ln_bias", "packed", "packed_back", "ready", "ready_back")),
        *((name, Pointer) for name in ("xhat", "rstd", "y", "dh", "dweight", "dbias", "dln_weight", "dln_bias")),
        ("in_", ctypes.c_int64),
        ("out", ctypes.c_int64),
    ]


class CNet(ctypes.Structure):
    """``Net`` of ``mlp.c``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "seeds", "heads", "rows", "repeat", "d1", "d2")),
        *((name, ctypes.c_int64) for name in ("threads", "simnorm", "strided", "dh_rows", "accumulate", "bf16")),
        *((name, Pointer) for name in ("members", "x1", "x2", "keep", "out", "grad", "dx1", "dx2")),
        ("layer", CLayer * MAX_LAYERS),
    ]


class CReturns(ctypes.Structure):
    """``Returns`` of ``returns.h``."""

    _fields_ = [
        *((name, CNet) for name in ("dynamics", "reward", "policy", "critics", "termination")),
        *((name, ctypes.c_int64) for name in ("envs", "samples", "horizon", "actions_dim", "bins", "hard", "threads")),
        *((name, ctypes.c_float) for name in ("discount", "log_std_min", "log_std_max")),
        *((name, Pointer) for name in ("z", "actions", "eps", "support", "out")),
    ]


class Library(NamedTuple):
    """The loaded functions, and what the processor can do."""

    forward: Callable[[CNet], int]
    backward_rows: Callable[[CNet], int]
    backward_weights: Callable[[CNet], int]
    returns: Callable[[CReturns], int]
    panel: int
    tile: int
    bf16: bool
    name: str


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
VARIANTS = {
    "amx": (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma"),
}
"""Libraries that installation builds, best first, and what a processor needs for each."""


class Unavailable(Exception):
    """Why the library cannot be used here."""


@lru_cache(maxsize=1)
def library() -> Library | str:
    """Load the best library for this processor, or return in words why there is none."""
    try:
        return _load()
    except Unavailable as reason:
        return str(reason)


def _load() -> Library:
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"none for {sys.platform} on {platform.machine()}")
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1).split())  # type: ignore[union-attr]
    fitting = [name for name, needed in VARIANTS.items() if flags.issuperset(needed)]
    if not fitting:
        raise Unavailable("this processor has no AVX2")
    found = [(name, path) for name in fitting for path in Path(__file__).parent.glob(f"_mlp_{name}.*.so")]
    if not found:
        raise Unavailable("not compiled when worldmpc was installed; install a C compiler and worldmpc again")
    _offer_openmp()
    name, path = found[0]
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(str(error)) from error
    if loaded.worldmpc_size() != ctypes.sizeof(CReturns):
        raise Unavailable("compiled from another version of worldmpc; install worldmpc again")
    for function in ("forward", "backward_rows", "backward_weights", "returns"):
        getattr(loaded, f"worldmpc_{function}").argtypes = [ctypes.POINTER(CReturns if function == "returns" else CNet)]
    return Library(
        loaded.worldmpc_forward,
        loaded.worldmpc_backward_rows,
        loaded.worldmpc_backward_weights,
        loaded.worldmpc_returns,
        int(loaded.worldmpc_panel()),
        int(loaded.worldmpc_tile()),
        bool(loaded.worldmpc_bf16()),
        name,
    )


def _offer_openmp() -> None:
    """Make the functions of PyTorch's own OpenMP runtime visible: a second runtime's threads would compete with its own."""
    torch.get_num_threads()
    loaded = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if re.search(r"lib[gi]?omp[-.0-9a-f]*\.so", line)
    }
    for path in sorted(loaded, key=lambda path: "torch" not in path):
        runtime = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        if hasattr(runtime, "GOMP_parallel"):
            return
    raise Unavailable("PyTorch's OpenMP runtime does not offer what GCC needs")


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
    keep_alive: tuple[object, ...]


class _Scopes(threading.local):
    """What :func:`constant_parameters` keeps, in each thread."""

    packed: dict[tuple[object, ...], Packed] | None = None
    networks: dict[tuple[int, bool], tuple[object, object]] | None = None
    """(id of a module, frozen) -> the module and what :mod:`worldmpc.models.kernels` has found out about it."""

    def __init__(self) -> None:
        self.rooms: dict[int, list[Tensor]] = {}
        """Memory of earlier scopes, by size: new memory of this size would come from the system each time, page by page."""


_scopes = _Scopes()


def scope() -> _Scopes:
    """Return this thread's scope."""
    return _scopes


@contextmanager
def constant_parameters() -> Iterator[None]:
    """Promise that no parameter changes inside, so that each network is packed once; backward passes belong inside."""
    outer = _scopes.packed
    if outer is None:
        _scopes.packed, _scopes.networks = {}, {}
    try:
        yield
    finally:
        if outer is None:
            for made in (_scopes.packed or {}).values():
                _scopes.rooms.setdefault(made.room.numel(), []).append(made.room)
            _scopes.packed = _scopes.networks = None


def packed(params: Sequence[Tensor | None], facts: Facts, split: int, panel: int) -> Packed:
    """Return a network's parameters ready for the library: per layer weight [members, out, in], bias, LayerNorm weight and bias or None.

    ``split``: columns of the first part of the input; ``panel``: of the library.
    """
    known = _scopes.packed
    if known is None:
        return _pack(params, facts, panel, {})
    key = (facts, split, *((0, None) if param is None else (param.data_ptr(), param.shape) for param in params))
    made = known.get(key)
    if made is None:
        made = known[key] = _pack(params, facts, panel, _scopes.rooms)
    return made


def _pack(params: Sequence[Tensor | None], facts: Facts, panel: int, rooms: dict[int, list[Tensor]]) -> Packed:
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
    return Packed(net, room, (flags, *params))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
