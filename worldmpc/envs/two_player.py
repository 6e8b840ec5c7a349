"""Games of two players, from any PettingZoo parallel environment: both views and both actions beside each other."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from pettingzoo import AECEnv, ParallelEnv

from worldmpc.config import ConfigError
from worldmpc.envs.wrappers import UNBOUNDED
from worldmpc.types import Mirror, Seat


class JointEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A parallel environment of two players as a Gymnasium environment of both, in which one of them is *the player*.

    Observations [O1 + O2] are the player's own view, then the other's; actions [A1 + A2] are the player's, then the other's: in [-1, 1], or
    of Discrete ones a number for each choice, of which the largest is taken. Reward is the player's. Info has ``success``: who has won,
    1 the player, -1 the other, 0 nobody, from the environment's own ``winner`` where it has one, else by the larger return so far.

    Args:
        env: of exactly two players, who begin and end an episode together.
        seat: 1 or 2, which of them the player is where nobody asks for another; ``reset(options={"seat": 2})`` does.
        name: what errors call it; None: the name in its metadata, or that of its class.

    Raises:
        ConfigError: another number of players, players who take turns, or spaces that are not supported.
    """

    def __init__(self, env: ParallelEnv[Any, Any, Any], seat: int = 1, name: str | None = None) -> None:
        self.parallel, self.metadata = env, dict(getattr(env, "metadata", None) or {})
        self.name: str = name or self.metadata.get("name") or type(getattr(env, "unwrapped", env)).__name__
        self.render_mode = getattr(env, "render_mode", None)
        if isinstance(env, AECEnv):
            raise ConfigError(f"{self.name}: players take turns; make it a parallel environment, with pettingzoo.utils.aec_to_parallel")
        players = list(env.possible_agents)
        if len(players) != 2:
            raise ConfigError(f"{self.name}: expected two players, got {len(players)} ({', '.join(map(str, players))})")
        self._players = players
        both = [_Side(env, player, self.name) for player in players]
        self._sides = dict(zip(players, both, strict=True))
        self.equal = both[0].seat == both[1].seat
        """Whether the players may change seats: both see and do the same kind of things."""
        self._first_seat = seat
        self._take_seat(seat)
        self.seats: tuple[Seat, Seat] = (self._own.seat, self._other.seat)
        self.mirror: Mirror | None = getattr(env, "mirror", None)
        low = np.concatenate([self._own.low, self._other.low])
        high = np.concatenate([self._own.high, self._other.high])
        self.observation_space = Box(low, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (self._own.seat.action_dim + self._other.seat.action_dim,), np.float32)
        self._returns = dict.fromkeys(players, 0.0)
        self._shaping: dict[str, float] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; of the options ``seat`` and ``shaping`` are read here, all others are the environment's own.

        ``seat`` is 1 or 2; ``shaping`` is what entries of the player's info weigh in its reward, by name, and says nothing of who wins.

        Raises:
            ConfigError: a seat whose observations or actions are of another kind.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        self._take_seat(int(options.pop("seat", self._first_seat)))
        self._shaping = dict(options.pop("shaping", None) or {})
        observations, _ = self.parallel.reset(seed=seed, options=options or None)
        self._returns = dict.fromkeys(self._players, 0.0)
        return self._joint(observations), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Let both act: [A1 + A2] -> both views [O1 + O2], the player's reward, terminated, truncated, info with ``success``.

        Raises:
            ConfigError: a shaping of what is not in the player's info.
        """
        split = self._own.seat.action_dim
        actions = {self._own.player: self._own.action(action[:split]), self._other.player: self._other.action(action[split:])}
        observations, rewards, terminations, truncations, infos = self.parallel.step(actions)
        for player in self._players:
            self._returns[player] += float(rewards[player])
        reward = float(rewards[self._own.player])
        if self._shaping:
            reward += self._hints(infos.get(self._own.player, {}))
        info = {"success": self._winner(infos)}
        return self._joint(observations), reward, any(terminations.values()), any(truncations.values()), info

    def render(self) -> Any:
        """Draw the game."""
        return self.parallel.render()

    def close(self) -> None:
        """Free the environment."""
        self.parallel.close()

    def _take_seat(self, seat: int) -> None:
        if seat not in (1, 2):
            raise ConfigError(f"{self.name}: seat: expected 1 or 2, got {seat}")
        if seat != self._first_seat and not self.equal:
            raise ConfigError(f"{self.name}: the players see or do different things; the seat stays {self._first_seat}")
        self._own, self._other = (self._sides[self._players[index]] for index in (seat - 1, 2 - seat))

    def _joint(self, observations: dict[Any, np.ndarray]) -> np.ndarray:
        views = [np.asarray(observations[side.player], np.float32).ravel() for side in (self._own, self._other)]
        return np.concatenate(views)

    def _hints(self, info: dict[str, Any]) -> float:
        """Return what the info of a player adds to its reward."""
        for name in self._shaping:
            if name not in info:
                raise ConfigError(f"{self.name}: shaping: the players' info has no {name!r}; it has {', '.join(info) or 'nothing'}")
        return sum(weight * float(info[name]) for name, weight in self._shaping.items())

    def _winner(self, infos: dict[Any, dict[str, Any]]) -> float:
        """Return 1 where the player has won, -1 where the other has, else 0."""
        own, other = self._own.player, self._other.player
        if "winner" in infos.get(own, {}):
            return float(infos[own]["winner"])
        difference = self._returns[own] - self._returns[other]
        return math.copysign(1.0, difference) if difference else 0.0


class _Side:
    """One player's spaces, and its actions as the environment takes them."""

    def __init__(self, env: ParallelEnv[Any, Any, Any], player: Any, name: str) -> None:
        self.player = player
        observations: Space[Any] = env.observation_space(player)
        actions: Space[Any] = env.action_space(player)
        if not isinstance(observations, Box) or len(observations.shape) != 1 or 0 in observations.shape:
            raise ConfigError(f"{name}: observations of {player} are not supported ({observations}), only a Box with one axis")
        self.low, self.high = observations.low.astype(np.float32), observations.high.astype(np.float32)
        if isinstance(actions, Discrete):
            self.seat = Seat(observations.shape, int(actions.n), True)
        elif isinstance(actions, Box) and _is_bounded(actions):
            self.seat = Seat(observations.shape, actions.shape[0])
            dtype = actions.dtype
            self._centre, self._half = ((actions.high + actions.low) / 2).astype(dtype), ((actions.high - actions.low) / 2).astype(dtype)
        else:
            raise ConfigError(
                f"{name}: actions of {player} are not supported ({actions}), only Discrete and a bounded float Box of one axis"
            )
        self._space = actions

    def action(self, action: np.ndarray) -> Any:
        """Return the environment's own action: [A] in [-1, 1] within the bounds, or the number of the largest entry."""
        space = self._space
        if isinstance(space, Discrete):
            return int(space.start) + int(np.argmax(action))
        assert isinstance(space, Box)
        clipped = np.clip(np.asarray(action, space.dtype), -1.0, 1.0)
        # Rounding may step over the bound by one unit in the last place, which some environments assert on.
        return np.clip(self._centre + self._half * clipped, space.low, space.high)


def _is_bounded(actions: Box) -> bool:
    usual = np.issubdtype(actions.dtype, np.floating) and len(actions.shape) == 1 and 0 not in actions.shape
    return bool(usual and max(np.abs(actions.low).max(), np.abs(actions.high).max()) < UNBOUNDED)
