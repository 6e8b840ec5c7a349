"""Model predictive control with known dynamics: any planner, nothing to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.common import Streams, discount_of, vector_dim
from worldmpc.agents.planning import PlanningActor, actors_planner, with_noise
from worldmpc.config import ConfigError, EnvConfig, RunConfig
from worldmpc.data.source import NoSource
from worldmpc.envs import make_env
from worldmpc.models.analytic import analytic_dynamics
from worldmpc.models.composed import ComposedModel, Dynamics, check_model
from worldmpc.models.simulator import SimulatorModel
from worldmpc.planners import make_planner
from worldmpc.types import ActOutput, Batch, Carry, EnvSpec, Metrics, Mode


class MPC:
    """Plans with the equations of a task, or with copies of its simulator.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to plan.
        total_updates: not used.
        dynamics: a model of one's own, with its reward, in place of the task's; checkpoints hold its parameters, not itself.

    Raises:
        ConfigError: a task whose dynamics are not known, dynamics of other shapes, or a planner that cannot do with the actions.
    """

    modes: tuple[Mode, ...] = ("explore", "eval")
    planner = actors_planner

    def __init__(
        self,
        config: RunConfig,
        spec: EnvSpec,
        device: torch.device | str = "cpu",
        total_updates: int = 1,
        dynamics: Dynamics | None = None,
    ) -> None:
        vector_dim(spec)
        self.config, self.spec, self.device = config, spec, torch.device(device)
        self.discount = discount_of(config, spec)
        self.model = ComposedModel(known_dynamics(config, spec) if dynamics is None else dynamics).to(self.device)
        check_model(self.model, spec.obs_shape, spec.action_dim, self.device)
        self.streams = Streams(config.seed, self.device)
        planner = make_planner(config.planner, spec.action_dim, self.discount, 2, spec.discrete)
        self.actor = PlanningActor(planner, self.streams, self.device)
        self.updates = 0

    def make_source(self, num_envs: int, generator: torch.Generator) -> NoSource:
        """Return a source that never asks for an update."""
        return NoSource()

    def init_carry(self, num_envs: int) -> Carry:
        """Return the carry of ``num_envs`` fresh episodes."""
        return self.actor.init_carry(num_envs)

    def act(self, carry: Carry, obs: Tensor, mode: Mode) -> ActOutput:
        """Choose actions by planning: [E, O] -> [E, A] in [-1, 1], or one-hot; it never explores."""
        dynamics = with_noise(self.model.dynamics, self.streams, mode, carry)
        return self.actor.act(self.model if dynamics is None else ComposedModel(dynamics), carry, obs, mode, explore=False)

    def update(self, batch: Batch) -> Metrics:
        """Refuse.

        Raises:
            RuntimeError: always, as there is nothing to learn.
        """
        raise RuntimeError("agent=mpc learns nothing")

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew."""
        self.streams.restart_eval(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return the random streams, and the parameters of dynamics of one's own that have any."""
        return {"model": dict(self.model.state_dict()), "streams": self.streams.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.streams.load_state_dict(state["streams"])


def known_dynamics(config: RunConfig, spec: EnvSpec) -> Dynamics:
    """Return the dynamics of a task: its equations, or copies of its simulator.

    Raises:
        ConfigError: there are none.
    """
    if "/" not in spec.name:  # an environment object or class, which no registry knows
        raise ConfigError(
            f"dynamics.name: {spec.name} is an environment of your own, of which there are neither known equations nor copies; "
            "pass yours to worldmpc.agents.mpc.MPC(config, spec, dynamics=...), or use agent=mbmpc, which learns them"
        )
    if config.dynamics.name == "analytic":
        return analytic_dynamics(spec.name, spec.action_repeat)
    if not config.env.simulator_state:
        raise ConfigError("env.simulator_state: dynamics=simulator needs the simulator's state in observations; set it to true")
    env: EnvConfig = dataclasses.replace(config.env, num_envs=1, workers="sync", num_workers=None, simulator_state=True)
    return SimulatorModel(lambda: make_env(spec.name, config=env, seed=config.seed))
