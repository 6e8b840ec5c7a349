"""Model-based MPC: learned one-step dynamics, a policy and a value that learn from the planner, any planner; PETS without the latter two.

Chua et al. 2018, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldmpc.agents.common import Streams, discount_of, restore, state_of, vector_dim
from worldmpc.agents.planning import PlanningActor, actors_planner, plan_replay, with_noise
from worldmpc.config import RunConfig, seed_decisions
from worldmpc.data.source import ReplaySource
from worldmpc.learners.imitation import Imitation
from worldmpc.learners.trajectory_prior import make_prior
from worldmpc.models.composed import ComposedModel
from worldmpc.models.fitting import fit, make_optimizer
from worldmpc.models.one_step import BoundDynamics, OneStepDynamics
from worldmpc.noise import NoiseSpec, derive_seed
from worldmpc.planners import make_planner
from worldmpc.types import ActOutput, Carry, EnvSpec, Metrics, Mode, SequenceBatch, TransitionBatch


class Seen(NamedTuple):
    """What a fit learns from."""

    transitions: TransitionBatch
    """All of them [B, ...]."""
    windows: SequenceBatch | None
    """Sequences at random, for a prior over them."""
    rounds: int = 1
    """How many times ``mbmpc.fit_every`` decisions they are worth; several where a seed phase was longer than that."""


class MBMPC:
    """Fits dynamics to all it has seen every now and then, plans with them, and has a policy and a value learn from the plans.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to plan and learn.
        total_updates: length of the learning-rate schedule of policy, value and prior; see :meth:`count_updates`.

    Raises:
        ConfigError: observations that are no vectors, or a planner that cannot do with the task's actions.
    """

    planner = actors_planner

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        obs_dim = vector_dim(spec)
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        self.dynamics = OneStepDynamics(config.dynamics, obs_dim, spec.action_dim, terminates=spec.can_terminate, seed=config.seed)
        parts: dict[str, nn.Module] = {"dynamics": self.dynamics}
        self.imitation = None
        if config.mbmpc.learn_policy:
            self.imitation = Imitation(config, spec, self.dynamics.observations, self.discount, self.device, total_updates)
            parts["behaviour"] = self.imitation.model
        self.prior = make_prior(config, spec, obs_dim, self.device, total_updates)
        if self.prior is not None:
            parts["trajectory"] = self.prior.model
        self.model = nn.ModuleDict(parts).to(self.device)
        self.optimizer = make_optimizer(self.dynamics, config.dynamics)
        self.streams = Streams(config.seed, self.device)
        self.fitting = torch.Generator().manual_seed(derive_seed(config.seed, "fitting"))
        self.planning = self._compose(self.dynamics)
        planner = make_planner(config.planner, spec.action_dim, self.discount, 2, spec.discrete)
        self.actor = PlanningActor(planner, self.streams, self.device)
        self.updates = 0

    @staticmethod
    def count_updates(config: RunConfig, decisions: int) -> int:
        """Return how many updates of policy, value and prior a number of decisions is worth; each fit of the dynamics ends by itself."""
        return decisions // config.mbmpc.fit_every * config.mbmpc.gradient_steps

    def _compose(self, dynamics: OneStepDynamics | BoundDynamics) -> ComposedModel:
        policy, value = (None, None) if self.imitation is None else (self.imitation.policy, self.imitation.value)
        return ComposedModel(dynamics, policy, value, None if self.prior is None else self.prior.model)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can act; with a policy also by that alone."""
        return ("explore", "eval") if self.imitation is None else ("explore", "eval", "prior")

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay that hands out all it holds, every ``mbmpc.fit_every`` decisions."""
        config, replay = self.config, plan_replay(self.config, self.spec, num_envs, self.device)
        first, rate = seed_decisions(config, self.spec.episode_length), Fraction(1, config.mbmpc.fit_every)
        windows = config.mbmpc.gradient_steps * config.loss.batch_size if self.prior is not None else 0

        def draw(rounds: int) -> Seen:
            numbers = torch.rand(rounds * windows, dtype=torch.float64, generator=generator)
            return Seen(replay.transitions(self.discount), replay.sample(numbers) if windows else None, rounds)

        return ReplaySource(replay, 1, rate, first, generator, draw=draw)

    def init_carry(self, num_envs: int) -> Carry:
        """Return the carry of ``num_envs`` fresh episodes."""
        return self.actor.init_carry(num_envs)

    @torch.no_grad()
    def act(self, carry: Carry, obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions: [E, O] -> [E, A] in [-1, 1], or one-hot; ``mode`` is explore, eval, or prior (the policy's mode alone)."""
        if self.imitation is not None and (mode == "prior" or not self.config.planner.mpc):
            stream, shape = self.streams.acting(mode), (len(obs), self.spec.action_dim)
            eps = stream.draw({"eps": NoiseSpec("normal", shape)})["eps"] if mode == "explore" else torch.zeros(shape, device=self.device)
            return ActOutput(self.imitation.policy.sample(obs.to(self.device), eps), carry, {}, {})
        dynamics = with_noise(self.dynamics, self.streams, mode, carry)
        model = self.planning if dynamics is None else self._compose(dynamics)
        return self.actor.act(model, carry, obs, mode, explore=mode == "explore")

    def update(self, batch: Seen) -> Metrics:
        """Fit the dynamics once, then descend the losses of value, policy and prior ``mbmpc.gradient_steps`` times per round."""
        fitted = fit(self.dynamics, self.optimizer, batch.transitions, self.config.dynamics, self.fitting)
        self.updates += batch.rounds
        metrics = fitted.metrics()
        metrics["total_loss"] = metrics["dynamics_holdout_loss"]
        if self.imitation is not None:
            for _ in range(batch.rounds):
                metrics |= self.imitation.update(batch.transitions, self.streams["update"])
        if self.prior is not None and batch.windows is not None:
            size = self.config.loss.batch_size
            for first in range(0, batch.windows.mask.shape[1], size):
                part = slice(first, first + size)
                metrics |= self.prior.update(batch.windows.obs[0, part], batch.windows.action[:, part], batch.windows.mask[:, part])
        return metrics

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, counter and random streams."""
        return {
            "model": dict(self.model.state_dict()),
            "dynamics_optimizer": self.optimizer.state_dict(),
            "imitation": state_of(self.imitation),
            "updates": self.updates,
            "streams": self.streams.state_dict(),
            "fitting": self.fitting.get_state(),
            "prior": state_of(self.prior),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["dynamics_optimizer"]))  # it keeps the tensors it is given
        restore(self.imitation, state["imitation"])
        self.updates = int(state["updates"])
        self.streams.load_state_dict(state["streams"])
        self.fitting.set_state(state["fitting"])
        restore(self.prior, state["prior"])
