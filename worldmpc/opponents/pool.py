"""Whom we play: players by name, and the choice among them for every game."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from worldmpc.config import ConfigError, OpponentsConfig
from worldmpc.opponents.players import AgentPlayer, Player
from worldmpc.types import Agent, Mode

SELF_PLAY = "self_play"
"""The name that stands for snapshots of the learner."""
RATE = 0.05
"""Weight of the last game in the running score against an opponent."""
LEAST_WEIGHT = 0.01
"""Of an opponent with prioritised choice, however sure the outcome: p (1 - p) is 0.25 at most."""


class Game(NamedTuple):
    """Who sits opposite in a game, and what it begins with."""

    opponent: str
    options: dict[str, Any] | None
    """As ``reset`` of the environment takes them."""


@dataclass(frozen=True)
class Entry:
    """One of several opponents to choose from."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """A number that stays at ``start`` for ``hold`` games, then goes to ``final`` linearly within ``anneal`` games."""

    start: float = 0.0
    final: float = 0.0
    hold: int = 0
    anneal: int = 0

    def at(self, games: int) -> float:
        """Return it after a number of games."""
        done = games - self.hold
        if done < 0:
            return self.start
        return self.final if done >= self.anneal else self.start + (self.final - self.start) * done / self.anneal


def bonus_schedules(config: OpponentsConfig) -> tuple[Schedule, Schedule]:
    """Return bonus and discount of won games, over games, as configured."""
    return Schedule(config.win_bonus, config.win_bonus_final, 0, config.win_bonus_games), Schedule(config.win_discount, config.win_discount)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: against whom, in which modes, and with which help."""

    name: str
    entries: tuple[Entry, ...]
    games: int | None = None
    """How many; None: all that are left."""
    choose: Literal["weighted", "pfsp"] = "weighted"
    modes: tuple[tuple[Mapping[str, Any], float], ...] = (({}, 1.0),)
    """Options of games and their weights, drawn for each."""
    shaping: Mapping[str, Schedule] = field(default_factory=dict)
    """Weights of the environment's hints in the reward, by hint."""
    win_bonus: Schedule = field(default_factory=Schedule)
    win_discount: Schedule = field(default_factory=lambda: Schedule(0.92, 0.92))
    clear_replay: bool = False
    """Begin with an empty replay."""


