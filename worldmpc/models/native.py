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
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

MAX_LAYERS = 8
MAX_GROUPS = 8
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
        *((name, ctypes.c_int64) for name in ("envs", "samples", "horizon", "actions_dim", "bins", "hard", "clipped", "threads")),
        *((name, ctypes.c_float) for name in ("discount", "log_std_min", "log_std_max")),
        *((name, Pointer) for name in ("z", "actions", "eps", "support", "out")),
    ]


class CTwoHot(ctypes.Structure):
    """``TwoHot`` of ``heads.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "bins", "threads")),
        *((name, ctypes.c_float) for name in ("vmin", "vmax", "width")),
        *((name, Pointer) for name in ("support", "logits", "x", "grad", "out", "saved", "dlogits")),
    ]


class CGaussian(ctypes.Structure):
    """``Gaussian`` of ``heads.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "dims", "threads")),
        *((name, ctypes.c_float) for name in ("log_std_min", "log_std_max")),
        *((name, Pointer) for name in ("raw", "eps", "action", "mean", "log_std", "log_prob", "scaled")),
        *((name, Pointer) for name in ("d_action", "d_mean", "d_log_std", "d_log_prob", "d_scaled", "d_raw")),
    ]


class CGroup(ctypes.Structure):
    """``Group`` of ``adam.h``."""

    _fields_ = [("size", ctypes.c_int64), *((name, Pointer) for name in ("param", "exp_avg", "exp_avg_sq", "grad", "step", "lr"))]


class CAdam(ctypes.Structure):
    """``Adam`` of ``adam.h``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "seeds", "threads")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps", "clip")),
        *((name, Pointer) for name in ("skip", "norm", "skipped")),
        ("group", CGroup * MAX_GROUPS),
    ]


class Library(NamedTuple):
    """The loaded functions, and what the processor can do."""

    forward: Callable[[CNet], int]
    backward_rows: Callable[[CNet], int]
    backward_weights: Callable[[CNet], int]
    returns: Callable[[CReturns], int]
    proposals: Callable[[CReturns], int]
    two_hot_values: Callable[[CTwoHot], None]
    two_hot_values_back: Callable[[CTwoHot], None]
    two_hot_losses: Callable[[CTwoHot], None]
    two_hot_losses_back: Callable[[CTwoHot], None]
    gaussian: Callable[[CGaussian], None]
    gaussian_back: Callable[[CGaussian], None]
    adam: Callable[[CAdam], int]
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


_FUNCTIONS: dict[str, type[ctypes.Structure]] = {
    "forward": CNet,
    "backward_rows": CNet,
    "backward_weights": CNet,
    "returns": CReturns,
    "proposals": CReturns,
    "two_hot_values": CTwoHot,
    "two_hot_values_back": CTwoHot,
    "two_hot_losses": CTwoHot,
    "two_hot_losses_back": CTwoHot,
    "gaussian": CGaussian,
    "gaussian_back": CGaussian,
    "adam": CAdam,
}


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
    if not hasattr(loaded, "worldmpc_sizes") or loaded.worldmpc_sizes() != sum(map(ctypes.sizeof, (CReturns, CTwoHot, CGaussian, CAdam))):
        raise Unavailable("compiled from another version of worldmpc; install worldmpc again")
    functions: dict[str, Any] = {}
    for verb, argument in _FUNCTIONS.items():
        function = getattr(loaded, f"worldmpc_{verb}")
        function.argtypes, function.restype = [ctypes.POINTER(argument)], None if argument in (CTwoHot, CGaussian) else ctypes.c_int
        functions[verb] = function
    return Library(
        **functions,
        panel=int(loaded.worldmpc_panel()),
        tile=int(loaded.worldmpc_tile()),
        bf16=bool(loaded.worldmpc_bf16()),
        name=name,
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
