"""Ratings of players from games won, drawn and lost (openskill: Weng and Lin 2011), and the history of games that they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from worldmpc.config import ConfigError
from worldmpc.noise import NoiseStream
from worldmpc.opponents.games import GameResult

MU, SIGMA = 25.0, 25.0 / 3
"""Of a player who has not played, as in TrueSkill; openskill's spread of a single performance, beta, is sigma / 2."""
TAU = 25.0 / 300
"""What sigma grows by before every game where players may change meanwhile, as learners do."""
ORDERS = 20
"""Orders of the games that ratings of a history are the mean over."""


class Rating(NamedTuple):
    """What is believed of a player's strength: a normal distribution."""

    mu: float = MU
    sigma: float = SIGMA

    @property
    def shown(self) -> float:
        """What tables are sorted by: a player is as good as this at least, by three standard deviations."""
        return self.mu - 3 * self.sigma


class PlayedGame(NamedTuple):
    """A game between two of several players."""

    players: tuple[str, str]
    """Names, in the order that ``winner``, ``seat`` and ``starter`` speak of."""
    result: GameResult
    seed: int
    """Of the series that it was played in."""
    number: int
    """Which of the games of these two it is, from 0."""
    facts: Mapping[str, Any] = {}
    """What else is to be known about it, as plain values."""


class Ratings:
    """Ratings of any number of players, updated by every game: Bradley and Terry's model, in which a draw is half a win.

    Args:
        tau: what sigma grows by before every game; 0: players do not change.

    Raises:
        ConfigError: openskill is not installed.
    """

    def __init__(self, tau: float = TAU) -> None:
        try:
            from openskill.models import BradleyTerryFull
        except ModuleNotFoundError as error:
            raise ConfigError("ratings need openskill; install with: pip install 'worldmpc[hockey]'") from error
        self.tau = tau
        self._model = BradleyTerryFull(mu=MU, sigma=SIGMA, beta=SIGMA / 2, tau=tau)
        self._ratings: dict[str, Rating] = {}

    def __getitem__(self, name: str) -> Rating:
        """Return the rating of a player, also of one who has not played."""
        return self._ratings.get(name, Rating())

    @property
    def players(self) -> list[str]:
        """Names of those who have played, best first."""
        return sorted(self._ratings, key=lambda name: -self._ratings[name].shown)

    def record(self, one: str, two: str, winner: float) -> None:
        """Take note of a game: 1 the first of the two has won, -1 the second, 0 nobody.

        Raises:
            ValueError: a player against itself, which says nothing, or another outcome.
        """
        if one == two:
            raise ValueError(f"ratings: {one} against itself")
        if winner not in (-1, 0, 1):
            raise ValueError(f"ratings: expected 1, 0 or -1 for who has won, got {winner}")
        model = self._model
        teams = [[model.rating(mu=self[name].mu, sigma=self[name].sigma)] for name in (one, two)]
        after = model.rate(teams, scores=[winner, -winner])
        for name, (rating,) in zip((one, two), after, strict=True):
            self._ratings[name] = Rating(rating.mu, rating.sigma)

    def state_dict(self) -> dict[str, Any]:
        """Return all ratings as JSON has them."""
        return {"tau": self.tau, "players": {name: rating._asdict() for name, rating in self._ratings.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it was made with another ``tau``.
        """
        if state["tau"] != self.tau:
            raise ValueError(f"ratings: saved with tau {state['tau']:g}, here it is {self.tau:g}")
        self._ratings = {name: Rating(**rating) for name, rating in state["players"].items()}


def rate_history(games: Iterable[PlayedGame], seed: int = 1, orders: int = ORDERS) -> dict[str, Rating]:
    """Return ratings of players who did not change while they played, best first.

    Ratings that follow game after game depend on their order, of which nothing is to be learned here. So all games are gone through
    ``orders`` times, each time from the beginning and in another random order, and mu and sigma are means: the same games give the same
    numbers, whenever and in whichever order they were played.

    Raises:
        ConfigError: openskill is not installed.
    """
    settled = sorted(games, key=lambda game: (game.players, game.number, game.seed))
    generator = NoiseStream(seed, "order of games").generator
    means: dict[str, Rating] = {}
    for _ in range(orders):
        ratings = Ratings(tau=0.0)
        for index in torch.randperm(len(settled), generator=generator).tolist():
            game = settled[int(index)]
            ratings.record(*game.players, game.result.winner)
        for name in ratings.players:
            before, now = means.get(name, Rating(0.0, 0.0)), ratings[name]
            means[name] = Rating(before.mu + now.mu / orders, before.sigma + now.sigma / orders)
    return dict(sorted(means.items(), key=lambda item: (-item[1].shown, item[0])))


class History:
    """Games in a file to which lines are only ever added: one JSON object per game.

    A writer that is killed leaves at most one line that has no end. Reading passes over it, and the next writer takes it away.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[PlayedGame]:
        """Return all games, in the order of their lines.

        Raises:
            ConfigError: a line that is damaged, by its number.
        """
        lines, _ = self._lines()
        return [self._game(line, number) for number, line in enumerate(lines, 1)]

    def add(self, games: Sequence[PlayedGame]) -> None:
        """Add games, which are on the disk afterwards.

        Raises:
            OSError: they could not be written.
        """
        text = "".join(json.dumps(_plain(game)) + "\n" for game in games)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _, whole = self._lines()
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> tuple[list[bytes], int]:
        """Return the lines that have an end, and how many bytes they are."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        return content[:whole].split(b"\n")[:-1], whole

    def _game(self, line: bytes, number: int) -> PlayedGame:
        try:
            values = dict(json.loads(line))
            one, two = (str(name) for name in values.pop("players"))
            winner, seat, starter = values.pop("winner"), values.pop("seat"), values.pop("starter")
            if winner not in (-1, 0, 1) or seat not in (1, 2) or starter not in (1, 2, None):
                raise ValueError("winner, seat or starter out of range")
            result = GameResult(int(winner), float(values.pop("return")), int(values.pop("length")), seat, starter)
            return PlayedGame((one, two), result, int(values.pop("seed")), int(values.pop("number")), values)
        except (ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{self.path}, line {number}: no game ({type(error).__name__}: {reason}); take the line out, or choose another file"
            ) from error


def _plain(game: PlayedGame) -> dict[str, Any]:
    result = game.result
    return {
        "players": list(game.players),
        "winner": result.winner,
        "seat": result.seat,
        "starter": result.starter,
        "length": result.length,
        "return": result.ret,
        "seed": game.seed,
        "number": game.number,
        **game.facts,
    }
