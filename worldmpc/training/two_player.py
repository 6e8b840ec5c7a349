"""Games in training and evaluation: from a configuration to opponents, matches and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, OpponentsConfig, RunConfig
from worldmpc.data.transforms import shape_windows
from worldmpc.envs import VecEnv
from worldmpc.models.cloning import DECOY, Clone, build_decoy
from worldmpc.noise import NoiseStream, derive_seed
from worldmpc.opponents.curriculum import SUFFIXES, read_curriculum
from worldmpc.opponents.games import GameResult, play_games, tally
from worldmpc.opponents.loaders import HOCKEY, Context, is_saved, load_player, read_name
from worldmpc.opponents.match import Envs, Match, player_spec
from worldmpc.opponents.players import AgentPlayer, Player
from worldmpc.opponents.pool import SELF_PLAY, Entry, Phase, Pool, bonus_schedules
from worldmpc.opponents.simulation import Demonstrations
from worldmpc.training.checkpoint import META, load_checkpoint
from worldmpc.training.evaluator import EvalResult
from worldmpc.training.restore import identity, load_agent
from worldmpc.types import Agent, EnvSpec, Mode, Seat


def load_saved(path: Path) -> Agent | Clone:
    """Return the agent or decoy that was saved at a path, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged or neither.
        ConfigError: its agent cannot be made here.
    """
    is_run = (path / "checkpoints").is_dir() or (path / "config.json").exists()  # a run has a meta.json of its own
    if (path / META).is_file() and not is_run and load_checkpoint(path, groups=[])[1].get("kind") == DECOY:
        tree, meta = load_checkpoint(path)
        return build_decoy(meta["architecture"], tree["clone"])
    return load_agent(path, device="cpu")[0]


def copy_agent(agent: Agent) -> Agent:
    """Return an agent of its own that acts as another does now, on the same device."""
    copied = make_agent(agent.config, agent.spec, agent.device)
    copied.model.load_state_dict(agent.model.state_dict())
    return copied


def context_of(task: str, seat: Seat, mode: Mode = "eval") -> Context:
    """Return what loading an opponent needs."""
    return Context(task, seat, load_saved, mode)


def seat_opponents(envs: VecEnv, config: RunConfig) -> Envs:
    """Return environments as an agent acts in them: those of a game with opponents as configured, others as they are.

    Raises:
        ConfigError: opponents for a task of one player, or one that cannot be loaded or does not fit.
        CheckpointError: an opponent's checkpoint cannot be read.
    """
    if envs.spec.seats is None:
        _require_no_game(envs.spec, config)
        return envs
    return Match(envs, make_pool(config, envs.spec), config.seed)


def make_pool(config: RunConfig, joint: EnvSpec) -> Pool:
    """Return the pool that a configuration names, with all its players loaded.

    Raises:
        ConfigError: see :func:`seat_opponents`, or a curriculum that cannot be used.
        CheckpointError: an opponent's checkpoint cannot be read.
    """
    spec, own = player_spec(joint), config.opponents
    assert joint.seats is not None and spec.other is not None
    phases = _phases(own, joint)
    names = dict.fromkeys(entry.name for phase in phases for entry in phase.entries if entry.name != SELF_PLAY)
    equal = joint.seats[0] == joint.seats[1]
    if not equal and any(entry.name == SELF_PLAY for phase in phases for entry in phase.entries):
        raise ConfigError(
            f"opponents: {joint.name}: players see or do different things, so the learner cannot sit opposite itself; use random"
        )
    players = {name: load_player(name, context_of(joint.name, spec.other, own.mode)) for name in names}
    generator = NoiseStream(config.seed, "matchmaking").generator
    pool = Pool(phases, players, generator, copy_agent, snapshot_every=own.snapshot_every, snapshots=own.snapshots, mode=own.mode)
    pool.changes_seats = equal
    return pool


def _phases(own: OpponentsConfig, joint: EnvSpec) -> tuple[Phase, ...]:
    if own.name[0].endswith(SUFFIXES):
        phases, keep = read_curriculum(Path(own.name[0]))
        assert joint.seats is not None
        if keep is not None and joint.seats[0].obs_shape != ((18,) if keep else (16,)):
            raise ConfigError(f"opponents: {own.name[0]} has keep_mode={str(keep).lower()}, {joint.name} has not; use the task that does")
        return phases
    weights = own.weights or (1.0,) * len(own.name)
    entries = tuple(Entry(name, weight) for name, weight in zip(own.name, weights, strict=True))
    bonus, discount = bonus_schedules(own)
    return (Phase("all", entries, None, own.choose, win_bonus=bonus, win_discount=discount),)


def transform_windows(source: Any, envs: Envs, config: RunConfig, generator: torch.Generator) -> None:
    """Let a replay's windows be shaped by who won, as the pool says, and mirrored, as configured.

    Errors are those of :func:`~worldmpc.data.transforms.shape_windows`.
    """
    if not isinstance(envs, Match) or not isinstance(envs.pool, Pool):
        return shape_windows(source, envs.spec, config, generator, None, False)
    pool = envs.pool
    needed = any(phase.win_bonus.start or phase.win_bonus.final for phase in pool.phases)
    return shape_windows(source, envs.spec, config, generator, lambda: pool.win_bonus, needed)


def _require_no_game(spec: EnvSpec, config: RunConfig) -> None:
    if config.opponents != OpponentsConfig() or config.eval.opponents:
        raise ConfigError(f"opponents: {spec.name} has one player; leave them out, or play a game of two, as task=hockey")


class Fixtures:
    """The games of evaluations: a series against each of some opponents, on environments of their own.

    Args:
        envs: of both players.
        opponents: by name.
    """

    def __init__(self, envs: VecEnv, opponents: Mapping[str, Player]) -> None:
        self.envs, self.opponents = envs, dict(opponents)
        self._fresh = {name: opponent.state_dict() for name, opponent in self.opponents.items()}
        self.spec = player_spec(envs.spec)

    def play(
        self, agent: Agent, games: int, *, mode: Mode = "eval", index: int = 0, stop: Callable[[], bool] = lambda: False
    ) -> EvalResult:
        """Play a series of games against each opponent; all depends on the agent's seed and the index alone.

        Raises:
            EnvError: a game failed.
            Stopped: ``stop`` said so.
        """
        found: dict[str, list[GameResult]] = {}
        seed = derive_seed(agent.config.seed, "eval", index)
        for name, opponent in self.opponents.items():
            opponent.load_state_dict(self._fresh[name])
            found[name] = play_games(self.envs, AgentPlayer(agent, mode, index), opponent, games, seed, stop=stop)
        results = [result for series in found.values() for result in series]
        scores = [(1 + result.winner) / 2 for result in results]
        return EvalResult([result.ret for result in results], [result.length for result in results], scores, [], found)


def evaluation_opponents(config: RunConfig, joint: EnvSpec) -> dict[str, Player]:
    """Return whom evaluations play: those named for them, those that training names, or the bots of hockey, or chance.

    Raises:
        ConfigError: one that cannot be loaded or does not fit.
        CheckpointError: an opponent's checkpoint cannot be read.
    """
    assert joint.seats is not None
    names: Sequence[str] = config.eval.opponents
    if SELF_PLAY in names:
        raise ConfigError("eval.opponents: self_play changes while the agent learns; name weak, strong, random, or a checkpoint")
    if not names:
        names = list(dict.fromkeys(entry.name for phase in _phases(config.opponents, joint) for entry in phase.entries))
        names = [name for name in names if name != SELF_PLAY]
    if not names:
        names = ["weak", "strong"] if joint.name.partition("/")[0] in HOCKEY and not joint.seats[1].discrete else ["random"]
    context = context_of(joint.name, joint.seats[1], config.opponents.mode)
    return {read_name(name).label: load_player(name, context) for name in names}


def game_rows(result: EvalResult) -> list[dict[str, Any]]:
    """Return one row per opponent of an evaluation: games won, drawn, lost, and the score."""
    rows = []
    for name, series in result.games.items():
        counted = tally(series)
        rows.append({"opponent": name, "games": counted.games, **counted._asdict(), "score": counted.score})
    return rows


def attach_references(agent: Agent, games: int, met: Iterable[str] = ()) -> None:
    """Load the references of an agent that imagines opponents and is to learn from them, and watch ``games`` at once with them.

    References that plan act by their policy alone.

    Args:
        agent: any; those that imagine nobody stay as they are.
        games: as above.
        met: names of opponents that are played, which may be references under another name.

    Raises:
        ConfigError: a reference that is unknown, or sees or does other things.
        CheckpointError: a reference's checkpoint cannot be read.
    """
    simulation = getattr(agent, "simulation", None)
    if simulation is None:
        return
    context = context_of(agent.spec.name, simulation.other, "prior")._replace(key="opponent_simulation.opponent_agents")
    players = {name: load_player(name, context) for name in simulation.references}
    simulation.ids |= {name: identity(name) for name in simulation.references}
    known = {simulation.ids[name]: name for name in simulation.references}
    also = {name: known[found] for name in met if (found := identity(name) if is_saved(name) else name) in known}
    simulation.demonstrations = Demonstrations(players, games, agent.config.seed, also)
