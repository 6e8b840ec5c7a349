"""Environments: from a task name, or the user's own environment, to a :class:`VecEnv`.

A suite is a module with three functions: ``list_names() -> list[str]``, ``resolve(name) -> canonical name`` (ConfigError where
unknown) and ``make(name, *, index, unlimited, render) -> SuiteEnv``; ``DEFAULT`` is the name that the suite alone stands for, where it has
one. Suites are imported when first used; ``SUITES`` may be extended.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import gymnasium
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from worldmpc.config import ConfigError, EnvConfig, check_env_config
from worldmpc.envs.rendering import configure_rendering, rendering_backend
from worldmpc.envs.vector import VecEnv, VectorEnv, episode_seed
from worldmpc.envs.workers import LocalEnvs, WorkerEnvs
from worldmpc.envs.wrappers import Env, EnvError, GuardedEnv, SuiteEnv, adapt, check_spaces, own_step_limit
from worldmpc.types import EnvSpec

__all__ = [
    "SUITES",
    "EnvError",
    "GuardedEnv",
    "SuiteEnv",
    "Task",
    "VecEnv",
    "borrowed_envs",
    "canonical_task",
    "configure_rendering",
    "episode_seed",
    "list_tasks",
    "make_env",
    "make_envs",
    "rendering_backend",
]

SUITES: dict[str, str] = {
    "dmc": "worldmpc.envs.dmc:make",
    "gym": "worldmpc.envs.gym:make",
    "toy": "worldmpc.envs.toy:make",
    "maze": "worldmpc.envs.maze:make",
    "hockey": "worldmpc.envs.hockey:make",
    "hockey-real": "worldmpc.envs.hockey_real:make",
    "pettingzoo": "worldmpc.envs.pettingzoo:make",
}
"""Suite -> ``module:function`` that makes its environments; the module also has ``list_names`` and ``resolve``."""

Task: TypeAlias = "str | Env | Callable[[], Env] | VectorEnv"
"""``suite/name``, an environment, a function that returns a new one, or a vector environment."""


def canonical_task(task: str) -> str:
    """Return the one name of a task: ``walker-walk``, ``dmc/walker_walk`` -> ``dmc/walker-walk``.

    Raises:
        ConfigError: unknown suite or task; the message has the nearest names.
    """
    suite, slash, name = task.partition("/")
    if not slash and suite in SUITES and hasattr(_suite(suite), "DEFAULT"):
        name = _suite(suite).DEFAULT
    elif not slash:
        suite, name = _guess_suite(task), task
    if suite not in SUITES:
        near = difflib.get_close_matches(suite, SUITES, n=1)
        hint = f"did you mean {near[0]}/{name}?" if near else f"one of {', '.join(SUITES)}"
        raise ConfigError(f"task: unknown suite '{suite}' in '{task}'; {hint}")
    return f"{suite}/{_suite(suite).resolve(name)}"


def list_tasks(suite: str | None = None) -> list[str]:
    """Return the canonical names of all tasks, or of one suite.

    Raises:
        ConfigError: unknown suite.
    """
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"task: unknown suite '{suite}'; one of {', '.join(SUITES)}")
    return [f"{key}/{name}" for key in ([suite] if suite else SUITES) for name in _suite(key).list_names()]


def make_env(
    task: str | Env | Callable[[], Env], *, seed: int = 1, config: EnvConfig | None = None, render: bool = False, index: int = 0
) -> GuardedEnv:
    """Make one environment in the common form, with the facts in ``env_spec``.

    Actions [A] in [-1, 1], one-hot for Discrete ones; observations [O] float32.

    ``seed`` is that of the first episode, unless ``reset`` gets one; ``index`` is the number it bears in errors.

    Raises:
        ConfigError: unknown task, missing package, a space that is not supported, or a configuration that cannot be.
        EnvError: the environment's own code raised an error.
    """
    config = config or EnvConfig()
    check_env_config(config)
    return _make_adapted(task, config, seed=seed, render=render, index=index)


def make_envs(task: Task, config: EnvConfig | None = None, *, seed: int = 1, render: bool = False) -> VecEnv:
    """Make ``config.num_envs`` environments of a task and step them together.

    Episode ``k`` of environment ``e`` has the seed ``episode_seed(seed, e, k)``. A vector environment object keeps its own
    number of environments, time limit and seeding. With ``env.workers=async`` a function that makes environments is called in
    the ``env.num_workers`` processes (and once more here, for the spaces), so what it counts or shares is not common to them; the
    results are those of ``env.workers=sync``, bit for bit.

    Raises:
        ConfigError: unknown task, missing package, a space that is not supported, or a configuration that cannot be or does not fit the
            object.
        EnvError: an environment's own code raised an error.
    """
    config = config or EnvConfig()
    check_env_config(config)
    if isinstance(task, gymnasium.vector.VectorEnv):
        return _wrap_vector(task, config, seed)
    if isinstance(task, gymnasium.Env) and (config.num_envs != 1 or config.workers != "sync"):
        raise ConfigError("task: an environment object is one environment in this process; pass a function that makes it instead")
    if isinstance(task, str):
        task = canonical_task(task)
    functions = [
        partial(_make_adapted, task, config, seed=episode_seed(seed, index, 0), render=render, index=index)
        for index in range(config.num_envs)
    ]
    env = LocalEnvs(functions) if config.workers == "sync" else _start_workers(functions, config, _name(task))
    return VecEnv(env, env.spec, config, seed=seed, may_render=not isinstance(task, str) or render)


@contextmanager
def borrowed_envs(task: Task, config: EnvConfig | None = None, *, seed: int = 1, render: bool = False) -> Iterator[VecEnv]:
    """Make environments for the length of a ``with`` block, and close them unless they are objects of the caller's.

    Raises:
        ConfigError: see :func:`make_envs`.
        EnvError: see :func:`make_envs`.
    """
    envs = make_envs(task, config, seed=seed, render=render)
    try:
        yield envs
    finally:
        if not isinstance(task, gymnasium.Env | gymnasium.vector.VectorEnv):
            envs.close()


def _make_adapted(task: str | Env | Callable[[], Env], config: EnvConfig, *, seed: int, render: bool, index: int) -> GuardedEnv:
    return adapt(_make(task, config, render=render, index=index), config, seed=seed, index=index)


def _start_workers(functions: list[Callable[[], GuardedEnv]], config: EnvConfig, name: str) -> WorkerEnvs:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number = min(cores, config.num_envs) if config.num_workers is None else config.num_workers
    if number > cores:
        warnings.warn(f"env.num_workers: {number} worker processes on {cores} CPU cores are slower than {cores}", stacklevel=3)
    first = functions[0]()
    first.close()
    try:
        return WorkerEnvs(functions, first.env_spec, number)
    except (EOFError, ConnectionError) as error:
        raise EnvError(f"{name}: a worker process died while it made its environments") from error
    except OSError as error:
        raise EnvError(f"{name}: {number} worker processes could not be started: {error}") from error


def _make(task: str | Env | Callable[[], Env], config: EnvConfig, *, render: bool, index: int) -> SuiteEnv:
    """Make one environment; whatever its own code raises becomes one EnvError."""
    try:
        made = _make_unguarded(task, config, render=render, index=index)
        if not config.simulator_state:
            return made
        from worldmpc.envs.simulator_state import SimulatorState  # brings MuJoCo and dm_control with it

        return dataclasses.replace(made, env=SimulatorState(made.env))
    except (ConfigError, EnvError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise EnvError(f"{_name(task)}: environment {index} could not be made: {reason}") from error


def _name(task: Task) -> str:
    return task if isinstance(task, str) else getattr(task, "__name__", type(task).__name__)


def _make_unguarded(task: str | Env | Callable[[], Env], config: EnvConfig, *, render: bool, index: int) -> SuiteEnv:
    if isinstance(task, str):
        if render:
            configure_rendering()
        suite, _, name = canonical_task(task).partition("/")
        function = getattr(_suite(suite), SUITES[suite].partition(":")[2])
        return function(name, index=index, unlimited=config.episode_length is not None, render=render)
    env: Any = task if isinstance(task, gymnasium.Env) else task()
    if not isinstance(env, gymnasium.Env) and hasattr(env, "possible_agents"):
        from worldmpc.envs.two_player import JointEnv  # brings PettingZoo with it

        env = JointEnv(env)
        return SuiteEnv(env, env.name, None)
    if not isinstance(env, gymnasium.Env):
        kinds = "a PettingZoo parallel environment of two players will do as well"
        raise ConfigError(f"task: expected the function to return a gymnasium.Env, got {type(env).__name__}; {kinds}")
    return SuiteEnv(env, type(env.unwrapped).__name__, own_step_limit(env))


def _wrap_vector(env: VectorEnv, config: EnvConfig, seed: int) -> VecEnv:
    name = type(env.unwrapped).__name__
    if config.num_envs not in (1, env.num_envs):
        raise ConfigError(f"env.num_envs: the vector environment {name} has {env.num_envs} environments, got {config.num_envs}")
    if config.simulator_state:
        raise ConfigError(f"env.simulator_state: cannot be had from the vector environment {name}; wrap what is in it")
    if config.action_repeat not in (None, 1) or config.episode_length is not None:
        raise ConfigError(f"env.action_repeat, env.episode_length: cannot be changed on the vector environment {name}; wrap what is in it")
    if "autoreset_mode" not in env.metadata:
        raise ConfigError(f"task: the vector environment {name} does not say how it resets; set its metadata['autoreset_mode']")
    obs_shape, action_dim, discrete = check_spaces(env.single_observation_space, env.single_action_space, name)
    return VecEnv(env, EnvSpec(name, obs_shape, action_dim, _vector_step_limit(env), discrete=discrete), config, seed=seed)


def _vector_step_limit(env: VectorEnv) -> int | None:
    """Return the time limit of all environments in a vector environment; None where they have none, have several, or do not say."""
    inner = env.unwrapped
    if isinstance(inner, SyncVectorEnv):
        limits = {own_step_limit(one) for one in inner.envs}
    elif isinstance(inner, AsyncVectorEnv):
        limits = {spec and spec.max_episode_steps for spec in inner.get_attr("spec")}
    else:
        limits = {env.spec and env.spec.max_episode_steps}
    return limits.pop() if len(limits) == 1 else None


def _suite(name: str) -> ModuleType:
    return importlib.import_module(SUITES[name].partition(":")[0])


def _guess_suite(name: str) -> str:
    """Return the suite of a name without one: dmc, unless the name belongs to another."""
    tasks = {key: _suite(key).list_names() for key in SUITES}
    for suite in tasks:
        if name in tasks[suite]:
            if suite == "dmc":
                return suite
            raise ConfigError(f"task: unknown task '{name}'; did you mean {suite}/{name}?")
    return "dmc"
