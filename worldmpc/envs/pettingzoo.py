"""Parallel environments of PettingZoo and its relatives with two players, as ``pettingzoo/mpe2:simple_push_v3``."""

from __future__ import annotations

import importlib

from worldmpc.config import ConfigError
from worldmpc.envs.wrappers import SuiteEnv

FORM = "pettingzoo/<package>:<module>, as pettingzoo/mpe2:simple_push_v3"


def list_names() -> list[str]:
    """Return nothing: which environments there are is said by the packages that are installed."""
    return []


def resolve(name: str) -> str:
    """Return the name itself.

    Raises:
        ConfigError: it is not of the form ``<package>:<module>``.
    """
    package, colon, module = name.partition(":")
    if not (package and colon and module):
        raise ConfigError(f"task: expected {FORM}, got 'pettingzoo/{name}'")
    return name


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment whose module is named; a limit of its own stays, also where ``unlimited`` would lift it.

    Raises:
        ConfigError: no such package or module, none that makes a parallel environment, or one that is no game of two.
    """
    package, _, part = name.partition(":")
    try:
        module = importlib.import_module(f"{package}.{part}")
    except ImportError as error:
        raise ConfigError(f"task: pettingzoo/{name} cannot be imported ({error}); install its package, or look at its name") from error
    if not hasattr(module, "parallel_env"):
        raise ConfigError(f"task: {package}.{part} makes no parallel environment (no parallel_env); expected {FORM}")
    from worldmpc.envs.two_player import JointEnv

    env = module.parallel_env(**({"render_mode": "rgb_array"} if render else {}))
    full = f"pettingzoo/{name}"
    return SuiteEnv(JointEnv(env, name=full), full, getattr(env.unwrapped, "max_cycles", None))
