"""TD-MPC2 (Hansen, Su, Wang 2024, "TD-MPC2: Scalable, Robust World Models for Continuous Control")."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc import losses
from worldmpc.agents.common import Streams, discount_of, restore, state_of, vector_dim
from worldmpc.agents.planning import plan_output, plan_replay
from worldmpc.config import RunConfig, seed_decisions
from worldmpc.data.source import ReplaySource
from worldmpc.functional import CapturedByShape, Compiled, maybe_compile
from worldmpc.learners.trajectory_prior import make_prior
from worldmpc.learners.world_model import Learner
from worldmpc.models.packing import constant_parameters
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.optim import GroupOptimizer
from worldmpc.planners import make_planner
from worldmpc.types import ActOutput, Carry, EnvSpec, LossTerm, Metrics, Mode, Noise, PlanResult, PlanState, SequenceBatch


class TDMPC2:
    """Plans in the latent space of a world model that it learns from replayed windows, with Box and with Discrete actions.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule.

    Raises:
        ConfigError: observations that the encoder does not support.
    """

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        self.terminates = config.model.termination == "on" or (config.model.termination == "auto" and spec.can_terminate)
        self.model = WorldModel(
            config.model, vector_dim(spec), spec.action_dim, terminates=self.terminates, discrete=spec.discrete, seed=config.seed
        )
        self.model.to(self.device)
        self.planner = make_planner(config.planner, spec.action_dim, self.discount, self.model.num_q, spec.discrete)
        self._policy_objective = losses.boltzmann_policy if spec.discrete else losses.max_q_policy
        self.terms: dict[str, LossTerm] = {"consistency": losses.consistency, "reward": losses.reward, "value": losses.value}
        self.weights = {"consistency": config.loss.consistency_coef, "reward": config.loss.reward_coef, "value": config.loss.value_coef}
        groups = {"encoder.": config.optim.enc_lr_scale, "dynamics.": 1.0, "reward.": 1.0, "q.": 1.0}
        if self.terminates:
            self.terms["termination"], self.weights["termination"] = losses.termination, config.loss.termination_coef
            groups["termination."] = 1.0
        self.learner = Learner(
            config,
            maybe_compile(self.model_loss, config.compile),
            maybe_compile(self.policy_loss, config.compile),
            GroupOptimizer(self.model, groups, config.optim, total_updates=total_updates),
            GroupOptimizer(self.model, {"pi.": 1.0}, config.optim, eps=1e-5, total_updates=total_updates),
            self.model.update_target,
            torch.ones((), device=self.device),
        )
        self.streams = Streams(config.seed, self.device)
        self.prior = make_prior(config, spec, self.model.latent_dim, self.device, total_updates)
        self.model.trajectory = None if self.prior is None else self.prior.model
        self._plan = maybe_compile(self.planner.plan, config.compile)
        self._verbs: dict[bool, Callable[..., PlanResult]] = {
            explore: functools.partial(self.plan, explore=explore) for explore in (True, False)
        }
        if config.cuda_graph:
            self._verbs = {explore: CapturedByShape(verb) for explore, verb in self._verbs.items()}

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can act; without planning there is nothing but the prior."""
        return ("explore", "eval", "prior") if self.config.planner.mpc else ("explore", "eval")

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took so far; 0 without ``compile``."""
        plan = self._plan.seconds if isinstance(self._plan, Compiled) else None
        return self.learner.compile_seconds + (plan or 0.0)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.learner.updates

    def init_carry(self, num_envs: int) -> Carry:
        """Return the carry of ``num_envs`` fresh episodes."""
        return Carry(self.planner.init(num_envs, self.device))

    @torch.no_grad()
    def act(self, carry: Carry, obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions: [E, O] -> [E, A] in [-1, 1], or one-hot; ``mode`` is explore, eval, or prior (the policy's mean)."""
        obs, stream = obs.to(self.device), self.streams.acting(mode)
        if mode == "prior" or not self.config.planner.mpc:
            eps = stream.draw({"eps": NoiseSpec("normal", (len(obs), self.spec.action_dim))})["eps"]
            action = self.model.propose(self.model.encode(obs), eps if mode == "explore" else torch.zeros_like(eps))
            return ActOutput(action, carry, {}, {})
        noise = stream.draw(self.planner.noise_specs(len(obs)))
        return plan_output(self._verbs[mode == "explore"](obs, carry.plan, noise))

    def plan(self, obs: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """Encode observations [E, O] and plan from there."""
        with constant_parameters(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.planner.precision == "bf16"):
            return self._plan(self.model, self.model.encode(obs), state, noise, explore)

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay of windows of ``config.window`` steps, with what plans leave in it."""
        config, replay = self.config, plan_replay(self.config, self.spec, num_envs, self.device)
        first = seed_decisions(config, self.spec.episode_length)
        return ReplaySource(replay, config.loss.batch_size, config.train.utd, first, generator)

    def update(self, batch: SequenceBatch) -> Metrics:
        """Do one published update: world model, then policy, then slow critics."""
        return self.update_with_noise(batch, self.streams["update"].draw(self.noise_specs(batch.reward.shape[0], batch.reward.shape[1])))

    def update_with_noise(self, batch: SequenceBatch, noise: Noise) -> Metrics:
        """Do one update with given noise; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied."""
        metrics = self.learner.update(batch, noise)
        if self.prior is not None:
            metrics |= self.prior.update(self.model.encode(batch.obs[0]).detach(), batch.action, batch.mask)
        return metrics

    def noise_specs(self, length: int, batch_size: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one update on a batch of ``length`` steps."""
        model = self.model
        return losses.noise_specs(length, batch_size, self.spec.action_dim, model.num_q, model.hidden_dim, self.config.model.dropout)

    def model_loss(self, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Tensor, Metrics]:
        """Return the world model's loss [], the imagined latents [T+1, B, Z] without gradient, and metrics."""
        rollout = losses.roll(self.model, batch, self.discount, self.config.loss.rho, noise)
        loss, metrics = losses.weighted_sum(self.terms, self.weights, self.model, rollout, batch, noise)
        return loss, rollout.zs.detach(), metrics

    def policy_loss(self, zs: Tensor, mask: Tensor, scale: Tensor, noise: Noise) -> tuple[Tensor, Metrics]:
        """Return the policy's loss [] and metrics: latents [T+1, B, Z], mask of the steps [T, B], running scale []."""
        config = self.config.loss
        mask = torch.cat((torch.ones_like(mask[:1]), mask))
        return self._policy_objective(self.model, zs, mask, scale, config.rho, config.entropy_coef, config.tau, noise)

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, running scale, counter and random streams."""
        return {
            "model": dict(self.model.state_dict()),
            "model_optimizer": self.learner.model_optimizer.state_dict(),
            "policy_optimizer": self.learner.policy_optimizer.state_dict(),
            "scale": self.learner.scale,
            "updates": self.learner.updates,
            "streams": self.streams.state_dict(),
            "prior": state_of(self.prior),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.learner.model_optimizer.load_state_dict(state["model_optimizer"])
        self.learner.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.learner.scale.copy_(state["scale"])
        self.learner.updates = int(state["updates"])
        self.streams.load_state_dict(state["streams"])
        restore(self.prior, state.get("prior"))
