"""DeepMind Control Suite as gymnasium environments: ``dmc/<domain>-<task>``.

Nothing of dm_control is imported before an environment is made. Names take hyphens or underscores, any case, and the short
domains of the published TD-MPC2 curves (``cup-catch``, ``pointmass-easy``); the canonical form has hyphens, lower case and
``cup`` for ``ball_in_cup``.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from worldmpc.config import ConfigError
from worldmpc.envs.rendering import rendering_hint
from worldmpc.envs.wrappers import UNBOUNDED, SuiteEnv

FRAME_SIZE = (320, 480)
"""Height and width of rendered frames: multiples of 16, as video encoders want, within the suite's 480 x 640 buffer."""

DOMAINS: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
"""The suite's 51 tasks, written down so that names resolve without importing it (a test compares)."""

SHORT_DOMAINS = {"ball_in_cup": "cup"}
OTHER_DOMAINS = {"ball_in_cup": ("ball-in-cup",), "point_mass": ("pointmass",)}


def _spell(text: str) -> str:
    return text.replace("_", "-").lower()


TASKS: dict[str, tuple[str, str]] = {
    f"{SHORT_DOMAINS.get(domain, _spell(domain))}-{_spell(task)}": (domain, task) for domain, tasks in DOMAINS.items() for task in tasks
}
"""Canonical name without ``dmc/`` -> (domain, task) of dm_control."""

ALIASES: dict[str, str] = {
    f"{other}-{_spell(task)}": name for name, (domain, task) in TASKS.items() for other in OTHER_DOMAINS.get(domain, ())
}


def list_names() -> list[str]:
    """Return the canonical names of all tasks, without the suite's prefix."""
    return list(TASKS)


def resolve(name: str) -> str:
    """Return the canonical form of a name, both without the suite's prefix.

    Raises:
        ConfigError: no such task; the message has the nearest names.
    """
    spelled = _spell(name)
    spelled = ALIASES.get(spelled, spelled)
    if spelled in TASKS:
        return spelled
    near = difflib.get_close_matches(spelled, [*TASKS, *ALIASES], n=3)
    near = list(dict.fromkeys(f"dmc/{ALIASES.get(match, match)}" for match in near))
    hint = f"did you mean {' or '.join(near)}?" if near else "`worldmpc tasks` lists all"
    raise ConfigError(f"task: unknown task 'dmc/{name}'; {hint}")


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment of a canonical name.

    ``unlimited`` lifts the suite's time limit (1000 simulator steps everywhere but lqr, which has none).

    Raises:
        ConfigError: dm_control is missing.
    """
    domain, task = TASKS[name]
    env = DMControlEnv(domain, task, unlimited=unlimited, render=render)
    return SuiteEnv(env, f"dmc/{name}", env.step_limit, can_terminate=domain == "lqr", action_repeat=2)


class DMControlEnv(gymnasium.Env[Any, Any]):
    """One task of the suite: float32 observations concatenated in the order of the task's specification.

    Only lqr ever ends an episode by itself (``terminated``); every other episode ends by time limit (``truncated``).
    lqr also draws its physics when it is made: always from seed 0, so that all environments of a run are the same system; and
    its controls, which have no limits, are taken as [-1, 1].
    """

    def __init__(self, domain: str, task: str, *, unlimited: bool = False, render: bool = False) -> None:
        """Load a task by dm_control's own names.

        Raises:
            ConfigError: dm_control is missing, or ``MUJOCO_GL`` names no backend that can be used.
        """
        task_kwargs: dict[str, Any] = {"random": 0}
        if unlimited:
            task_kwargs["time_limit"] = float("inf")
        suite = _suite()
        with _quiet_compiler():
            self._env = suite.load(domain, task, task_kwargs=task_kwargs)
        if render:
            _follow_backend()
        elif task == "escape":
            _forbid_contexts(self._env.physics)
        limit = self._env._step_limit
        self.step_limit: int | None = None if math.isinf(limit) else math.ceil(limit)
        self._camera = 2 if domain == "quadruped" else 0
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self._env.control_timestep())}
        self.render_mode = "rgb_array" if render else None
        action = self._env.action_spec()
        low, high = (np.broadcast_to(bound, action.shape).astype(np.float32) for bound in (action.minimum, action.maximum))
        free = (low <= -UNBOUNDED) | (high >= UNBOUNDED)
        self.action_space = Box(np.where(free, -1.0, low).astype(np.float32), np.where(free, 1.0, high).astype(np.float32))
        size = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [O]. With a seed, the whole episode follows from it and the actions."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        return _flatten(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one simulator step: [A] within the action space -> observation [O], reward, terminated, truncated, info."""
        result = self._env.step(action)
        last = result.last()
        terminated = last and result.discount == 0.0
        return _flatten(result.observation), float(result.reward), terminated, last and not terminated, {}

    def render(self) -> Any:
        """Return a frame [height, width, 3] uint8, or None where the environment was made without rendering.

        Raises:
            RuntimeError: no rendering backend; the message says what to set.
        """
        if self.render_mode is None:
            return None
        height, width = FRAME_SIZE
        try:
            return self._env.physics.render(height, width, camera_id=self._camera)
        except Exception as error:
            raise RuntimeError(f"{error} ({rendering_hint()})") from error

    def close(self) -> None:
        """Free the simulation and its rendering context."""
        self._env.close()


def _flatten(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Hold back MuJoCo's deprecation notes about the suite's own model files, which no user can act on."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _follow_backend() -> None:
    """Let dm_control use the backend of ``MUJOCO_GL`` also where it was imported before that was set."""
    from dm_control import _render

    if os.environ.get("MUJOCO_GL", "").lower() not in ("", str(_render.BACKEND).lower()):
        try:
            importlib.reload(_render)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"MUJOCO_GL: cannot use {os.environ['MUJOCO_GL']!r} ({reason}); {rendering_hint()}") from error


def _forbid_contexts(physics: Any) -> None:
    """Keep quadruped-escape, which uploads its terrain to the renderer at every reset, from making one for that."""
    kind = type(physics)
    physics.__class__ = type(kind.__name__, (kind,), {"contexts": property(lambda self: None)})


def _suite() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # Without MUJOCO_GL dm_control tries a window system first and complains where there is none; training needs none.
            warnings.simplefilter("ignore")
            from dm_control import suite
    except ModuleNotFoundError as error:
        raise ConfigError(f"task: dmc needs the package {error.name}; pip install dm-control 'mujoco<4'") from error
    except Exception as error:
        # MuJoCo and dm_control load the backend that it names when they are imported.
        if "MUJOCO_GL" not in os.environ:
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"MUJOCO_GL: cannot use {os.environ['MUJOCO_GL']!r} ({reason}); {rendering_hint()}") from error
    return suite
