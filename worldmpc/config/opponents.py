"""Configuration of games of two: whom we play, and whom we imagine; and which of their values go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from worldmpc.config.base import ConfigError, key

if TYPE_CHECKING:
    from worldmpc.config.run import RunConfig


@dataclass(frozen=True)
class OpponentsConfig:
    """Whom a two-player task is played against."""

    name: tuple[str, ...] = key(
        ("self_play",),
        "opponents=weak, [weak,strong], a checkpoint's or run's path, TYPE:path, self_play (snapshots of the learner), or a curriculum "
        "file (.json, .yaml)",
    )
    weights: tuple[float, ...] = key((), "how often each of them is chosen; empty: alike")
    choose: Literal["weighted", "pfsp"] = key(
        "weighted", "per game: by weights, or by weight times p (1 - p) of the running score p, so that open games come most"
    )
    snapshot_every: int = key(20_000, "self_play: decisions between snapshots")
    snapshots: int = key(10, "self_play: newest snapshots that are played against")
    mode: Literal["eval", "prior"] = key(
        "eval", "how opponents that plan act: eval: as in evaluations; prior: by their policy alone, faster"
    )
    win_bonus: float = key(
        0.0, "reward added to the steps of won games at sampling, discounted from their end; a curriculum says it itself"
    )
    win_bonus_final: float = key(0.0, "what win_bonus falls to")
    win_bonus_games: int = key(2_000, "games within which it does, linearly")
    win_discount: float = key(0.92, "discount of win_bonus per step")


@dataclass(frozen=True)
class OpponentSimulationConfig:
    """Opponents that plans imagine: cloned from references, and from everybody that was met."""

    enabled: bool = key(False, "dynamics and reward read the other player's action, and plans imagine it")
    opponent_agents: tuple[str, ...] = key(
        (), "references, one cloning network for each: [weak,strong,TDMPC2:path], or as [{type: TDMPC2, path: ...}]"
    )
    pooled: bool = key(True, "one network more, cloned from whoever was met")
    aggregate: Literal["mean", "cvar", "worst"] = key(
        "mean", "score of a plan over opponents, weighted by the belief: mean, mean of the worst share, or worst"
    )
    cvar_share: float = key(0.5, "cvar: share of the belief that the worst opponents make up")
    samples: int = key(1, "imagined sequences of actions of each opponent, the same for all candidates of a plan")
    least_belief: float = key(0.02, "plans leave out hypotheses that are believed in less than this in all games, which saves their share")
    belief_decay: float = key(0.95, "weight of former evidence about who plays, per decision; 1 never forgets")
    hidden: tuple[int, ...] = key((128, 128), "widths of the hidden layers of cloning networks")
    buffer: int = key(50_000, "newest steps that each reference's network learns from")
    batch_size: int = key(64, "steps per reference and update")
    lr_scale: float = key(1.0, "learning rate of cloning networks relative to optim.lr")


def check_opponents(config: RunConfig) -> None:
    """Check whom a run plays and imagines.

    Raises:
        ConfigError: numbers that do not belong together, or parts that imagined opponents do not go with.
    """
    own = config.opponents
    if not own.name:
        raise ConfigError("opponents.name: expected at least one opponent, as in opponents=weak, got []")
    if own.weights and len(own.weights) != len(own.name):
        raise ConfigError(f"opponents.weights: expected a number for each of {len(own.name)} opponents, or none, got {list(own.weights)}")
    if own.weights and not (min(own.weights) >= 0 and sum(own.weights) > 0):
        raise ConfigError(f"opponents.weights: expected numbers of 0 or more, one of them above 0, got {list(own.weights)}")
    files = [name for name in own.name if name.endswith((".json", ".yaml", ".yml"))]
    if files and (len(own.name) > 1 or own.weights):
        raise ConfigError(f"opponents.name: the curriculum {files[0]} says who plays and how often; name nobody else")
    if config.opponent_simulation.enabled:
        _check_simulation(config)


def _check_simulation(config: RunConfig) -> None:
    own = config.opponent_simulation
    if len(set(own.opponent_agents)) < len(own.opponent_agents):
        raise ConfigError(f"opponent_simulation.opponent_agents: expected different references, got {list(own.opponent_agents)}")
    if not own.opponent_agents and not own.pooled:
        raise ConfigError("opponent_simulation.pooled: nobody is left to imagine; name references in opponent_agents, or leave it true")
    if not config.planner.mpc:
        raise ConfigError("opponent_simulation: planner.mpc=false never plans against anybody; leave one of them out")
    if config.planner.name == "mcts":
        raise ConfigError(
            "planner.name: mcts weighs all imagined opponents alike, whatever is believed; use planner=mppi, or another that samples"
        )
    refused = {
        "seeds": config.seeds is not None,
        "compile": config.compile,
        "cuda_graph": config.cuda_graph,
        "model.num_dynamics": config.model.num_dynamics > 1,
        "reanalyze.interval": config.reanalyze.interval > 0,
        "value.target": config.value.target == "model",
        "planner.prior": config.planner.prior == "learned",
        "planner.gradient_steps": config.planner.gradient_steps > 0,
        "agent": config.agent == "director",
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(f"{name}: cannot be had with imagined opponents yet; leave it at its default, or opponent_simulation off")
