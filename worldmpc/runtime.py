"""Process-wide settings that make PyTorch fast: memory allocator and threads."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

from worldmpc.config import ConfigError, RunConfig, lookup

DEVICES = re.compile(r"cpu|mps|cuda(:[0-9]+)?")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for reuse instead of returning it to the system; tell whether that worked.

    Without this, every temporary tensor above 128 KiB costs fresh page faults, which takes longer than the arithmetic on
    it. Elsewhere than on Linux with glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 1 << 30, _M_TOP_PAD: 64 << 20}  # bytes
    return all(mallopt(name, value) for name, value in settings.items())


def check_modes(config: RunConfig, device: str) -> None:
    """Refuse fast modes that this machine does not have, naming the slower one that works.

    Raises:
        ConfigError: compile without a C++ compiler, CUDA graphs without CUDA, bf16 where PyTorch cannot.
    """
    import torch

    kind = torch.device(device).type
    if config.cuda_graph and kind != "cuda":
        raise ConfigError(f"cuda_graph: needs device=cuda, this run is on {kind}; leave it out")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile chooses
    if config.compile and kind == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(f"compile: needs a C++ compiler, and {compiler} was not found; leave it out, or install one")
    for key in ("planner.precision", "train.precision"):
        if lookup(config, key) == "bf16" and kind == "mps":
            raise ConfigError(f"{key}: bf16 is not supported on {kind}; use fp32")
        if lookup(config, key) == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(f"{key}: this GPU has no bfloat16 arithmetic; use fp32")


def keep_compiled_code() -> None:
    """Let torch.compile keep its results in the user's cache folder, where the next run finds them; the system's temporary one is emptied.

    ``TORCHINDUCTOR_CACHE_DIR`` in the environment goes first.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / "worldmpc" / "inductor"))


def set_threads(threads: int) -> None:
    """Use this many CPU threads in torch; 0 leaves torch's own choice.

    Raises:
        ConfigError: a number that cannot be.
    """
    if threads < 0:
        raise ConfigError(f"threads: expected 0 or more, got {threads}")
    _offered_threads()
    if threads:
        import torch

        torch.set_num_threads(threads)


def suggested_threads(width: int | None) -> int:
    """Return how many CPU threads pay for networks of this width: one per 64 units, at least 2, at most what torch began with.

    More threads than work spend their time waiting for each other, and slow down whatever else runs on the machine.
    """
    return min(_offered_threads(), max(2, (width or 0) // 64))


@lru_cache(maxsize=1)
def _offered_threads() -> int:
    """Return how many threads torch had before anything here changed that, so that runs of one process do not limit each other."""
    import torch

    return torch.get_num_threads()


def resolve_device(name: str, key: str = "device") -> str:
    """Return ``cuda`` or ``cpu`` for ``auto``, else the given name; ``key`` is the configuration key that errors name.

    Raises:
        ConfigError: no device that networks can run on, or one that this machine does not have.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not DEVICES.fullmatch(name):
        raise ConfigError(f"{key}: expected auto, cpu, cuda, cuda:<index> or mps, got {name!r}")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"{key}: '{name}' asked for, but this machine has no usable CUDA device; use {key}=cpu or {key}=auto")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ConfigError(f"{key}: 'mps' asked for, but this machine has no Metal device; use {key}=cpu or {key}=auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{key}: cannot use '{name}': {str(error).splitlines()[0]}") from error
    return name
