"""Laser hockey for one player, as a Gymnasium environment, and for two, as a PettingZoo parallel environment."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict, TypeVar, Unpack

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from pettingzoo import ParallelEnv

from worldmpc.config import ConfigError
from worldmpc.envs.hockey.bots import GAIN, ScriptedBot
from worldmpc.envs.hockey.game import CHOICES, Game, GameConfig, GameLike, GameStep, Mode, mirror_of
from worldmpc.envs.hockey.render import FPS, Screen

T = TypeVar("T")
Opponent = Callable[[np.ndarray], np.ndarray]
"""Own view [18] -> action [4] in [-1, 1]; [16] -> [3] without keep mode."""
PLAYERS: tuple[str, str] = ("player_1", "player_2")
RENDER_MODES = ("human", "rgb_array")


def read_mode(mode: Mode | str | int) -> Mode:
    """Return a mode from itself, its name or its number.

    Raises:
        ConfigError: no such mode.
    """
    try:
        return Mode[mode.upper()] if isinstance(mode, str) else Mode(mode)
    except (KeyError, ValueError):
        raise ConfigError(f"hockey mode: expected one of {', '.join(one.name for one in Mode)}, got {mode!r}") from None


def clipped(action: Any, size: int) -> list[float]:
    """Return a player's action [size] as numbers in [-1, 1].

    Raises:
        ValueError: another number of them, or one that is not finite.
    """
    values = np.asarray(action, np.float32).tolist()
    if not isinstance(values, list) or len(values) != size or not math.isfinite(sum(values)):
        raise ValueError(f"hockey action: expected {size} numbers, got {values}")
    if min(values) < -1.0 or max(values) > 1.0:
        return [min(max(value, -1.0), 1.0) for value in values]
    return values


class Rules(TypedDict, total=False):
    """How hockey is played and shown; what is left out is the first of what it may be."""

    mode: Mode | str | int
    """NORMAL, TRAIN_SHOOTING or TRAIN_DEFENSE: how games begin, and how long they may last."""
    keep_mode: bool
    """True: rackets catch the puck. False: they do not; observations have 16 and actions 3 entries."""
    discrete: bool
    """False: actions are vectors. True: one of eight choices, seven without keep mode."""
    alternates: bool
    """True: in NORMAL mode the puck begins on either side in turn. False: on player one's, unless asked otherwise."""
    timed: bool
    """True: games end at the mode's time limit."""
    timeout_terminates: bool
    """False: games that time ends are truncated. True: terminated, as in the original."""
    keeps_counters: bool
    """False. True: who holds the puck when time is over begins the next game with it, as in the original."""
    render_mode: str | None
    """None, human or rgb_array."""


class _Table:
    """What both faces have in common: a game, its spaces, and a screen; further arguments are :class:`Rules`."""

    def __init__(
        self,
        game_class: type[GameLike],
        mode: Mode | str | int = Mode.NORMAL,
        keep_mode: bool = True,
        discrete: bool = False,
        alternates: bool = True,
        timed: bool = True,
        timeout_terminates: bool = False,
        keeps_counters: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *RENDER_MODES):
            raise ConfigError(f"hockey render_mode: expected one of {', '.join(RENDER_MODES)}, got {render_mode!r}")
        self.game = game_class(GameConfig(read_mode(mode), keep_mode, alternates, timed, keeps_counters))
        self.discrete, self.timeout_terminates, self.action_dim = discrete, timeout_terminates, 4 if keep_mode else 3
        self.observation_space = Box(-np.inf, np.inf, (18 if keep_mode else 16,), np.float32)
        self.action_space: Space[Any] = Discrete(8 if keep_mode else 7) if discrete else Box(-1.0, 1.0, (self.action_dim,), np.float32)
        self._choices: list[list[float]] = CHOICES[: 8 if keep_mode else 7, : self.action_dim].tolist()
        self.render_mode, self._screen = render_mode, None

    def action(self, action: Any) -> list[float]:
        """Return a player's action as numbers in [-1, 1]."""
        if not self.discrete:
            return clipped(action, self.action_dim)
        choice = int(action)
        if not 0 <= choice < len(self._choices):
            raise ValueError(f"hockey action: expected a choice of {self.action_space}, got {action!r}")
        return self._choices[choice]

    def reset(self, rng: np.random.Generator, seed: int | None, options: dict[str, Any] | None) -> None:
        """Begin a game; options, of this game alone: ``mode``, ``starter``. A seed also decides whose turn it is to have the puck."""
        options = options or {}
        if unknown := set(options) - {"mode", "starter"}:
            warnings.warn(f"hockey reset: option {sorted(unknown)[0]!r} is not read; there are mode and starter", stacklevel=3)
        self.game.set_mode(read_mode(options.get("mode", self.game.config.mode)))
        if seed is not None:
            self.game.starter = 1 + int(np.random.default_rng((seed, 1)).integers(2))
        self.game.reset(rng, options.get("starter"))

    def ended(self, step: GameStep) -> tuple[bool, bool]:
        """Whether a game is terminated, and whether it is truncated."""
        return step.goal or (step.timeout and self.timeout_terminates), step.timeout and not self.timeout_terminates

    def render(self) -> np.ndarray | None:
        """Draw the game; return a frame [480, 600, 3] uint8 in rgb_array mode."""
        if self.render_mode is None:
            return None
        if self._screen is None:
            self._screen = Screen(window=self.render_mode == "human")
        return self._screen.draw(self.game.state)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_screen": None}

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._screen is not None:
            self._screen.close()
            self._screen = None


