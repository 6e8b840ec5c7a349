"""What made a result: machine, versions, commit and command, without names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def machine_info() -> dict[str, Any]:
    """Return cpu, cores, ram_gib, gpu, os, python, torch and cuda of this machine; ``None`` for what it does not have."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": _ram_gib(),
        "gpu": " + ".join(gpus) or None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def machine_line(info: Mapping[str, Any] | str | None) -> str:
    """Return :func:`machine_info` as one line for headers of result files; text is passed through."""
    if not info:
        return "unknown"
    if isinstance(info, str):
        return info
    parts = [str(info.get("cpu") or "unknown CPU")]
    parts += [f"{info['cores']} cores"] if info.get("cores") else []
    parts += [f"{info['ram_gib']} GiB"] if info.get("ram_gib") else []
    parts.append(str(info.get("gpu") or "no GPU"))
    parts += [f"{name} {info[name]}" for name in ("python", "torch") if info.get(name)]
    return ", ".join(parts)


def git_commit(folder: Path = PACKAGE) -> str | None:
    """Return the commit of the code in ``folder``, ``-dirty`` appended where files there differ from it.

    ``None`` outside a repository, without git, or where the enclosing repository does not track the folder
    (an installed package inside some other project's virtual environment).
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else commit


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command that started this process (or ``argv``), absolute paths made relative or cut to their last part."""
    words = list(sys.argv if argv is None else argv)
    program, arguments = Path(words[0]), words[1:]
    start = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([start, *(shlex.quote(_relative(argument)) for argument in arguments)])


def _relative(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    value = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return f"{name}{equals}{value}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    # Windows has no sysconf.
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
