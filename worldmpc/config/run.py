"""The configuration of a whole run."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from worldmpc.config.base import ConfigError, build, hints, key, lookup, merge, nest
from worldmpc.config.checks import validate
from worldmpc.config.hierarchy import GoalVAEConfig, ManagerConfig, WorkerConfig
from worldmpc.config.opponents import OpponentsConfig, OpponentSimulationConfig
from worldmpc.config.presets import expand_task, preset_values
from worldmpc.config.readers import LATENT, PLANNING, check_readers
from worldmpc.config.sections import (
    CheckpointConfig,
    DQNConfig,
    DynamicsConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    MBMPCConfig,
    ModelConfig,
    MultiGammaConfig,
    OptimConfig,
    PlannerConfig,
    PolicyConfig,
    PPOConfig,
    ReanalyzeConfig,
    ReplayConfig,
    SACConfig,
    TD3Config,
    TrainConfig,
    ValueConfig,
    resolve_model,
)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    task: str = key(
        "dmc/cartpole-swingup",
        "suite/name: dmc/<domain>-<task>, gym/<EnvId>, gym/<module>:<EnvId>, toy/<name>, maze/<name>, hockey/<name>; or a name that also "
        "stands for an agent and its settings, as director_walker_walk",
    )
    agent: Literal["tdmpc2", "tdmpc_square", "bmpc", "boom", "director", "mpc", "mbmpc", "pets", "dqn", "ppo", "sac", "td3"] = key(
        "tdmpc2", "algorithm; each has defaults of its own, listed below"
    )
    trainer: Literal["director", "online"] = key(
        "director", "director: manager and worker learn beside the world model; online: TD-MPC2 alone"
    )
    preset: str = key(
        "default", "named set of values: default (tdmpc2: 5M, published), cpu, debug, tuned (for one task); overrides come on top"
    )
    label: str | None = key(None, "how results and tables call this run; null: the agent's name")
    seed: int = key(1, "seed of networks, exploration, replay sampling and environments")
    seeds: tuple[int, ...] | None = key(
        None, "train these seeds together as one batched model, [1,2,3]; each ends as if trained alone with seed="
    )
    steps: int = key(1_000_000, "simulator steps to train for (decisions x action repeat)")
    eval_freq: int = key(10_000, "simulator steps between evaluations")
    device: str = key("auto", "auto, cpu, cuda, cuda:<index> or mps")
    threads: int = key(0, "CPU threads for torch; 0: chosen from the network width; 1 is best for several runs at once")
    compile: bool = key(False, "compile update and planner with torch.compile; takes a minute, the next run finds it cached")
    cuda_graph: bool = key(False, "capture update and planner as CUDA graphs, with or without compile")
    run_dir: str | None = key(None, "where the run writes; null: runs/<task>/<label or agent>-<preset>-seed<seed>")
    resume: str = key("never", "never: start a fresh run; auto: continue the newest checkpoint of this run, if any; or a checkpoint's path")
    env: EnvConfig = field(default_factory=EnvConfig)
    opponents: OpponentsConfig = field(default_factory=OpponentsConfig)
    opponent_simulation: OpponentSimulationConfig = field(default_factory=OpponentSimulationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    mbmpc: MBMPCConfig = field(default_factory=MBMPCConfig)
    dqn: DQNConfig = field(default_factory=DQNConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    sac: SACConfig = field(default_factory=SACConfig)
    td3: TD3Config = field(default_factory=TD3Config)
    loss: LossConfig = field(default_factory=LossConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    reanalyze: ReanalyzeConfig = field(default_factory=ReanalyzeConfig)
    multi_gamma: MultiGammaConfig = field(default_factory=MultiGammaConfig)
    goal_vae: GoalVAEConfig = field(default_factory=GoalVAEConfig)
    manager: ManagerConfig = field(default_factory=ManagerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def window(self) -> int:
        """Length of the training windows, in decisions."""
        return self.loss.horizon or self.planner.horizon

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data, lists for tuples, as JSON has it."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> RunConfig:
        """Build and validate a configuration from nested plain data; missing keys keep their defaults.

        Args:
            data: nested values.
            given: those among them that somebody asked for, which must not be without effect.

        Raises:
            ConfigError: unknown key, wrong type, a value out of range, or one that was asked for and is never read.
        """
        config = build(cls, data, unknown_key)
        check_readers(config, given or {})
        return validate(config)


def make_config(preset: str = "default", **overrides: Any) -> RunConfig:
    """Build a configuration: an agent's defaults, then the preset's values, then overrides.

    Overrides are nested mappings or dotted keys: ``make_config("cpu", seed=2, **{"planner.horizon": 5})``; a section that has a
    name may be given as that: ``make_config(agent="mpc", planner="cem")``.

    Raises:
        ConfigError: unknown agent, preset or key, wrong type, a value out of range, or a key that the agent never reads.
    """
    over, settings = expand_task(nest(overrides))
    layers = merge(preset_values(preset, str(over.get("agent", "tdmpc2")), over.get("task")), settings)
    return RunConfig.from_dict(merge(layers, over), over)


def check_env_config(config: EnvConfig) -> None:
    """Check how environments are to be made, as the keys of ``env`` are.

    Raises:
        ConfigError: wrong type, or a value out of range.
    """
    RunConfig.from_dict({"env": dataclasses.asdict(config)})


def flat_fields(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every leaf of the configuration as (dotted key, field)."""
    for item in dataclasses.fields(cls):
        kind = hints(cls)[item.name]
        if dataclasses.is_dataclass(kind):
            yield from flat_fields(typing.cast(type, kind), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def unknown_key(name: str) -> ConfigError:
    """Return the error for a key that does not exist, with the nearest keys."""
    known = [dotted for dotted, _ in flat_fields()]
    leaf = {dotted.rsplit(".", 1)[-1]: dotted for dotted in known}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [leaf[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), n=2) if leaf[match] not in near]
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `worldmpc train --help` lists all keys"
    return ConfigError(f"{name}: unknown configuration key{hint}")


