"""Configuration of Director: goals, manager, worker; and which of their values go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from worldmpc.config.base import ConfigError, key
from worldmpc.config.sections import resolve_model
from worldmpc.config.variants import uses_plans

if TYPE_CHECKING:
    from worldmpc.config.run import RunConfig


@dataclass(frozen=True)
class GoalVAEConfig:
    """Director's goal autoencoder: latents as a few discrete codes, and back."""

    n_latents: int = key(8, "codes of a goal")
    n_classes: int = key(8, "classes of each code")
    kind: Literal["straight_through", "gumbel"] = key(
        "straight_through", "how codes are sampled for the decoder: one-hot with straight-through gradients, or Gumbel-softmax"
    )
    unimix: float = key(0.01, "share of the uniform distribution in that of each code")
    tau_start: float = key(1.0, "gumbel: first temperature")
    tau_end: float = key(0.1, "gumbel: last temperature")
    anneal_steps: int = key(100_000, "gumbel: updates from the first temperature to the last")
    beta: float | None = key(None, "weight of the divergence from uniform codes; null: adapted such that it stays at kl_target")
    kl_target: float = key(0.6, "adapted beta: share of the most that this divergence can be (10 of 16.6 nats for 8 x 8 codes)")
    hidden_dim: int | None = key(None, "hidden width; null: that of the world model")
    lr: float = key(3e-4, "learning rate")


@dataclass(frozen=True)
class ManagerConfig:
    """Director's manager, who chooses goals."""

    goal_interval: int = key(10, "decisions between two goals; also the least length of replayed windows")
    hidden_dim: int | None = key(None, "hidden width; null: that of the world model")
    ent_coef: float | None = key(
        None, "weight of the entropy of the goals chosen; null: adapted such that it does not fall below ent_target"
    )
    ent_target: float = key(0.5, "adapted ent_coef: share of the most that this entropy can be, below which it is not to fall")
    lr: float = key(3e-4, "learning rate")
    gamma: float = key(0.99, "discount per goal")
    lam: float = key(0.95, "lambda of the returns over goals")
    tau: float = key(0.005, "rate at which the slow critics follow")
    intrinsic_coef: float = key(0.1, "weight of the exploration reward, what the goal autoencoder does not reconstruct, beside the task's")
    imagined_goals: int = key(2, "goals per imagined trajectory")
    batch_size: int = key(128, "most imagined trajectories per update; as many as loss.batch_size where that is less")
    update_every: int = key(4, "updates of the world model between two of the manager")


@dataclass(frozen=True)
class WorkerConfig:
    """Director's worker, who follows goals."""

    mode: Literal["goal_conditioned", "planner_bonus"] = key(
        "goal_conditioned",
        "goal_conditioned: policy and values of its own, for every goal; planner_bonus: plans of TD-MPC2 with a bonus for goals alone",
    )
    similarity: Literal["groupwise", "cosine", "l2"] = key(
        "groupwise",
        "goal reward: cosine times ratio of lengths, within each group of the latent (mean) or of the whole latent; or minus the distance",
    )
    goal_weight: float | None = key(
        None,
        "weight of the goal reward in plans, of a worker as long as the task has nothing to say; null: 1, of planner_bonus 0.1",
    )
    task_weight: float = key(1.0, "weight of the task's reward in plans")
    task_range: float = key(
        0.02, "range of the task's values up to which goals have their whole weight; beyond it, they have that much less"
    )
    gamma: float = key(0.95, "discount of goal rewards, per decision")
    num_q: int = key(2, "critics of goal rewards")
    batch_size: int | None = key(None, "most windows of the batch that goals and worker learn from in an update; null: all of them")
    goals: tuple[float, ...] = key((0.4, 0.4, 0.2), "shares of goals to learn from: the manager's then, future latents, random codes")


MOST_CODES = 4096
"""Most entries of a goal's one-hot codes."""


def goal_weight(config: WorkerConfig) -> float:
    """Return the weight of the goal reward in plans."""
    if config.goal_weight is not None:
        return config.goal_weight
    return 1.0 if config.mode == "goal_conditioned" else 0.1


def check_director(config: RunConfig) -> None:
    """Check that goals, manager and worker fit together.

    Raises:
        ConfigError: they do not; the message says what would.
    """
    if config.agent != "director" or config.trainer == "online":
        return
    codes, worker, interval = config.goal_vae, config.worker, config.manager.goal_interval
    if codes.n_classes < 2:
        raise ConfigError(f"goal_vae.n_classes: expected at least 2, got {codes.n_classes}; a code of one class says nothing")
    width = resolve_model(config.model).latent_dim or 0
    if codes.n_latents > width:
        raise ConfigError(f"goal_vae.n_latents: expected at most the latent's {width} dimensions, got {codes.n_latents}")
    if codes.n_latents * codes.n_classes > MOST_CODES:
        raise ConfigError(f"goal_vae.n_classes: {codes.n_latents} codes of {codes.n_classes} classes have more than {MOST_CODES} entries")
    if len(worker.goals) != 3 or not min(worker.goals) >= 0 or not abs(sum(worker.goals) - 1) <= 1e-6:
        raise ConfigError(f"worker.goals: expected three shares that sum to 1, as in [0.4,0.4,0.2], got {list(worker.goals)}")
    if not goal_weight(worker) and not worker.task_weight:
        raise ConfigError("worker.goal_weight: plans towards nothing; use worker.goal_weight=1 or worker.task_weight=1")
    if config.replay.windows == "inside" and interval > config.window:
        raise ConfigError(
            f"replay.windows: whole windows of manager.goal_interval={interval} steps, of which the world model learns from the first "
            f"{config.window}, leave out where episodes end; use replay.windows=padded"
        )
    if config.env.episode_length is not None and interval > config.env.episode_length:
        raise too_long_interval(interval, config.env.episode_length)
    if uses_plans(config) or config.reanalyze.interval:
        what = "reanalyze.interval" if config.reanalyze.interval else "policy.objective"
        raise ConfigError(f"{what}: plans of agent=director follow goals and teach the task's policy nothing; use policy.objective=max_q")
    if config.planner.prior == "learned":
        raise ConfigError("planner.prior: a learned prior knows no goals; use planner.prior=none with agent=director")
    if config.seeds is not None:
        raise ConfigError("seeds: agent=director trains one run per seed, with -m seed=1,2,3")


def too_long_interval(interval: int, length: int) -> ConfigError:
    """Return the error of goals that last longer than an episode."""
    return ConfigError(f"manager.goal_interval: expected at most the episode's {length} decisions, got {interval}")
