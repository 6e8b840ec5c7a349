"""How errors reach the user: one line on stderr and an exit status."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from worldmpc.config import ConfigError

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
"""Exit statuses: failure while running, input that cannot be used, Ctrl-C."""


def report_error(error: BaseException) -> int:
    """Say on stderr in one line what went wrong, and return the exit status. ``WORLDMPC_TRACEBACK=1`` adds the traceback."""
    status, message = describe_error(error)
    if os.environ.get("WORLDMPC_TRACEBACK") == "1":
        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"worldmpc: error: {message}\n")
    sys.stderr.flush()
    return status


def describe_error(error: BaseException) -> tuple[int, str]:
    """Return (exit status, one line). The traceback of an error that nobody foresaw is kept in a file that the line names."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, ConfigError | FileNotFoundError) or _is_hydra(error):
        return UNUSABLE, _line(error)
    if isinstance(error, OSError):
        return FAILED, _line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        hint = "lower model.size, loss.batch_size, planner.num_samples or replay.capacity, or set replay.storage_device=cpu"
        return FAILED, f"out of memory: {_line(error).split('. ')[0] or 'no detail'}; {hint}"
    return _describe_own(error)


def _describe_own(error: BaseException) -> tuple[int, str]:
    from worldmpc.envs import EnvError
    from worldmpc.report.runs import RunError
    from worldmpc.training.checkpoint import CheckpointError
    from worldmpc.training.trainer import DivergenceError

    if isinstance(error, RunError):
        return UNUSABLE, _line(error)
    if isinstance(error, CheckpointError):
        # A checkpoint that is missing or damaged is bad input; one that the disk refused is a failure.
        refused = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
        return FAILED if refused else UNUSABLE, _line(error)
    if isinstance(error, EnvError | DivergenceError):
        return FAILED, _line(error)
    with tempfile.NamedTemporaryFile("w", prefix="worldmpc-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return FAILED, f"unexpected {type(error).__name__}: {_line(error)} (please report it; the traceback is in {file.name})"


def _is_hydra(error: BaseException) -> bool:
    # By name, so that a command without Hydra need not import it.
    return any(f"{kind.__module__}.".startswith(("hydra.errors.", "omegaconf.errors.")) for kind in type(error).__mro__)


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    if type(error).__module__.startswith("omegaconf."):
        text = text.partition("\n")[0]  # what follows are names of its inner workings
    return " ".join(text.split())
