"""Whole games between two players, from both seats and with both starters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from worldmpc.envs.vector import VecEnv
from worldmpc.functional import tree_put, tree_rows
from worldmpc.noise import NoiseStream
from worldmpc.opponents.loaders import HOCKEY
from worldmpc.opponents.players import Player


class GameResult(NamedTuple):
    """A finished game, as its first player saw it."""

    winner: int
    """1 the player, -1 the opponent, 0 nobody."""
    ret: float
    """Sum of the player's rewards."""
    length: int
    """Steps of the game."""
    seat: int
    """Which of the two the player was."""
    starter: int | None
    """1: the player had the first move, 2: the opponent; None where that cannot be chosen."""


class Tally(NamedTuple):
    """Games won, drawn and lost."""

    won: int
    drawn: int
    lost: int

    @property
    def games(self) -> int:
        """All of them."""
        return self.won + self.drawn + self.lost

    @property
    def score(self) -> float:
        """A point for a game won and half of one for a draw, per game."""
        return (self.won + self.drawn / 2) / self.games if self.games else math.nan


def tally(results: Sequence[GameResult]) -> Tally:
    """Count the outcomes of games."""
    outcomes = [result.winner for result in results]
    return Tally(outcomes.count(1), outcomes.count(0), outcomes.count(-1))


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a rate (Wilson 1927), of 95 % by default."""
    if not total:
        return 0.0, 1.0
    rate, scale = count / total, 1 + z * z / total
    centre, half = rate + z * z / (2 * total), z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


class Stopped(Exception):
    """An evaluation was asked to end before it was complete."""


def fixture(number: int, changes_seats: bool, starters: bool) -> tuple[int, int | None]:
    """Return the player's seat in a game of a series, 1, 2, 1, 2, ..., and who starts: the player twice, the opponent twice, and so on."""
    return 1 + number % 2 if changes_seats else 1, 1 + number // 2 % 2 if starters else None


def play_games(
    envs: VecEnv,
    player: Player,
    opponent: Player,
    games: int,
    seed: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    frames: list[np.ndarray] | None = None,
    options: dict[str, Any] | None = None,
) -> list[GameResult]:
    """Play a series of games side by side, and return them in the order of their numbers.

    Game ``n`` has seat and starter of :func:`fixture`; how it begins depends on ``(seed, n)`` and the number of environments alone. Players
    share their random numbers among the games that are under way, so that results are those of the same series again.

    Args:
        envs: of both players; they are reset.
        player: takes the fixtures' seat.
        opponent: takes the other.
        games: how many.
        seed: of games and players.
        stop: asked before every step; where it says True the series ends.
        frames: gets those of game 0, where the environments render.
        options: of every game, as ``mode``.

    Raises:
        EnvError: a game failed.
        Stopped: ``stop`` said so.
        ValueError: the environments are no game of two.
    """
    if envs.spec.seats is None:
        raise ValueError(f"{envs.spec.name}: has one player")
    own, other = envs.spec.seats
    count = envs.num_envs
    starters = envs.spec.name.partition("/")[0] in HOCKEY
    begun = [0] * count

    def begin(env: int) -> dict[str, Any]:
        seat, starter = fixture(env + count * begun[env], own == other, starters)
        begun[env] += 1
        first = {} if starter is None else {"starter": seat if starter == 1 else 3 - seat}
        return {**(options or {}), "seat": seat, **first}

    before, envs.options = envs.options, begin
    try:
        return _series(envs, player, opponent, games, seed, stop, frames, own == other, starters)
    finally:
        envs.options = before


def _series(
    envs: VecEnv,
    player: Player,
    opponent: Player,
    games: int,
    seed: int,
    stop: Callable[[], bool],
    frames: list[np.ndarray] | None,
    changes_seats: bool,
    starters: bool,
) -> list[GameResult]:
    assert envs.spec.seats is not None
    own, other = envs.spec.seats
    width, count = own.obs_shape[0], envs.num_envs
    streams = [NoiseStream(seed, name).generator for name in ("player", "opponent")]
    sides = [player, opponent]
    obs = envs.reset(seed)
    carries = [side.init_carry(count, generator) for side, generator in zip(sides, streams, strict=True)]
    quota = [len(range(env, games, count)) for env in range(count)]
    played, lengths, returns = [0] * count, torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    found: dict[int, GameResult] = {}
    active = torch.tensor([share > 0 for share in quota])
    while active.any():
        if stop():
            raise Stopped
        if frames is not None and not played[0]:
            frames.append(envs.render()[0])
        where = active.nonzero().flatten()
        action = torch.zeros(count, own.action_dim + other.action_dim)
        views, parts = (obs[:, :width], obs[:, width:]), (slice(0, own.action_dim), slice(own.action_dim, None))
        for index, (side, view, part) in enumerate(zip(sides, views, parts, strict=True)):
            chosen, then = side.act(tree_rows(carries[index], where), view[where], streams[index])
            action[where, part] = chosen.to(action)
            carries[index] = tree_put(carries[index], where, then)
        envs.step_async(action, active)
        for index, (side, view, part) in enumerate(zip(sides, views, parts[::-1], strict=True)):
            then = side.watch(tree_rows(carries[index], where), view[where], action[where, part])
            carries[index] = tree_put(carries[index], where, then)
        step = envs.step_wait()
        obs = step.obs
        returns += step.reward
        lengths += step.valid
        over = (step.terminated | step.truncated).nonzero().flatten()
        for env in over.tolist():
            number = env + count * played[env]
            seat, starter = fixture(number, changes_seats, starters)
            winner = int(step.success[env].nan_to_num(0.0))
            found[number] = GameResult(winner, float(returns[env]), int(lengths[env]), seat, starter)
            played[env] += 1
            active[env] = played[env] < quota[env]
        if len(over):
            lengths[over], returns[over] = 0, 0.0
            for index, (side, generator) in enumerate(zip(sides, streams, strict=True)):
                blank = side.init_carry(count, generator)
                carries[index] = tree_put(carries[index], over, tree_rows(blank, over))
    return [found[number] for number in sorted(found)]
