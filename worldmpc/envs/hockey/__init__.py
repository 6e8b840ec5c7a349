"""Laser hockey: two players, a puck, two goals. Installed with ``pip install 'worldmpc[hockey]'``.

``hockey/vs-weak`` and ``hockey/vs-strong`` play against a scripted opponent; in ``hockey/self-play``, which is ``hockey`` for short, two
learn or play (:mod:`worldmpc.envs.two_player`). ``-shooting`` or ``-defense`` behind it plays that training mode, with ``-nokeep`` rackets
do not catch the puck, and ``-discrete`` chooses among eight actions, seven without catching.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import TYPE_CHECKING, Any

from worldmpc.config import ConfigError
from worldmpc.envs.wrappers import SuiteEnv, nearest_name

if TYPE_CHECKING:
    from worldmpc.envs.hockey.env import HockeyEnv, HockeyParallelEnv

DEFAULT = "self-play"
_OPPONENTS = {"vs-weak": "weak", "vs-strong": "strong", "self-play": None}
_MODES = {"": "NORMAL", "-shooting": "TRAIN_SHOOTING", "-defense": "TRAIN_DEFENSE"}
_KEEP = {"": True, "-nokeep": False}
_ACTIONS = {"": False, "-discrete": True}
TASKS: dict[str, dict[str, Any]] = {
    f"{opponent}{mode}{keep}{action}": {
        "opponent": _OPPONENTS[opponent],
        "mode": _MODES[mode],
        "keep_mode": _KEEP[keep],
        "discrete": _ACTIONS[action],
    }
    for opponent, mode, keep, action in itertools.product(_OPPONENTS, _MODES, _KEEP, _ACTIONS)
}
"""Name -> what :class:`~worldmpc.envs.hockey.env.HockeyEnv` is made with; without an opponent the other of both environments."""


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
    check_packages("hockey", render)
    from worldmpc.envs.hockey.env import HockeyEnv, HockeyParallelEnv

    return build(f"hockey/{name}", TASKS[name], HockeyEnv, HockeyParallelEnv, unlimited=unlimited, render=render)


def check_packages(suite: str, render: bool) -> None:
    """Refuse where what all of hockey needs is missing.

    Raises:
        ConfigError: the packages, and how to install them.
    """
    needed = ["Box2D", "pettingzoo", *(["pygame"] if render else [])]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"{suite} needs {', '.join(missing)}; install with: pip install 'worldmpc[hockey]'")


def build(
    full_name: str,
    task: dict[str, Any],
    single: type[HockeyEnv],
    both: type[HockeyParallelEnv],
    *,
    unlimited: bool,
    render: bool,
) -> SuiteEnv:
    """Make a task's environment from the class for one player or, without an opponent, the one for two."""
    rules = {**task, "timed": not unlimited, "render_mode": "rgb_array" if render else None}
    if rules["opponent"] is not None:
        env = single(**rules)
        return SuiteEnv(env, full_name, None if unlimited else env.game.limit + 1)
    from worldmpc.envs.two_player import JointEnv

    del rules["opponent"]
    game = both(**rules)
    return SuiteEnv(JointEnv(game, name=full_name), full_name, None if unlimited else game.game.limit + 1)
