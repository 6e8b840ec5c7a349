"""Laser hockey: two players, a puck, two goals. Installed with ``pip install 'worldmpc[hockey]'``.

``hockey/vs-weak`` and ``hockey/vs-strong`` play against a scripted opponent; ``-shooting`` or ``-defense`` behind it plays that training
mode, and ``-discrete`` chooses among eight actions.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

from worldmpc.config import ConfigError
from worldmpc.envs.wrappers import SuiteEnv, nearest_name

_OPPONENTS = {"vs-weak": "weak", "vs-strong": "strong"}
_MODES = {"": "NORMAL", "-shooting": "TRAIN_SHOOTING", "-defense": "TRAIN_DEFENSE"}
_ACTIONS = {"": False, "-discrete": True}
TASKS: dict[str, dict[str, Any]] = {
    f"{opponent}{mode}{action}": {"opponent": _OPPONENTS[opponent], "mode": _MODES[mode], "discrete": _ACTIONS[action]}
    for opponent, mode, action in itertools.product(_OPPONENTS, _MODES, _ACTIONS)
}
"""Name -> what :class:`~worldmpc.envs.hockey.env.HockeyEnv` is made with."""


def list_names() -> list[str]:
    """Return the names of all tasks, without the suite's prefix."""
    return list(TASKS)


def resolve(name: str) -> str:
    """Return the canonical form of a name, both without the suite's prefix.

    Raises:
        ConfigError: no such task.
    """
    return nearest_name(name, name.lower().replace("_", "-"), "hockey", TASKS)


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment of a canonical name; ``unlimited`` lifts its time limit.

    Raises:
        ConfigError: the packages that it needs are missing.
    """
    missing = [package for package in ("Box2D", "pettingzoo", *(["pygame"] if render else [])) if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"hockey needs {', '.join(missing)}; install with: pip install 'worldmpc[hockey]'")
    from worldmpc.envs.hockey.env import HockeyEnv

    env = HockeyEnv(**TASKS[name], timed=not unlimited, render_mode="rgb_array" if render else None)
    return SuiteEnv(env, f"hockey/{name}", None if unlimited else env.game.limit + 1)