class Matchmaker(Protocol):
    """Says who plays next, and is told how it ended."""

    players: dict[str, Player]
    """Everybody who may be chosen, in the order they came; their places are their numbers in the replay."""

    def next_game(self, env: int) -> Game:
        """Choose the next game of an environment."""
        ...

    def report(self, env: int, opponent: str, winner: float) -> None:
        """Take note of a game that ended: 1 the learner has won, -1 the opponent, 0 nobody."""
        ...

    def follow(self, agent: Agent, decisions: int) -> None:
        """Look at the learner after a number of decisions."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what choices go on from exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], agent: Agent | None) -> None:
        """Restore what :meth:`state_dict` returned; ``agent`` is what snapshots were taken of."""
        ...


class Pool:
    """Chooses an opponent at random for every game, phase after phase, and takes snapshots of the learner.

    ``weighted``: by the entries' weights. ``pfsp`` (prioritised fictitious self-play, Vinyals et al. 2019): by weight times p (1 - p),
    where p is the running score against an opponent, so that those come most whose games are open. The snapshots of ``self_play`` share
    its weight alike, each of them then prioritised for itself.

    Args:
        phases: one after the other; the last one goes on.
        players: those of the entries by name; snapshots come to them.
        generator: of all choices; saving it is this object's business.
        copy_agent: returns an agent that acts as another does now, and goes on so while that one learns.
        snapshot_every: decisions between snapshots.
        snapshots: most of them that are kept; the oldest give way.
        mode: how snapshots act.

    Raises:
        ConfigError: no phase, or an entry that nobody was loaded for.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        players: Mapping[str, Player],
        generator: torch.Generator,
        copy_agent: Callable[[Agent], Agent],
        *,
        snapshot_every: int = 20_000,
        snapshots: int = 10,
        mode: Mode = "eval",
    ) -> None:
        names = {entry.name for phase in phases for entry in phase.entries}
        if missing := sorted(names - players.keys() - {SELF_PLAY}):
            raise ConfigError(f"opponents: nobody was loaded for {', '.join(missing)}")
        if not phases or not all(phase.entries for phase in phases):
            raise ConfigError("opponents: expected at least one phase, and an opponent in each")
        self.phases, self.players, self.generator, self.copy_agent = tuple(phases), dict(players), generator, copy_agent
        self.fixed = tuple(self.players)
        """Names of those who are no snapshots."""
        self.snapshot_every, self.most_snapshots = snapshot_every, snapshots
        self.mode: Mode = mode
        self.plays_itself = SELF_PLAY in names
        self.changes_seats = True
        """False where the players see or do different things."""
        self.snapshots: list[str] = []
        """Names of those that may be chosen; others have a number, and a player while a game of theirs is under way."""
        self.scores: dict[str, float] = {}
        """Running score against each opponent: 1 where the learner wins, 0.5 a draw."""
        self.games: dict[str, list[int]] = {}
        """Games won, drawn and lost against each opponent."""
        self.begun = 0
        """Games that have begun."""
        self._playing: dict[int, str] = {}
        self.clears_replay = False
        """Set where a phase begins that wants an empty replay; whoever empties it unsets it."""

    @property
    def phase(self) -> Phase:
        """The phase of the game that began last; the first one before there is any."""
        return self.phases[self._place(self.begun - 1)[0]]

    @property
    def games_in_phase(self) -> int:
        """Games of that phase that began before that one."""
        return self._place(self.begun - 1)[1]

    @property
    def win_bonus(self) -> tuple[float, float]:
        """Return bonus and discount of won games, as they are now: those of the game that began last."""
        phase, games = self.phase, self.games_in_phase
        return phase.win_bonus.at(games), phase.win_discount.at(games)

    def next_game(self, env: int) -> Game:
        """Choose the next game of an environment."""
        before = self.phase
        self.begun += 1
        phase, games = self.phase, self.games_in_phase
        self.clears_replay |= phase is not before and phase.clear_replay
        candidates = [(name, weight) for entry in phase.entries for name, weight in self._stands_for(entry, phase.choose)]
        opponent = candidates[self._draw([weight for _, weight in candidates])][0]
        options = dict(phase.modes[self._draw([weight for _, weight in phase.modes])][0])
        if phase.shaping:
            options["shaping"] = {hint: schedule.at(games) for hint, schedule in phase.shaping.items()}
        options["seat"] = 2 - self.begun % 2 if self.changes_seats else 1
        self._playing[env] = opponent
        self._release()
        return Game(opponent, options)

    def report(self, env: int, opponent: str, winner: float) -> None:
        """Take note of a game that ended."""
        self.games.setdefault(opponent, [0, 0, 0])[1 - int(winner)] += 1
        self.scores[opponent] = (1 - RATE) * self.scores.get(opponent, 0.5) + RATE * (1 + winner) / 2

    def follow(self, agent: Agent, decisions: int) -> None:
        """Take a snapshot where one is due; the first one is of the untrained learner."""
        if not self.plays_itself or decisions // self.snapshot_every < self._taken:
            return
        name = f"snapshot-{decisions:09d}"
        if name not in self.players:
            self._add_snapshot(name, self.copy_agent(agent))

    @property
    def _taken(self) -> int:
        """How many snapshots were taken, given up ones included."""
        return len(self.players) - len(self.fixed)

    def _add_snapshot(self, name: str, agent: Agent) -> None:
        self.players[name] = AgentPlayer(agent, self.mode)
        self.snapshots.append(name)
        if len(self.snapshots) > self.most_snapshots:
            del self.snapshots[0]
            self._release()

    def _release(self) -> None:
        """Forget the agents of snapshots that gave way and whose last game is over."""
        for name in self.players.keys() - {*self.fixed, *self.snapshots, *self._playing.values()}:
            self.players[name] = _Gone()

    def _place(self, game: int) -> tuple[int, int]:
        """Return the number of the phase that a game belongs to, counted from 0, and the games of it before that one."""
        left = max(game, 0)
        for number, phase in enumerate(self.phases[:-1]):
            if phase.games is None or left < phase.games:
                return number, left
            left -= phase.games
        return len(self.phases) - 1, left

    def _stands_for(self, entry: Entry, choose: str) -> list[tuple[str, float]]:
        names = self.snapshots if entry.name == SELF_PLAY else [entry.name]
        return [(name, entry.weight / len(names) * (1.0 if choose == "weighted" else self._openness(name))) for name in names]

    def _openness(self, name: str) -> float:
        score = self.scores.get(name, 0.5)
        return max(score * (1 - score), LEAST_WEIGHT)

    def _draw(self, weights: Sequence[float]) -> int:
        total = list(itertools.accumulate(weights))
        if not total or total[-1] <= 0:
            raise ConfigError("opponents: nobody can be chosen; self_play needs a snapshot of the learner first")
        uniform = float(torch.rand((), dtype=torch.float64, generator=self.generator)) * total[-1]
        return next((index for index, value in enumerate(total) if uniform < value), len(total) - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return players' names and states, records, counters, and the parameters of snapshots."""
        taken = {name: player for name, player in self.players.items() if name not in self.fixed}
        return {
            "generator": self.generator.get_state(),
            "fixed": list(self.fixed),
            "names": list(self.players),
            "players": {name: player.state_dict() for name, player in self.players.items()},
            "agents": {name: dict(player.agent.model.state_dict()) for name, player in taken.items() if isinstance(player, AgentPlayer)},
            "snapshots": list(self.snapshots),
            "playing": [[env, name] for env, name in self._playing.items()],
            "scores": dict(self.scores),
            "games": {name: list(counts) for name, counts in self.games.items()},
            "begun": self.begun,
            "clears_replay": self.clears_replay,
        }

    def load_state_dict(self, state: Mapping[str, Any], agent: Agent | None) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: snapshots, and no agent that they were taken of, or other opponents than are here.
        """
        if list(self.fixed) != list(state["fixed"]):
            raise ValueError(f"saved with the opponents {', '.join(state['fixed'])}, here are {', '.join(self.fixed)}")
        if state["agents"] and agent is None:
            raise ValueError("snapshots need the agent that they were taken of")
        self.generator.set_state(state["generator"])
        self.players = {name: self.players[name] for name in self.fixed}
        for name in state["names"][len(self.fixed) :]:
            self.players[name] = _Gone()
            if agent is not None and name in state["agents"]:
                copy = self.copy_agent(agent)
                copy.model.load_state_dict(state["agents"][name])
                self.players[name] = AgentPlayer(copy, self.mode)
        self.snapshots = list(state["snapshots"])
        self._playing = {int(env): name for env, name in state["playing"]}
        for name, own in state["players"].items():
            self.players[name].load_state_dict(own)
        self.scores = {name: float(score) for name, score in state["scores"].items()}
        self.games = {name: [int(count) for count in counts] for name, counts in state["games"].items()}
        self.begun, self.clears_replay = int(state["begun"]), bool(state["clears_replay"])


class _Gone:
    """A snapshot that gave way: it has a number, and plays no more."""

    def init_carry(self, games: int, generator: torch.Generator) -> Any:
        raise RuntimeError("this snapshot was given up and cannot play")

    def act(self, carry: Any, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, Any]:
        raise RuntimeError("this snapshot was given up and cannot play")

    def watch(self, carry: Any, obs: Tensor, other_action: Tensor) -> Any:
        raise RuntimeError("this snapshot was given up and cannot play")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
