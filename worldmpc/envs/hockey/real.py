"""Laser hockey of the original package, ``hockey`` (martius-lab/hockey-env), behind the faces of the built-in one.

The package is not a dependency. What it does otherwise than Gymnasium asks is put right here: observations are float32, and as many as
their space says; games that time ends are truncated; a seed makes all that follows repeatable; nobody holds the puck when a game begins;
copies and pickles go on with the same game. Scripted opponents are :class:`~worldmpc.envs.hockey.bots.ScriptedBot`, which act as the
package's do but draw from the environment's random numbers, not from numpy's global ones. Pictures are those of the built-in game.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from worldmpc.config import ConfigError
from worldmpc.envs.hockey.env import HockeyEnv, HockeyParallelEnv
from worldmpc.envs.hockey.game import GameConfig, GameLike, GameStep, Mode, next_starter
from worldmpc.envs.hockey.rink import RinkState, in_engine, state_of

OLDEST = (2, 6)
"""The version of the package that this was written for; older ones are refused."""
INSTALL = "pip install --no-deps git+https://github.com/martius-lab/hockey-env and, for box2d, pip install 'worldmpc[hockey]'"
METHODS = ("reset", "step", "obs_agent_two", "get_info_agent_two", "get_reward_agent_two")
ATTRIBUTES = ("player1", "player2", "puck", "player1_has_puck", "player2_has_puck", "max_timesteps")
HINTS = ("reward_closeness_to_puck", "reward_touch_puck", "reward_puck_direction")


def load_package() -> ModuleType:
    """Return the package's module ``hockey.hockey_env``.

    Raises:
        ConfigError: it is missing, cannot be imported, is too old, or lacks what is needed here.
    """
    try:
        module = importlib.import_module("hockey.hockey_env")
    except ModuleNotFoundError as error:
        if error.name == "hockey":
            raise _refusal("is not installed") from None
        raise _refusal(f"cannot be imported ({error})") from error
    except Exception as error:
        raise _refusal(f"cannot be imported ({_reason(error)})") from error
    version = _version()
    if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise _refusal(f"is version {version}, older than {'.'.join(map(str, OLDEST))}")
    try:
        lacking = _lacking(module)
    except Exception as error:
        raise _refusal(f"cannot be used ({_reason(error)})") from error
    if lacking:
        raise _refusal(f"is of an unknown version, without {', '.join(lacking)}")
    return module


class _Start(NamedTuple):
    """How a game began; with the actions since it says all of a game."""

    mode: Mode
    starter: int
    seed: int
    held: tuple[int, int]  # hold counters


class RealGame:
    """A game of two players in the package's environment, with the face of :class:`~worldmpc.envs.hockey.game.Game`.

    Each game has an environment of its own: an engine that was played in finds contacts in another order, and hold counters and what else
    the package's ``reset`` leaves alone would go on into the next game. Copies and pickles play the game again, to the same numbers.

    Args:
        config: its rules.

    Raises:
        ConfigError: see :func:`load_package`.
    """

    def __init__(self, config: GameConfig | None = None) -> None:
        self.config = config or GameConfig()
        self.mode, self.starter = self.config.mode, 1
        self._begin(load_package(), _Start(self.mode, self.starter, 0, (0, 0)))

    def __getstate__(self) -> dict[str, Any]:
        kept = ("config", "mode", "starter", "_start", "_actions")
        return {name: vars(self)[name] for name in kept}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved)
        actions = self._actions
        self._begin(load_package(), self._start)
        for action in actions:
            self._act(action)

    @property
    def limit(self) -> int:
        """Time limit; the game ends behind the step that begins at it."""
        return self._env.max_timesteps

    @property
    def state(self) -> RinkState:
        """Where everything is, and how it moves."""
        one, two, puck = (in_engine(body) for body in (self._env.player1, self._env.player2, self._env.puck))
        return state_of(one, two, puck, self._held)

    def set_mode(self, mode: Mode) -> None:
        """Play another mode from the next game on."""
        self.mode = mode

    def reset(self, rng: np.random.Generator, starter: int | None = None) -> None:
        """Begin a game; ``starter`` has the puck on its side in NORMAL mode, otherwise whose turn it is.

        The package draws how the game begins from a seed, which is drawn here.

        Raises:
            ValueError: no such player.
        """
        self.starter = next_starter(self.config, self.mode, self.starter, starter)
        held = self._held if self.config.keeps_counters else (0, 0)
        self._begin(self._package, _Start(self.mode, self.starter, int(rng.integers(2**31)), held))

    def step(self, action1: Sequence[float], action2: Sequence[float]) -> GameStep:
        """Let both players act, each in its own view, entries in [-1, 1]."""
        reward, done = self._act(np.array([*action1, *action2], np.float32))
        one, two = self._infos
        winner = int(one["winner"])
        rewards = float(reward), float(self._env.get_reward_agent_two(two))
        return GameStep(rewards, winner != 0, bool(done) and winner == 0 and self.config.timed, winner)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Both players' views, float32 [18] each, or [16] without keep mode."""
        return np.array(self._seen, np.float32), np.array(self._env.obs_agent_two(), np.float32)

    def hints(self) -> tuple[dict[str, float], dict[str, float]]:
        """What reward shaping may use, for both players: closeness to the puck (paid already), touching it, its direction."""
        one, two = self._infos
        return {name: float(one[name]) for name in HINTS}, {name: float(two[name]) for name in HINTS}

    @property
    def _held(self) -> tuple[int, int]:
        return int(self._env.player1_has_puck), int(self._env.player2_has_puck)

    def _begin(self, package: ModuleType, start: _Start) -> None:
        self._package, self._start = package, start
        self._env = env = package.HockeyEnv(keep_mode=self.config.keep_mode, mode=package.Mode[start.mode.name])
        env.player1_has_puck, env.player2_has_puck = start.held
        self._seen, info = env.reset(one_starting=start.starter == 1, seed=start.seed)
        self._infos = info, env.get_info_agent_two()
        self._actions: list[np.ndarray] = []

    def _act(self, actions: np.ndarray) -> tuple[float, bool]:
        """Take both players' actions [8], or [6] without keep mode: player one's reward, and whether the game is over."""
        self._actions.append(actions)
        self._seen, reward, done, _, info = self._env.step(actions)
        self._infos = info, self._env.get_info_agent_two()
        return reward, done


