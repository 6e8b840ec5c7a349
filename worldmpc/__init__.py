"""Planning with learned world models: TD-MPC2 and its relatives, made of exchangeable parts.

::

    import worldmpc

    envs = worldmpc.make_envs("dmc/cartpole-swingup")
    agent = worldmpc.make_agent(envs, preset="cpu")
    worldmpc.train(agent, envs, steps=50_000)
    print(worldmpc.evaluate(agent, episodes=10).mean_return)
    worldmpc.save(agent, "cartpole"); agent = worldmpc.load("cartpole")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldmpc.api import evaluate, load, make_agent, make_envs, save, train
    from worldmpc.config import ConfigError, EnvConfig, RunConfig, make_config
    from worldmpc.envs import EnvError, VecEnv, list_tasks
    from worldmpc.models.official import load_official
    from worldmpc.opponents.match import Match
    from worldmpc.training.checkpoint import CheckpointError
    from worldmpc.training.create import create_agent
    from worldmpc.training.run import run
    from worldmpc.training.trainer import DivergenceError

__version__ = "0.1.0"

_HOMES = {
    "worldmpc.api": ("evaluate", "load", "make_agent", "make_envs", "save", "train"),
    "worldmpc.config": ("ConfigError", "EnvConfig", "RunConfig", "make_config"),
    "worldmpc.envs": ("EnvError", "VecEnv", "list_tasks"),
    "worldmpc.models.official": ("load_official",),
    "worldmpc.opponents.match": ("Match",),
    "worldmpc.training.checkpoint": ("CheckpointError",),
    "worldmpc.training.create": ("create_agent",),
    "worldmpc.training.run": ("run",),
    "worldmpc.training.trainer": ("DivergenceError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DivergenceError",
    "EnvConfig",
    "EnvError",
    "Match",
    "RunConfig",
    "VecEnv",
    "__version__",
    "create_agent",
    "evaluate",
    "list_tasks",
    "load",
    "load_official",
    "make_agent",
    "make_config",
    "make_envs",
    "run",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import worldmpc`` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'worldmpc' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
