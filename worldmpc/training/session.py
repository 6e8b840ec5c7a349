"""What a functional training consists of, and how it is saved and resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import nn

from worldmpc.config import ConfigError, EnvConfig, PPOConfig
from worldmpc.data.rollout import Experience
from worldmpc.envs import make_envs
from worldmpc.envs.vector import VecEnv
from worldmpc.learners.ppo import PPOOptimizer
from worldmpc.noise import derive_seed
from worldmpc.on_policy import CustomLoss
from worldmpc.training.checkpoint import check_same_architecture
from worldmpc.training.collector import RolloutCollector
from worldmpc.training.configs import TrainerConfig
from worldmpc.training.curriculum import CurriculumTask
from worldmpc.training.evaluation import PolicyEvaluator
from worldmpc.training.policy_store import PolicyStore, TrainingCheckpointer
from worldmpc.training.stats import StatsLogger
from worldmpc.types import EnvSpec


@dataclass
class TrainingState:
    """How far a training is."""

    epoch: int = 0
    agent_steps: int = 0
    """Decisions so far, all environments together."""
    should_stop: bool = False
    """Set by anybody to end the loop after this epoch."""
    updates: int = 0
    evals: dict[str, float] = field(default_factory=dict)
    """Scores of the last evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last epoch."""


class Components(TypedDict):
    """What a training is made of; each may be exchanged for something of the same interface."""

    collector: RolloutCollector
    ppo: PPOOptimizer
    optimizer: torch.optim.Optimizer
    stats_logger: StatsLogger
    checkpointer: TrainingCheckpointer | None
    """None without a ``run_dir``."""
    evaluator: PolicyEvaluator | None
    """None without ``evaluate_interval``."""


class TaskSource(Protocol):
    """Such as :class:`worldmpc.training.curriculum.Curriculum`; what else that has is used where it is there."""

    def get_task(self) -> CurriculumTask:
        """Choose the next task."""
        ...


class StepFunction(Protocol):
    """One epoch: collects, updates, and adds the decisions it took to ``state.agent_steps``."""

    def __call__(
        self,
        state: TrainingState,
        components: Components,
        config: TrainerConfig,
        experience: Experience,
        custom_losses: Sequence[CustomLoss] | None = None,
    ) -> dict[str, float]:
        """Return the epoch's metrics."""
        ...


class Seats:
    """The environments and the collector of every task, made when it is first chosen; their episodes go on when it is chosen again.

    Args:
        config: its ``seed`` is that of all of them, together with the task's name.
        stack: closes the environments.
        saved: collectors' states by task, of a training that goes on.
    """

    def __init__(self, config: TrainerConfig, stack: contextlib.ExitStack, saved: Mapping[str, Any] | None = None) -> None:
        self._config, self._stack, self._saved = config, stack, dict(saved or {})
        self._envs: dict[str, VecEnv] = {}
        self._discounts: dict[str, float | None] = {}
        self._collectors: dict[str, RolloutCollector] = {}

    def envs(self, task: CurriculumTask) -> VecEnv:
        """Return a task's environments.

        Raises:
            ConfigError: it is no task, or has another discount than the first one, as the update knows one.
        """
        missing = [name for name in ("name", "env", "env_cfg") if not hasattr(task, name)]
        if missing:
            kind = type(task).__name__
            raise ConfigError(f"curriculum: get_task() returned a {kind} without {' and '.join(missing)}; return a CurriculumTask")
        if task.name not in self._envs:
            config = task.env_cfg()
            if not isinstance(config, EnvConfig):
                raise ConfigError(f"curriculum: env_cfg() of {task.name} returned a {type(config).__name__}; return an EnvConfig")
            self._discounts[task.name] = config.discount
            first, discount = next(iter(self._discounts.items()))
            if config.discount != discount:
                raise ConfigError(
                    f"curriculum: {task.name} has env.discount={config.discount}, {first} has {discount}; give all tasks the same"
                )
            envs = make_envs(task.env, config, seed=derive_seed(self._config.seed, "envs", task.name))
            self._envs[task.name] = self._stack.enter_context(envs)
        return self._envs[task.name]

    def collector(self, task: CurriculumTask, policy: nn.Module, experience: Experience) -> RolloutCollector:
        """Return a task's collector.

        Raises:
            ConfigError: its environments do not fit the rollout, or see :meth:`envs`.
        """
        envs = self.envs(task)
        if task.name not in self._collectors:
            seed = derive_seed(self._config.seed, "collector", task.name)
            collector = RolloutCollector(envs, policy, experience, experience.device, seed=seed)
            if task.name in self._saved:
                collector.load_state_dict(self._saved[task.name])
            self._collectors[task.name] = collector
        return self._collectors[task.name]

    def state_dict(self) -> dict[str, Any]:
        """Return the collectors' states by task, those included that have not been needed since the training went on."""
        return {**self._saved, **{name: collector.state_dict() for name, collector in self._collectors.items()}}


