"""Process-wide settings that make PyTorch fast: memory allocator and threads."""

from __future__ import annotations

import ctypes
import sys

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


def set_threads(threads: int) -> None:
    """Use this many CPU threads in torch; 0 leaves torch's own choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def suggested_threads(width: int | None) -> int:
    """Return how many CPU threads pay for networks of this width: one per 64 units, at least 2, at most what torch offers.

    More threads than work spend their time waiting for each other, and slow down whatever else runs on the machine.
    """
    import torch

    return min(torch.get_num_threads(), max(2, (width or 0) // 64))


def resolve_device(name: str) -> str:
    """Return ``cuda`` or ``cpu`` for ``auto``, else the given name.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    import torch

    from worldmpc.config import ConfigError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: '{name}' asked for, but this machine has no usable CUDA device; use device=cpu or device=auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: cannot use '{name}': {str(error).splitlines()[0]}") from error
    return name
