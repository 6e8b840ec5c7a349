"""Configuration of the training components: typed sections, presets, plain data in and out, YAML, older configurations."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from worldmpc.config import ConfigError, EnvConfig, PPOConfig, RunConfig, flat_fields
from worldmpc.config.base import build, key
from worldmpc.config.run import plain
from worldmpc.training.curriculum import Curriculum, Strategy
from worldmpc.training.legacy_configs import translate

__all__ = [
    "AgentConfig",
    "CurriculumConfig",
    "EnvironmentConfig",
    "PPOConfig",
    "TrainerConfig",
    "TrainingConfig",
    "WandbConfig",
    "large_distributed_config",
    "medium_config",
    "small_fast_config",
]


@dataclass(frozen=True)
class AgentConfig:
    """Networks of policy and value."""

    name: str = key("mlp", "mlp for vectors, simple_cnn for images, or a name that a policy store was given a builder for")
    hidden_size: int = key(64, "width of the hidden layers")
    num_layers: int = key(2, "number of hidden layers")
    log_std_init: float = key(0.0, "first log standard deviation, Box actions")


@dataclass(frozen=True)
class EnvironmentConfig(EnvConfig):
    """Environments."""

    num_envs: int = key(8, "environments stepped together")
    task: str = key("gym/CartPole-v1", "suite/name")

    def env_cfg(self) -> EnvConfig:
        """Return how the environments are made."""
        return EnvConfig(**{item.name: getattr(self, item.name) for item in dataclasses.fields(EnvConfig)})


@dataclass(frozen=True)
class TrainerConfig:
    """The training loop."""

    total_timesteps: int = key(10_000_000, "decisions to train for, all environments together")
    learning_rate: float = key(3e-4, "learning rate of Adam")
    adam_eps: float = key(1e-5, "Adam's denominator constant")
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "learning-rate schedule")
    final_lr_scale: float = key(0.1, "end of the schedule relative to learning_rate")
    max_loss: float = key(1e6, "a loss above this, or NaN, stops the training; the update is not applied")
    run_dir: str | None = key(None, "folder of checkpoints and logs; null: nothing is written")
    checkpoint_interval: int = key(100, "epochs between checkpoints; one is written at the end as well")
    evaluate_interval: int = key(0, "epochs between evaluations; 0: none")
    evaluate_episodes: int = key(10, "episodes of each environment per evaluation")
    tensorboard: bool = key(True, "write TensorBoard events")
    progress: Literal["auto", "live", "plain", "none"] = key("auto", "progress display; auto: live on a terminal")
    device: str = key("auto", "auto, cpu, cuda, cuda:<index> or mps")
    seed: int = key(1, "seed of networks, exploration, shuffling and environments")


@dataclass(frozen=True)
class CurriculumConfig:
    """Which task comes next."""

    strategy: Strategy = key("fixed", "see worldmpc.training.curriculum.Curriculum")
    tasks: tuple[str, ...] = key((), "tasks to choose from; none: environment.task alone")
    weights: tuple[float, ...] = key((), "of strategy weighted, in the order of tasks; none: all alike")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, off unless asked for; needs its package."""

    enabled: bool = key(False, "log there as well")
    project: str = key("worldmpc", "project")
    name: str | None = key(None, "name of the run; null: experiment_name")
    tags: tuple[str, ...] = key((), "tags")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole training: ``TrainingConfig.from_dict(config.to_dict()) == config``."""

    experiment_name: str = key("default", "name of the experiment")
    notes: str = key("", "whatever should be remembered with it")
    agent: AgentConfig = field(default_factory=AgentConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _validate(self)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data, lists for tuples, as JSON and YAML have it."""
        return plain(dataclasses.asdict(self))

    def make_curriculum(self) -> Curriculum:
        """Make what chooses the next task.

        Raises:
            ConfigError: two tasks of the same name, or weights that do not fit.
        """
        tasks, config = self.curriculum.tasks or (self.environment.task,), self.environment.env_cfg()
        return Curriculum(tasks, self.curriculum.strategy, weights=self.curriculum.weights, seed=self.trainer.seed, config=config)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingConfig:
        """Build a configuration from nested plain data, which is not changed; missing keys keep their defaults.

        Keys of older configurations (Metta's TrainingConfig of June 2025) are understood, see
        :mod:`worldmpc.training.legacy_configs`.

        Raises:
            ConfigError: unknown key, wrong type, a value out of range, or an older key for something that is not here.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"configuration: expected keys and values, got a {type(data).__name__}")
        return build(cls, translate(data), _unknown)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Build a configuration from a YAML file.

        Raises:
            ConfigError: no such file, not a YAML mapping, or see :meth:`from_dict`.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path}: not a usable YAML file ({' '.join(str(error).split())})") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path}: expected keys and values, got a list")
        return cls.from_dict({str(name): value for name, value in data.items()})


def small_fast_config() -> TrainingConfig:
    """Return a configuration that trains in seconds."""
    return TrainingConfig(
        agent=AgentConfig(hidden_size=128),
        trainer=TrainerConfig(total_timesteps=10_000, learning_rate=1e-3),
        ppo=PPOConfig(rollout_steps=64, minibatch_size=64, update_epochs=2),
    )


def medium_config() -> TrainingConfig:
    """Return a configuration for one machine and a harder task."""
    return TrainingConfig(
        agent=AgentConfig(hidden_size=256),
        environment=EnvironmentConfig(num_envs=16),
        trainer=TrainerConfig(total_timesteps=10_000_000, evaluate_interval=100),
        ppo=PPOConfig(rollout_steps=128, minibatch_size=256),
    )


def large_distributed_config() -> TrainingConfig:
    """Return a configuration whose environments are distributed over all CPU cores, beside a GPU where there is one."""
    return TrainingConfig(
        agent=AgentConfig(hidden_size=512, num_layers=3),
        environment=EnvironmentConfig(num_envs=64, workers="async"),
        trainer=TrainerConfig(total_timesteps=100_000_000, learning_rate=1e-3, schedule="cosine", evaluate_interval=100),
        ppo=PPOConfig(rollout_steps=128, minibatch_size=512, update_epochs=8, anneal_clip=True),
    )


_AT_LEAST_1 = (
    "agent.hidden_size",
    "agent.num_layers",
    "trainer.total_timesteps",
    "trainer.checkpoint_interval",
    "trainer.evaluate_episodes",
)
_AT_LEAST_0 = ("trainer.evaluate_interval", "trainer.seed")
_POSITIVE = ("trainer.learning_rate", "trainer.adam_eps", "trainer.max_loss")
_NAMES_IN_RUNS = {"env.": "environment.", "device:": "trainer.device:", "ppo.log_std_init:": "agent.log_std_init:"}
"""How a key of :class:`RunConfig` begins -> what it is called here."""
_OF_AGENT = {"hidden": "agent.hidden_size and agent.num_layers", "log_std_init": "agent.log_std_init"}


def _validate(config: TrainingConfig) -> None:
    def require(holds: bool, name: str, expected: str) -> None:
        if not holds:
            section, _, leaf = name.partition(".")
            raise ConfigError(f"{name}: expected {expected}, got {getattr(getattr(config, section), leaf)!r}")

    def value(name: str) -> Any:
        section, _, leaf = name.partition(".")
        return getattr(getattr(config, section), leaf)

    for name in _AT_LEAST_1:
        require(value(name) >= 1, name, "at least 1")
    for name in _AT_LEAST_0:
        require(value(name) >= 0, name, "0 or more")
    for name in _POSITIVE:
        require(0 < value(name) < math.inf, name, "a finite number above 0")
    require(0 < config.trainer.final_lr_scale <= 1, "trainer.final_lr_scale", "a number in (0, 1]")
    for leaf, instead in _OF_AGENT.items():
        if getattr(config.ppo, leaf) != getattr(PPOConfig(), leaf):
            raise ConfigError(f"ppo.{leaf}: the networks are described by {instead} here; leave it out")
    # What the curriculum, and `worldmpc train agent=ppo`, would accept of these is right here as well.
    config.make_curriculum()
    ppo = dataclasses.asdict(config.ppo) | {"log_std_init": config.agent.log_std_init}
    run = {"agent": "ppo", "device": config.trainer.device, "env": dataclasses.asdict(config.environment.env_cfg()), "ppo": ppo}
    try:
        RunConfig.from_dict(run)
    except ConfigError as error:
        text = str(error)
        theirs = next((name for name in _NAMES_IN_RUNS if text.startswith(name)), "")
        raise ConfigError(_NAMES_IN_RUNS.get(theirs, "") + text.removeprefix(theirs)) from None


def _unknown(name: str) -> ConfigError:
    known = [dotted for dotted, _ in flat_fields(TrainingConfig)]
    sections = list(dict.fromkeys(dotted.partition(".")[0] for dotted in known))
    near = difflib.get_close_matches(name, known if "." in name else sections, n=2, cutoff=0.6)
    leaves = {dotted.rsplit(".", 1)[-1]: dotted for dotted in known}
    near += [leaves[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1) if leaves[match] not in near]
    return ConfigError(f"{name}: unknown key; " + (f"did you mean {' or '.join(near)}?" if near else f"top level: {', '.join(sections)}"))