class HockeyEnv(gymnasium.Env[np.ndarray, Any]):
    """Laser hockey against an opponent that belongs to the environment.

    Args:
        opponent: weak, strong, or a function of the opponent's own view [18] that returns its action [4].
        rules: see :class:`Rules`.

    Raises:
        ConfigError: no such opponent or mode.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": list(RENDER_MODES), "render_fps": FPS}
    game_class: ClassVar[type[GameLike]] = Game
    """What plays the game."""

    def __init__(self, opponent: str | Opponent = "weak", **rules: Unpack[Rules]) -> None:
        if isinstance(opponent, str) and opponent not in GAIN:
            raise ConfigError(f"hockey opponent: expected one of {', '.join(GAIN)} or a function, got {opponent!r}")
        self._table = _Table(self.game_class, **rules)
        self.game, self.render_mode = self._table.game, self._table.render_mode
        self.mirror = mirror_of(self.game.config.keep_mode, self._table.discrete)
        self.observation_space, self.action_space = self._table.observation_space, self._table.action_space
        self.opponent = opponent
        self._bot: Opponent | None = None
        self._seen = np.zeros(0, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a game; options: ``mode``, and ``starter`` 1 (the player) or 2 (the opponent).

        The same seed gives the same game, with a scripted opponent's random numbers.
        """
        super().reset(seed=seed)
        self._table.reset(self.np_random, seed, options)
        if isinstance(self.opponent, str) and (self._bot is None or seed is not None):
            bots = np.random.default_rng(self.np_random.integers(2**32))
            self._bot = ScriptedBot(self.opponent, bots, self.game.config.keep_mode).act
        obs, self._seen = self.game.observe()
        return obs, self._info(0)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Let both act: [4] -> own view [18], reward, terminated, truncated, info with ``winner`` (1 own win, -1 own loss)."""
        chosen = self._bot if isinstance(self.opponent, str) else self.opponent
        assert chosen is not None, "reset the environment first"
        answer = clipped(chosen(self._seen), self._table.action_dim)
        step = self.game.step(self._table.action(action), answer)
        obs, self._seen = self.game.observe()
        terminated, truncated = self._table.ended(step)
        info = self._info(step.winner)
        info["opponent_action"] = np.array(answer, np.float32)
        return obs, step.rewards[0], terminated, truncated, info

    def render(self) -> Any:
        """Draw the game; a frame [480, 600, 3] uint8 in rgb_array mode."""
        return self._table.render()

    def close(self) -> None:
        """Close the window, if there is one."""
        self._table.close()

    def _info(self, winner: int) -> dict[str, Any]:
        info: dict[str, Any] = {**self.game.hints()[0]}
        info["winner"], info["success"], info["opponent_obs"] = winner, float(winner == 1), self._seen
        return info


class HockeyParallelEnv(ParallelEnv[str, np.ndarray, Any]):
    """Laser hockey for two players, each in its own view; arguments are :class:`Rules`."""

    metadata: ClassVar[dict[str, Any]] = {"name": "hockey_v0", "render_modes": list(RENDER_MODES), "render_fps": FPS}  # type: ignore[misc]
    game_class: ClassVar[type[GameLike]] = Game
    """What plays the game."""

    def __init__(self, **rules: Unpack[Rules]) -> None:
        self._table = _Table(self.game_class, **rules)
        self.game, self.render_mode = self._table.game, self._table.render_mode
        self.mirror = mirror_of(self.game.config.keep_mode, self._table.discrete)
        self.possible_agents, self.agents = list(PLAYERS), []
        self.observation_spaces = dict.fromkeys(PLAYERS, self._table.observation_space)
        self.action_spaces = dict.fromkeys(PLAYERS, self._table.action_space)
        self._rng = np.random.default_rng()

    def observation_space(self, agent: str) -> Space[Any]:
        """Observations of a player."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Space[Any]:
        """Actions of a player."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Begin a game; options: ``mode``, ``starter`` (1 or 2)."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._table.reset(self._rng, seed, options)
        self.agents = list(PLAYERS)
        return _of_both(*self.game.observe()), self._infos(0)

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Let both act: observations, rewards, terminations, truncations, infos with ``winner`` (1 own win, -1 own loss)."""
        step = self.game.step(self._table.action(actions["player_1"]), self._table.action(actions["player_2"]))
        terminated, truncated = self._table.ended(step)
        if terminated or truncated:
            self.agents = []
        observations, rewards = _of_both(*self.game.observe()), _of_both(*step.rewards)
        return observations, rewards, _of_both(terminated, terminated), _of_both(truncated, truncated), self._infos(step.winner)

    def render(self) -> Any:
        """Draw the game; a frame [480, 600, 3] uint8 in rgb_array mode."""
        return self._table.render()

    def close(self) -> None:
        """Close the window, if there is one."""
        self._table.close()

    def _infos(self, winner: int) -> dict[str, dict[str, Any]]:
        one, two = self.game.hints()
        return _of_both({"winner": winner, **one}, {"winner": -winner, **two})


def _of_both(one: T, two: T) -> dict[str, T]:
    return {"player_1": one, "player_2": two}
