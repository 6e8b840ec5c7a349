"""Laser hockey of the original package, ``hockey`` (martius-lab/hockey-env): ``hockey-real/<task>``, with the tasks of ``hockey``.

The package is installed by hand, with ``pip install --no-deps git+https://github.com/martius-lab/hockey-env``.
"""

from __future__ import annotations

from worldmpc.envs.hockey import DEFAULT, TASKS, build, check_packages, list_names
from worldmpc.envs.wrappers import SuiteEnv, nearest_name

__all__ = ["DEFAULT", "list_names", "make", "resolve"]


def resolve(name: str) -> str:
    """Return the canonical form of a name, both without the suite's prefix.

    Raises:
        ConfigError: no such task.
    """
    return nearest_name(name, name.lower().replace("_", "-"), "hockey-real", TASKS)


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment of a canonical name; ``unlimited`` lifts its time limit.

    Raises:
        ConfigError: a package is missing, or the hockey package is not one that can be used.
    """
    check_packages("hockey-real", render)
    from worldmpc.envs.hockey.real import RealHockeyEnv, RealHockeyParallelEnv

    return build(f"hockey-real/{name}", TASKS[name], RealHockeyEnv, RealHockeyParallelEnv, unlimited=unlimited, render=render)
