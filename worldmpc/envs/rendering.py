"""Off-screen rendering: which MuJoCo backend works on this machine.

``MUJOCO_GL`` names the backend. Making an environment with ``render=True`` calls :func:`configure_rendering`; nothing here
happens at import, and training without frames needs none of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache

_PROBE = """
import mujoco
with mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 1'/></worldbody></mujoco>"), 8, 8) as renderer:
    renderer.render()
"""
_TIMEOUT = 30  # seconds; a first start of MuJoCo on a cold disk takes several


@lru_cache(maxsize=1)
def rendering_backend() -> str | None:
    """Return a value of ``MUJOCO_GL`` that renders here (``egl``, ``osmesa`` or ``glfw``), or None.

    Each candidate draws one frame in a process of its own, so that a broken driver cannot harm this one. About a second, once.
    """
    candidates = ["egl", "osmesa"]
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        candidates.append("glfw")
    return next((backend for backend in candidates if _renders(backend)), None)


def configure_rendering() -> str | None:
    """Set ``MUJOCO_GL`` to a backend that works, unless the user has set it, and return the backend or None.

    Where none works it is set to ``disabled``; rendering then fails with a clear error. Our environments follow it at any time;
    code that imports mujoco itself reads it at that import, so a program that renders by itself calls this first.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is None:
        chosen = rendering_backend() or "disabled"
        os.environ["MUJOCO_GL"] = chosen
    return None if chosen.lower() in ("off", "disable", "disabled", "false", "0") else chosen


def rendering_hint() -> str:
    """Return one line for an error message of a failed render."""
    current = os.environ.get("MUJOCO_GL", "not set")
    return f"MUJOCO_GL is {current}; rendering without a screen needs MUJOCO_GL=egl (libegl1, libgl1-mesa-dri) or osmesa (libosmesa6)"


def _renders(backend: str) -> bool:
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
