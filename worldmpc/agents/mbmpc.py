"""Model-based MPC: learned one-step dynamics, a policy and a value that learn from the planner, any planner; PETS without the latter two.

Chua et al. 2018, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc import off_policy
from worldmpc.agents.common import Streams, discount_of, vector_dim
from worldmpc.agents.descent import Descent
from worldmpc.agents.planning import PlanningActor, plan_replay
from worldmpc.config import RunConfig, seed_decisions
from worldmpc.data.source import ReplaySource
from worldmpc.functional import tree_map
from worldmpc.losses import behaviour_loss, behaviour_targets
from worldmpc.models.behaviour import BehaviourPolicy, BehaviourValue
from worldmpc.models.composed import ComposedModel
from worldmpc.models.fitting import fit, make_optimizer
from worldmpc.models.one_step import OneStepDynamics
from worldmpc.models.value_based import initialise, polyak, target_of
from worldmpc.noise import NoiseSpec
from worldmpc.planners import make_planner
from worldmpc.types import ActOutput, Carry, EnvSpec, Metrics, Mode, TransitionBatch


class MBMPC:
    """Fits dynamics to all it has seen every now and then, plans with them, and has a policy and a value learn from the plans.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to plan and learn.
        total_updates: not used; each fit ends by its holdout loss.

    Raises:
        ConfigError: observations that are no vectors, or a planner that cannot do with the task's actions.
    """

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        obs_dim, own = vector_dim(spec), config.mbmpc
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        self.dynamics = OneStepDynamics(config.dynamics, obs_dim, spec.action_dim, terminates=spec.can_terminate, seed=config.seed)
        parts: dict[str, nn.Module] = {"dynamics": self.dynamics}
        self.policy = self.value = None
        if own.learn_policy:
            self.policy = BehaviourPolicy(self.dynamics.observations, obs_dim, spec.action_dim, own.hidden, spec.discrete)
            self.value = BehaviourValue(self.dynamics.observations, obs_dim, own.hidden, scale=1 / (1 - self.discount))
            initialise([self.policy.net, self.value.net], config.seed)
            self.target_value = target_of(self.value)
            self.target_value.normalizer = self.dynamics.observations
            parts |= {"policy": self.policy, "value": self.value, "target_value": self.target_value}
        self.model = nn.ModuleDict(parts).to(self.device)
        self.optimizer = make_optimizer(self.dynamics, config.dynamics)
        self.descent = Descent(self.model, ("policy", "value"), config, total_updates) if own.learn_policy else None
        self.streams = Streams(config.seed, self.device)
        self.fitting = torch.Generator().manual_seed(config.seed)
        self.planning = ComposedModel(self.dynamics, self.policy, self.value)
        planner = make_planner(config.planner, spec.action_dim, self.discount, 2, spec.discrete)
        self.actor = PlanningActor(planner, self.streams, self.device)
        self.updates = 0

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can act; with a policy also by that alone."""
        return ("explore", "eval") if self.policy is None else ("explore", "eval", "prior")

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay that hands out all it holds, every ``mbmpc.fit_every`` decisions."""
        config, replay = self.config, plan_replay(self.config, self.spec, num_envs, self.device)
        first, rate = seed_decisions(config, self.spec.episode_length), 1 / config.mbmpc.fit_every
        return ReplaySource(replay, 1, rate, first, generator, draw=lambda: replay.transitions(self.discount))

    def init_carry(self, num_envs: int) -> Carry:
        """Return the carry of ``num_envs`` fresh episodes."""
        return self.actor.init_carry(num_envs)

    @torch.no_grad()
    def act(self, carry: Carry, obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions: [E, O] -> [E, A] in [-1, 1], or one-hot; ``mode`` is explore, eval, or prior (the policy's mode alone)."""
        if self.policy is not None and (mode == "prior" or not self.config.planner.mpc):
            stream, shape = self.streams.acting(mode), (len(obs), self.spec.action_dim)
            eps = stream.draw({"eps": NoiseSpec("normal", shape)})["eps"] if mode == "explore" else torch.zeros(shape, device=self.device)
            return ActOutput(self.policy.sample(obs.to(self.device), eps), carry, {}, {})
        noise = self.streams.acting(mode).draw(self.dynamics.noise_specs(self.config.planner.horizon, len(obs)))
        model = ComposedModel(self.dynamics.bind(noise), self.policy, self.value) if noise else self.planning
        return self.actor.act(model, carry, obs, mode == "explore")

    def update(self, batch: TransitionBatch) -> Metrics:
        """Fit the dynamics to all transitions [B, ...], then descend the losses of value and policy ``mbmpc.gradient_steps`` times."""
        fitted = fit(self.dynamics, self.optimizer, batch, self.config.dynamics, self.fitting)
        self.updates += 1
        metrics = fitted.metrics()
        metrics["total_loss"] = metrics["dynamics_holdout_loss"]
        return metrics if self.descent is None else metrics | self._imitate(batch)

    def _imitate(self, batch: TransitionBatch) -> Metrics:
        shape = (self.config.mbmpc.gradient_steps, min(self.config.loss.batch_size, len(batch.obs)))
        rows = (self.streams["update"].draw({"rows": NoiseSpec("uniform", shape)})["rows"] * len(batch.obs)).long()
        metrics: Metrics = {}
        for index in rows:
            metrics = self._imitate_rows(tree_map(lambda field, index=index: field[index], batch))
        return metrics

    def _imitate_rows(self, batch: TransitionBatch) -> Metrics:
        assert self.policy is not None and self.value is not None and self.descent is not None
        own, skip = self.config.mbmpc, self.descent.begin()
        with torch.no_grad():
            target = off_policy.td_target(batch, self.target_value(batch.next_obs))
        value = self.value(batch.obs)
        value_loss = ((value - target) / self.value.scale).square().mean()
        _, skip = self.descent.step("value", value_loss, skip)
        action, weight = behaviour_targets(batch, target - value.detach(), own.policy_loss, own.awr_temperature)
        policy_loss = behaviour_loss(self.policy.distribution(batch.obs).log_prob(action), weight)
        _, skip = self.descent.step("policy", policy_loss, skip)
        polyak(self.target_value.net, self.value.net, own.tau * (1 - skip))
        skipped = self.descent.end(skip)
        return {
            "value_loss": value_loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_mean": value.detach().mean(),
            "skipped_updates": skipped,
        }

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, counter and random streams."""
        return {
            "model": dict(self.model.state_dict()),
            "dynamics_optimizer": self.optimizer.state_dict(),
            "descent": None if self.descent is None else self.descent.state_dict(),
            "updates": self.updates,
            "streams": self.streams.state_dict(),
            "fitting": self.fitting.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["dynamics_optimizer"])
        if self.descent is not None:
            self.descent.load_state_dict(state["descent"])
        self.updates = int(state["updates"])
        self.streams.load_state_dict(state["streams"])
        self.fitting.set_state(state["fitting"])
