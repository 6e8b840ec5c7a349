"""TD-MPC2 (Hansen, Su, Wang 2024, "TD-MPC2: Scalable, Robust World Models for Continuous Control") and its relatives.

TD-M(PC)^2 (Lin et al. 2025), BMPC (Wang et al. 2025), BOOM (2025) and multi-discount values are other choices for the same slots: what
the policy prior learns from, what critics read and learn, plans renewed in the replay, auxiliary losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.common import Streams, discount_of, restore, state_of, vector_dim
from worldmpc.agents.imagining import imagined_dim, make_simulation
from worldmpc.agents.opponent_methods import OpponentMethods
from worldmpc.agents.planning import plan_output, plan_records, plan_replay
from worldmpc.config import RunConfig, seed_decisions, updates_worth
from worldmpc.data.source import ReplaySource
from worldmpc.functional import CapturedByShape, maybe_compile, seconds_compiling
from worldmpc.learners.objectives import Objectives
from worldmpc.learners.reanalyze import Reanalyze
from worldmpc.learners.trajectory_prior import make_prior
from worldmpc.learners.world_model import make_learner
from worldmpc.models.auxiliary import check_record, make_auxiliary, record_of
from worldmpc.models.packing import constant_parameters
from worldmpc.models.proposals import WiderProposals
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.planners import make_planner
from worldmpc.types import ActOutput, Carry, EnvSpec, GameCarry, Metrics, Mode, Noise, PlanResult, PlanState, SequenceBatch


class TDMPC2(OpponentMethods):
    """Plans in the latent space of a world model that it learns from replayed windows, with Box and with Discrete actions.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule.

    Raises:
        ConfigError: observations that the encoder does not support, or opponents to imagine where nobody else plays.
    """

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        self.terminates = config.model.termination == "on" or (config.model.termination == "auto" and spec.can_terminate)
        kind = {"terminates": self.terminates, "discrete": spec.discrete, "other_dim": imagined_dim(config, spec), "seed": config.seed}
        self.model = WorldModel(config.model, vector_dim(spec), spec.action_dim, **kind)
        self.model.auxiliary = make_auxiliary(config.multi_gamma, self.model, self.discount)
        self.model.to(self.device)
        self.planner = make_planner(config.planner, spec.action_dim, self.discount, self.model.num_q, spec.discrete)
        self.objectives = Objectives(config, self.model, self.discount)
        self._total_updates = total_updates
        self.begin_learning()
        self.simulation = make_simulation(config, spec, self.model, self.device, total_updates)
        self.streams = Streams(config.seed, self.device, "reanalyze")
        self.prior = make_prior(config, spec, self.model.latent_dim, self.device, total_updates)
        self.model.trajectory = None if self.prior is None else self.prior.model
        self._plan = maybe_compile(lambda *how: self.planner.plan(*how), config.compile)  # asked late: another one may take its place
        how = {"explore": {"explore": True}, "eval": {"explore": False}, "anew": {"explore": False, "anew": True}}
        self._verbs: dict[str, Callable[..., PlanResult]] = {name: functools.partial(self.plan, **kind) for name, kind in how.items()}
        if config.cuda_graph:
            self._verbs = {name: CapturedByShape(verb) for name, verb in self._verbs.items()}

    def begin_learning(self) -> None:
        """Learn anew with the networks and groups as they are now; for whoever has put others in their place."""
        first = seed_decisions(self.config, self.spec.episode_length) if self.config.policy.skip_seed_updates else 0
        updates = updates_worth(first, self.config.train.utd)
        self.learner = make_learner(self.config, self.model, self.objectives, self._total_updates, updates)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can act; without planning there is nothing but the prior."""
        return ("explore", "eval", "prior") if self.config.planner.mpc else ("explore", "eval")

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took so far; 0 without ``compile``."""
        return self.learner.compile_seconds + seconds_compiling(self._plan)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.learner.updates

    def init_carry(self, num_envs: int) -> Carry | GameCarry:
        """Return the carry of ``num_envs`` fresh episodes."""
        return self._carry_of(self.planner.init(num_envs, self.device))

    @torch.no_grad()
    def act(self, carry: Carry | GameCarry, obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions: [E, O] -> [E, A] in [-1, 1], or one-hot; ``mode`` is explore, eval, or prior (the policy's mean)."""
        obs, stream = obs.to(self.device), self.streams.acting(mode)
        if mode == "prior" or not self.config.planner.mpc:
            eps = stream.draw({"eps": NoiseSpec("normal", (len(obs), self.spec.action_dim))})["eps"]
            action = self.model.propose(self.model.encode(obs), eps if mode == "explore" else torch.zeros_like(eps))
            return ActOutput(action, carry, {}, {})
        noise = stream.draw(self.planner.noise_specs(len(obs)))
        if isinstance(carry, GameCarry):
            return self._act_in_game(carry, obs, noise, stream, mode)
        return plan_output(self._verbs[mode](obs, carry.plan, noise))

    def plan(self, obs: Tensor, state: PlanState, noise: Noise, explore: bool, anew: bool = False, model: Any = None) -> PlanResult:
        """Encode observations [E, O] and plan from there, in another ``model``; ``anew`` with the wider proposals of reanalysis."""
        model = self._wider() if anew else model or self.model
        with constant_parameters(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.planner.precision == "bf16"):
            return self._plan(model, self.model.encode(obs), state, noise, explore)

    def _wider(self) -> WiderProposals:
        return WiderProposals(self.model, self.config.reanalyze.log_std_min, self.config.reanalyze.log_std_max)

    @torch.no_grad()
    def replan(self, obs: Tensor) -> dict[str, Tensor]:
        """Plan from replayed observations [E, O], without a warm start, and return what the plans leave in the replay, name -> [E, ...]."""
        noise = self.streams["reanalyze"].draw(self.planner.noise_specs(len(obs)))
        return plan_records(self._verbs["anew"](obs, self.planner.init(len(obs), self.device), noise))

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay of windows of ``config.window`` steps, with what plans leave in it."""
        config, replay = self.config, plan_replay(self.config, self.spec, num_envs, self.device)
        first = seed_decisions(config, self.spec.episode_length)
        refresh = None
        if config.reanalyze.interval and self._wider():  # what cannot be done shows here, not once the first reanalysis is due
            refresh = Reanalyze(config.reanalyze, replay, self.replan, self.learner.policy_from)
        return ReplaySource(replay, config.loss.batch_size, config.train.utd, first, generator, refresh=refresh)

    def update(self, batch: SequenceBatch) -> Metrics:
        """Do one published update: world model, then policy, then slow critics."""
        return self.update_with_noise(batch, self.streams["update"].draw(self.objectives.noise_specs(*batch.reward.shape)))

    def update_with_noise(self, batch: SequenceBatch, noise: Noise) -> Metrics:
        """Do one update with given noise; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied."""
        metrics = self.learner.update(batch, noise)
        if self.prior is not None:
            metrics |= self.prior.update(self.model.encode(batch.obs[0]).detach(), batch.action, batch.mask)
        return metrics | (self.simulation.update(batch) if self.simulation is not None else {})

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, running scale, counter and random streams."""
        return {
            "model": dict(self.model.state_dict()),
            **self.learner.state_dict(),
            "streams": self.streams.state_dict(),
            "prior": state_of(self.prior),
            "simulation": state_of(self.simulation),
            "multi_gamma": record_of(self.model.auxiliary),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it has other auxiliary values or another prior.
        """
        check_record(self.model.auxiliary, state.get("multi_gamma"))
        self.model.load_state_dict(state["model"])
        self.learner.load_state_dict(state)
        self.streams.load_state_dict(state["streams"])
        restore(self.prior, state.get("prior"))
        restore(self.simulation, state.get("simulation"))
