"""The game of laser hockey: how it begins and ends, what both players see, and what they are paid.

Observations [18] are in the player's own view, in which it is player one: own and other racket (x, y, angle, and the velocities of these
three), puck (x, y, velocities), own and other hold counter; [16] without keep mode. Actions [4] in [-1, 1] push along x and y, turn,
and shoot; [3] without keep mode.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from worldmpc.envs.hockey.rink import CENTER_X, HOLD, Rink, RinkState
from worldmpc.types import Mirror

OTHER_VIEW = np.array([*range(6, 12), *range(6), *range(12, 16), 17, 16])
"""Where the entries of player one's view stand in player two's."""
OTHER_SIGN = np.array([-1, -1, 1, -1, -1, 1] * 2 + [-1] * 4 + [1, 1], np.float32)
REFLECTED = np.array([1, -1, -1, 1, -1, -1] * 2 + [1, -1, 1, -1] + [1, 1], np.float32)
"""Signs of an observation [18] in the mirror along x, which changes the game's sides in nothing."""
REFLECTED_ACTION = np.array([1, -1, -1, 1], np.float32)
CHOICES = np.array(
    [[0, 0, 0, 0], [-1, 0, 0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32
)
"""Actions of the discrete choices; the last one, to shoot, is there in keep mode alone."""
GOAL_REWARD = 10.0


def mirror_of(keep_mode: bool, discrete: bool) -> Mirror:
    """Return the symmetry of the rink that swaps its two long sides, as players see it."""
    obs = (REFLECTED if keep_mode else REFLECTED[:16]).astype(int).tolist()
    if not discrete:
        action = REFLECTED_ACTION[: 4 if keep_mode else 3].astype(int).tolist()
        return Mirror(tuple(obs), tuple(action), tuple(range(len(action))))
    order = [0, 1, 2, 4, 3, 6, 5, 7][: 8 if keep_mode else 7]  # the choices of CHOICES, up for down and left for right
    return Mirror(tuple(obs), (1,) * len(order), tuple(order))


class Mode(enum.IntEnum):
    """How a game begins, and how long it may last."""

    NORMAL = 0
    TRAIN_SHOOTING = 1
    TRAIN_DEFENSE = 2


STEP_LIMIT = {Mode.NORMAL: 250, Mode.TRAIN_SHOOTING: 80, Mode.TRAIN_DEFENSE: 80}
"""Time limits; a game ends behind the step that begins at its limit, which makes 251 and 81 steps."""


@dataclass(frozen=True)
class GameConfig:
    """Rules of a game, and which faults of the original to have."""

    mode: Mode = Mode.NORMAL
    keep_mode: bool = True
    """Rackets catch the puck."""
    alternates: bool = True
    """In NORMAL mode the puck goes to either player in turn, to player two first; otherwise to player one."""
    timed: bool = True
    """Games end at the mode's time limit."""
    keeps_counters: bool = False
    """Who holds the puck when time is over begins the next game with it held, as in the original."""


class GameStep(NamedTuple):
    """What happened in a step, for both players."""

    rewards: tuple[float, float]
    goal: bool
    """The game ended with a goal."""
    timeout: bool
    """The game ended as a draw."""
    winner: int
    """1: player one, -1: player two, 0: nobody, or nobody yet."""


class GameLike(Protocol):
    """What the faces of :mod:`worldmpc.envs.hockey.env` ask of a game; :class:`Game` says more of each part."""

    config: GameConfig
    starter: int

    def __init__(self, config: GameConfig | None = None) -> None: ...

    @property
    def limit(self) -> int:
        """Time limit; the game ends behind the step that begins at it."""
        ...

    @property
    def state(self) -> RinkState:
        """Where everything is, and how it moves."""
        ...

    def set_mode(self, mode: Mode) -> None:
        """Play another mode from the next game on."""
        ...

    def reset(self, rng: np.random.Generator, starter: int | None = None) -> None:
        """Begin a game."""
        ...

    def step(self, action1: Sequence[float], action2: Sequence[float]) -> GameStep:
        """Let both players act."""
        ...

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Both players' views."""
        ...

    def hints(self) -> tuple[dict[str, float], dict[str, float]]:
        """What reward shaping may use, for both players."""
        ...


def next_starter(config: GameConfig, mode: Mode, last: int, asked: int | None) -> int:
    """Return who begins: 1 or 2, whom is asked for, or whose turn it is behind the last one.

    Raises:
        ValueError: no such player.
    """
    if asked not in (None, 1, 2):
        raise ValueError(f"starter: expected 1, 2 or None, got {asked!r}")
    if asked is not None or mode != Mode.NORMAL:
        return asked or last
    return 3 - last if config.alternates else 1


class Game:
    """A game of two players.

    Args:
        config: its rules.
    """

    def __init__(self, config: GameConfig | None = None) -> None:
        self.config = config or GameConfig()
        self.rink = Rink(self.config.keep_mode)
        self.set_mode(self.config.mode)
        self.time = 0
        self.starter = 1
        """Whose side the puck began on: 1 or 2."""
        size = 18 if self.config.keep_mode else 16
        self._other_sign, self._other_view = OTHER_SIGN[:size], OTHER_VIEW[:size]
        self._seen: list[float] = []
        self.closeness = 0.0, 0.0
        """Both players' reward of being near a puck that lies, or comes, on their side."""

    def set_mode(self, mode: Mode) -> None:
        """Play another mode from the next game on."""
        self.mode, self.limit = mode, STEP_LIMIT[mode]
        self._near_factor = -30 / ((250 / 60) * self.limit / 2)

    @property
    def state(self) -> RinkState:
        """Where everything is, and how it moves."""
        return self.rink.state

    def reset(self, rng: np.random.Generator, starter: int | None = None) -> None:
        """Begin a game; ``starter`` has the puck on its side in NORMAL mode, otherwise whose turn it is.

        Raises:
            ValueError: no such player.
        """
        mode = self.mode
        self.starter = next_starter(self.config, mode, self.starter, starter)
        held = (self.rink.held[0], self.rink.held[1]) if self.config.keeps_counters else (0, 0)
        other, throw = (3.0, 0.0), None
        if mode != Mode.NORMAL:
            other = 3 + rng.uniform(-10 / 3, 5 / 3), rng.uniform(-2, 2)
        if mode == Mode.TRAIN_DEFENSE:
            puck = rng.uniform(0, 10 / 3), 0.8 * rng.uniform(-4, 4)
            away = -CENTER_X - puck[0], 0.6 * rng.uniform(-1.25, 1.25) - puck[1]
            speed = 60 / math.hypot(*away)
            throw = away[0] * speed, away[1] * speed
        else:
            side = 1 if self.starter == 2 and mode == Mode.NORMAL else -1
            puck = side * rng.uniform(1, 2), rng.uniform(-1, 1)
        still = (0.0, 0.0, 0.0)
        self.rink.place(RinkState((-3.0, 0.0, 0.0, *still), (*other, 0.0, *still), (*puck, *still), held))
        if throw is not None:
            self.rink.throw_puck(*throw)
        self.time = 0
        self._look()

    def step(self, action1: Sequence[float], action2: Sequence[float]) -> GameStep:
        """Let both players act, each in its own view, entries in [-1, 1]."""
        self.rink.step(action1, action2)
        self._look()
        winner = self.rink.winner
        late = self.time >= self.limit and self.config.timed
        self.time += 1
        gain = GOAL_REWARD * winner
        near1, near2 = self.closeness
        return GameStep((gain + near1, near2 - gain), winner != 0, late and winner == 0, winner)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Both players' views, float32 [18] each, or [16] without keep mode."""
        one = np.array(self._seen, np.float32)
        return one, self._other_sign * one[self._other_view]

    def hints(self) -> tuple[dict[str, float], dict[str, float]]:
        """What reward shaping may use, for both players: closeness to the puck (paid already), touching it, its direction."""
        near, held, direction = self.closeness, self.rink.held, self._seen[14] / (self.limit * 25)
        return _hints(near[0], held[0], direction), _hints(near[1], held[1], -direction)

    def place(self, state: RinkState, time: int = 0, starter: int = 1) -> None:
        """Go on from a state, in a game that is ``time`` steps old."""
        self.rink.place(state)
        self.time, self.starter = time, starter
        self._look()

    def _look(self) -> None:
        one, two, puck, held = self.rink.state
        x, y, vx, vy, _ = puck
        near1 = near2 = 0.0
        if x < 0 and vx <= 0:
            near1 = self._near_factor * math.hypot(one[0] - x, one[1] - y)
        elif x > 0 and vx >= 0:
            near2 = self._near_factor * math.hypot(two[0] - x, two[1] - y)
        self.closeness = near1, near2
        self._seen = [*one, *two, x, y, vx, vy, *(held if self.config.keep_mode else ())]


def _hints(near: float, held: int, direction: float) -> dict[str, float]:
    return {"reward_closeness_to_puck": near, "reward_touch_puck": float(held == HOLD), "reward_puck_direction": direction}