def discount_from_episode_length(length: int | None) -> float:
    """Return the published heuristic clip((L/5 - 1) / (L/5), 0.95, 0.995) for ``L`` decisions; 0.99 without a limit."""
    if length is None:
        return 0.99
    fraction = length / 5
    return min(max((fraction - 1) / fraction, 0.95), 0.995)


def seed_decisions(config: RunConfig, episode_length: int | None) -> int:
    """Return the number of random decisions before learning: max(1000, 5 episodes) unless configured."""
    if config.train.seed_decisions is not None:
        return config.train.seed_decisions
    return max(1000, 5 * (episode_length or 0))


def exact_ratio(utd: float | Fraction) -> Fraction:
    """Return updates per decision as they are written in decimal: 100 decisions at 0.29 are 29 updates, in floating point only 28."""
    return utd if isinstance(utd, Fraction) else Fraction(str(utd))


def updates_worth(decisions: int, utd: float | Fraction) -> int:
    """Return how many updates a number of decisions is worth, see :func:`exact_ratio`."""
    ratio = exact_ratio(utd)
    return decisions * ratio.numerator // ratio.denominator


def plans(config: RunConfig) -> bool:
    """Return whether the agent acts by planning."""
    return config.agent in PLANNING and config.planner.mpc


def network_width(config: RunConfig) -> int:
    """Return the width of the widest hidden layer."""
    if config.agent in LATENT:
        return resolve_model(config.model).mlp_dim or 0
    if config.agent in PLANNING:
        return max(config.dynamics.hidden)
    return max(lookup(config, f"{config.agent}.hidden"))


def plain(data: Any) -> Any:
    """Return nested data with lists for tuples, as JSON has it."""
    if isinstance(data, dict):
        return {name: plain(value) for name, value in data.items()}
    return list(data) if isinstance(data, tuple) else data