class RealHockeyEnv(HockeyEnv):
    """The package's game against an opponent that belongs to the environment; arguments are those of :class:`HockeyEnv`."""

    game_class: ClassVar[type[GameLike]] = RealGame


class RealHockeyParallelEnv(HockeyParallelEnv):
    """The package's game for two players, each in its own view; arguments are :class:`~worldmpc.envs.hockey.env.Rules`."""

    metadata: ClassVar[dict[str, Any]] = {**HockeyParallelEnv.metadata, "name": "hockey_real_v0"}  # type: ignore[misc]
    game_class: ClassVar[type[GameLike]] = RealGame


def _version() -> str | None:
    """Return the installed package's version, None where it does not say."""
    try:
        return importlib.metadata.version("hockey")
    except importlib.metadata.PackageNotFoundError:
        return None


def _lacking(module: ModuleType) -> list[str]:
    """Return what is missing of the names that are needed."""
    if lacking := [name for name in ("HockeyEnv", "Mode") if not hasattr(module, name)]:
        return lacking
    lacking = [f"Mode.{mode.name}" for mode in Mode if not hasattr(module.Mode, mode.name)]
    lacking += [f"HockeyEnv.{name}" for name in METHODS if not hasattr(module.HockeyEnv, name)]
    if lacking:
        return lacking
    for method, arguments in (("__init__", ("keep_mode", "mode")), ("reset", ("one_starting", "seed"))):
        known = inspect.signature(getattr(module.HockeyEnv, method)).parameters
        lacking += [f"{name} in HockeyEnv.{method}" for name in arguments if name not in known]
    if lacking:
        return lacking
    env = module.HockeyEnv(keep_mode=True, mode=module.Mode[Mode.NORMAL.name])
    return [f"HockeyEnv.{name}" for name in ATTRIBUTES if not hasattr(env, name)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"hockey-real: the package hockey (martius-lab/hockey-env) {what}; install it with: {INSTALL}")
