"""Games between those that somebody names: an agent against opponents, and everybody against everybody."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from worldmpc.config import ConfigError, EnvConfig, RunConfig
from worldmpc.envs import VecEnv, make_envs
from worldmpc.noise import derive_seed
from worldmpc.opponents.games import play_games
from worldmpc.opponents.loaders import load_player, read_name
from worldmpc.opponents.players import Player
from worldmpc.opponents.pool import SELF_PLAY
from worldmpc.opponents.ratings import History, PlayedGame
from worldmpc.training.evaluator import EvalResult
from worldmpc.training.restore import identity
from worldmpc.training.two_player import Fixtures, context_of, evaluation_opponents
from worldmpc.types import Agent, EnvSpec, Mode

SERIES = 20
"""Games of a tournament that are played side by side and written down together; a multiple of 4, for both seats and both starters."""


def play_against(
    agent: Agent, envs: VecEnv, games: int, opponents: Sequence[str] | None = None, *, mode: Mode = "eval", index: int = 0
) -> EvalResult:
    """Let an agent play a series of games against each of some opponents.

    Args:
        agent: plays.
        envs: of both players; they are reset.
        games: against each.
        opponents: their names, see :mod:`worldmpc.opponents.loaders`; None: those that evaluations of its training play.
        mode: who acts.
        index: another number gives other games.

    Raises:
        ConfigError: an opponent that is unknown, is named twice or does not fit, or a mode that the agent does not have.
        CheckpointError: an opponent's checkpoint cannot be read.
        EnvError: a game failed.
    """
    if mode not in agent.modes:
        raise ConfigError(f"mode: agent={agent.config.agent} as configured acts in {' or '.join(agent.modes)}, not in '{mode}'")
    config = agent.config if opponents is None else playing_against(agent.config, opponents)
    return Fixtures(envs, evaluation_opponents(config, envs.spec)).play(agent, games, mode=mode, index=index)


def playing_against(config: RunConfig, opponents: Sequence[str]) -> RunConfig:
    """Return a configuration whose evaluations play these opponents.

    Raises:
        ConfigError: nobody, somebody twice, an unknown name, or a name that means something in training alone.
    """
    if not opponents:
        raise ConfigError("opponents: expected at least one, as in opponents=[weak,strong]")
    check_names(opponents, "opponents")
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, opponents=tuple(opponents)))


def check_names(names: Sequence[str], option: str) -> None:
    """Check that players can be told apart and may be there, before anything is loaded.

    Raises:
        ConfigError: somebody twice, an unknown name, or a name that means something in training alone.
    """
    labels: list[str] = []
    for name in names:
        if name == SELF_PLAY:
            raise ConfigError(f"{option}: {SELF_PLAY} stands for snapshots in training; name a run or a checkpoint")
        label = read_name(name).label
        if label in labels:
            raise ConfigError(f"{option}: {label} is named twice; name different ones")
        labels.append(label)


class Entrant(NamedTuple):
    """Who takes part in a tournament."""

    label: str
    """How tables call it."""
    source: str
    """What it was loaded from, see :mod:`worldmpc.opponents.loaders`."""
    id: str
    """What it is known by wherever it lies."""
    player: Player


def enter(players: Mapping[str, str], spec: EnvSpec, mode: Mode = "eval") -> list[Entrant]:
    """Load all players of a tournament.

    Args:
        players: label -> name.
        spec: of the game's environments.
        mode: how those that plan act.

    Raises:
        ConfigError: fewer than two, an unknown one, one that does not fit, or a game whose players are not alike or that is none of two.
        CheckpointError: a checkpoint cannot be read.
    """
    if spec.seats is None:
        raise ConfigError(f"task: {spec.name} has one player; tournaments are for games of two, as task=hockey")
    if spec.seats[0] != spec.seats[1]:
        raise ConfigError(f"task: the players of {spec.name} see or do different things, so nobody can take both seats")
    if len(players) < 2:
        raise ConfigError(f"players: expected at least two different ones, as in players=[weak,strong], got {', '.join(players) or 'none'}")
    context = context_of(spec.name, spec.seats[0], mode)
    return [Entrant(label, name, identity(name), load_player(name, context)) for label, name in players.items()]


class Tournament:
    """Everybody against everybody, from both seats and with both starters; games that a history has already are not played again.

    A game depends on the seed, the names of its two players, its number, and in the last series on how many games there are: more players
    and more games can come later.

    Args:
        task: the game.
        entrants: who plays.
        games: of each pair.
        seed: of all games.
        history: where games are written down, one series after the other.
        mode: how players that plan act; it is written down.

    Raises:
        ConfigError: the history has games of another task, mode or seed, or of other players with these names, or a damaged line.
    """

    def __init__(self, task: str, entrants: Sequence[Entrant], games: int, seed: int, history: History, mode: Mode = "eval") -> None:
        self.task, self.games, self.seed, self.history, self.mode = task, games, seed, history, mode
        self.entrants = {entrant.label: entrant for entrant in entrants}
        self.pairs = [(min(pair), max(pair)) for pair in itertools.combinations(self.entrants, 2)]
        """Who plays whom, in the order of names, so that it is the same whoever was named first."""
        self.played: dict[tuple[str, str], dict[int, PlayedGame]] = {pair: {} for pair in self.pairs}
        """Games of each pair by number."""
        for game in history.read():
            if game.players in self.played:
                self._check(game)
                if game.number < games:
                    self.played[game.players][game.number] = game

    def play(self, pair: tuple[str, str]) -> Iterator[int]:
        """Play what is missing of a pair's games, and yield how many there are after each series.

        Raises:
            EnvError: a game failed.
            OSError: the history could not be written.
        """
        found = self.played[pair]
        with make_envs(self.task, EnvConfig(num_envs=min(SERIES, self.games))) as envs:
            for first in range(0, self.games, SERIES):
                numbers = range(first, min(first + SERIES, self.games))
                if all(number in found for number in numbers):
                    continue
                series = self._series(envs, pair, numbers)
                new = [game for game in series if game.number not in found]
                self.history.add(new)
                found.update({game.number: game for game in new})
                yield len(found)

    def all_games(self) -> list[PlayedGame]:
        """Return the games of all pairs."""
        return [games[number] for games in self.played.values() for number in sorted(games)]

    def _series(self, envs: VecEnv, pair: tuple[str, str], numbers: range) -> list[PlayedGame]:
        one, two = (self.entrants[name] for name in pair)
        seed = self._seed(pair, numbers[0])
        for entrant in (one, two):
            entrant.player.load_state_dict({"turns": 0})
        results = play_games(envs, one.player, two.player, len(numbers), seed)
        return [PlayedGame(pair, result, seed, number, self._facts(pair)) for number, result in zip(numbers, results, strict=True)]

    def _seed(self, pair: tuple[str, str], number: int) -> int:
        return derive_seed(self.seed, "tournament", *pair, number // SERIES)

    def _facts(self, pair: tuple[str, str]) -> dict[str, object]:
        return {"task": self.task, "mode": self.mode, "ids": [self.entrants[name].id for name in pair]}

    def _check(self, game: PlayedGame) -> None:
        expected = self._facts(game.players) | {"seed": self._seed(game.players, game.number)}
        saved = dict(game.facts) | {"seed": game.seed}
        what = {"task": "another task", "mode": "another mode", "ids": "other players of these names", "seed": "another seed"}
        for name, words in what.items():
            if saved.get(name) != expected[name]:
                who = " and ".join(game.players)
                raise ConfigError(f"out: {self.history.path} has games of {who} with {words}; choose another folder, or play as then")


def entrants_of(names: Sequence[str]) -> dict[str, str]:
    """Return label -> name of players that are named as ``name`` or ``label=name``.

    Raises:
        ConfigError: an empty or unknown name, or a label twice.
    """
    found: dict[str, str] = {}
    for text in names:
        label, name = _labelled(text)
        check_names([name], "players")
        label = label or read_name(name).label
        if label in found:
            raise ConfigError(f"players: {label} is there twice; give different labels, as in [a={name},b={name}]")
        found[label] = name
    return found


def _labelled(text: str) -> tuple[str | None, str]:
    """Return (label, name); a path may have '=' in it."""
    label, equals, name = text.partition("=")
    if not equals or Path(text).exists():
        return None, text
    if not label or not name:
        raise ConfigError(f"players: expected name or label=name, as in [weak,mine=runs/x], got '{text}'")
    return label, name