def make_experience(ppo_config: PPOConfig, vecenv: VecEnv, device: torch.device | str = "cpu") -> Experience:
    """Return an empty rollout of ``ppo_config.rollout_steps`` steps for environments."""
    spec = vecenv.spec
    return Experience(ppo_config.rollout_steps, vecenv.num_envs, spec.obs_shape, spec.action_dim, obs_dtype=spec.obs_dtype, device=device)


def load(config: TrainerConfig, store: PolicyStore | None) -> dict[str, Any] | None:
    """Return the state that was saved last in the run's folder, or None.

    Raises:
        ConfigError: there is no folder, or no store.
        CheckpointError: it is damaged.
    """
    if config.run_dir is None or store is None:
        raise ConfigError("resume: needs trainer.run_dir and a policy store, where a training was saved")
    return TrainingCheckpointer(Path(config.run_dir) / "checkpoints", store).load_trainer_state()


def require_fresh(config: TrainerConfig) -> None:
    """Check that the run's folder, if any, holds no training yet.

    Raises:
        ConfigError: it does.
    """
    for name in ("metrics.jsonl", f"checkpoints/{TrainingCheckpointer.STATE}"):
        if config.run_dir is not None and (Path(config.run_dir) / name).exists():
            raise ConfigError(
                f"trainer.run_dir: {config.run_dir} holds an earlier training ({name}); go on with it by resume=True, choose another "
                "folder, or remove it"
            )


def initial_policy(policy: nn.Module | None, store: PolicyStore | None, spec: EnvSpec, saved: Mapping[str, Any] | None) -> nn.Module:
    """Return the policy to train: the given one or a new one, with the parameters that were saved, if any.

    Raises:
        ConfigError: neither a policy nor a store.
        CheckpointError: what was saved is missing, damaged, or of another architecture.
    """
    if saved is None and policy is not None:
        return policy
    if store is None:
        raise ConfigError("policy: give one, or a policy store that makes one")
    found = store.create(spec).policy if saved is None else store.policy(saved["policy_uri"]).policy
    if policy is None:
        return found
    check_same_architecture(policy.state_dict(), found.state_dict())
    policy.load_state_dict(found.state_dict())
    return policy


def restore(saved: Mapping[str, Any], state: TrainingState, components: Components, experience: Experience) -> None:
    """Take over what :func:`save` saved, but for policy, curriculum and collectors."""
    state.epoch, state.agent_steps, state.updates = saved["epoch"], saved["agent_step"], saved["updates"]
    state.evals, state.metrics = dict(saved["evals"]), dict(saved["metrics"])
    components["optimizer"].load_state_dict(saved["optimizer_state_dict"])
    components["ppo"].load_state_dict(saved["ppo"])
    experience.load_state_dict(saved["experience"])
    components["stats_logger"].resume(state.agent_steps, saved["episodes"])


def save(state: TrainingState, components: Components, experience: Experience, curriculum: TaskSource, seats: Seats) -> None:
    """Save policy and state, where there is a checkpointer.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    checkpointer = components["checkpointer"]
    if checkpointer is None:
        return
    metadata = {"agent_steps": state.agent_steps, "evals": state.evals}
    checkpointer.save_policy(components["ppo"].policy, state.epoch, metadata)
    checkpointer.save_trainer_state(
        state.agent_steps,
        state.epoch,
        components["optimizer"].state_dict(),
        updates=state.updates,
        episodes=components["stats_logger"].episodes,
        evals=state.evals,
        metrics=state.metrics,
        ppo=components["ppo"].state_dict(),
        experience=experience.state_dict(),
        curriculum=call(curriculum, "state_dict"),
        collectors=seats.state_dict(),
    )


def call(thing: Any, name: str, *arguments: Any) -> Any:
    """Call a method that is optional, or return None."""
    method = getattr(thing, name, None)
    return None if method is None else method(*arguments)
