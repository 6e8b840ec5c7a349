"""What agents that plan have in common: a replay with records of plans, and plans as answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.common import Streams
from worldmpc.config import LATENT, ConfigError, RunConfig, uses_plans
from worldmpc.data.replay import Replay, make_replay
from worldmpc.planners.sampling import PLAN_RECORDS
from worldmpc.types import ActOutput, Carry, EnvSpec, Mode, Model, Planner, PlanResult


def plan_replay(
    config: RunConfig,
    spec: EnvSpec,
    num_envs: int,
    device: torch.device,
    window: int | None = None,
    more: Mapping[str, tuple[int, ...]] | None = None,
) -> Replay:
    """Return a replay of windows of ``config.window`` steps, or of as many as given, with what plans leave in it, and ``more``.

    Raises:
        ConfigError: a policy that learns from plans, and no planning.
    """
    extras: dict[str, tuple[int, ...]] = dict(more or {})
    extras |= {name: (spec.action_dim,) * rank for name, rank in PLAN_RECORDS.items()} if config.planner.mpc else {}
    if config.agent in LATENT and uses_plans(config):
        if not config.planner.mpc:
            reason = f"policy.objective={config.policy.objective} learns from plans"
            raise ConfigError(f"planner.mpc: {reason}; use planner.mpc=true, or policy.objective=max_q")
        extras["plan_elite"] = (spec.action_dim,)
    return make_replay(config, spec, num_envs, window or config.window, device=device, extras=extras)


def with_noise(dynamics: Any, streams: Streams, mode: Mode, carry: Carry) -> Any | None:
    """Return dynamics bound to the noise of one plan, which they declare by ``noise_specs`` and take by ``bind``; None without any."""
    num_envs, horizon = carry.plan.mean.shape[:2]
    specs = dynamics.noise_specs(horizon, num_envs) if hasattr(dynamics, "noise_specs") else {}
    return dynamics.bind(streams.acting(mode).draw(specs)) if specs else None


def plan_output(plan: PlanResult) -> ActOutput:
    """Return a plan as the answer of an agent."""
    return ActOutput(plan.action, Carry(plan.state), plan_records(plan), plan.metrics)


def plan_records(plan: PlanResult) -> dict[str, Tensor]:
    """Return what plans leave in a replay that has room for it, name -> [E, ...]."""
    return {"plan_mean": plan.mean[:, 0], "plan_std": plan.std[:, 0], "plan_value": plan.value, "plan_elite": plan.elite}


class PlanningActor:
    """Acts by planning with a model: the part of an agent that decides.

    Args:
        planner: refines plans.
        streams: random numbers of the agent.
        device: where to plan.
    """

    def __init__(self, planner: Planner, streams: Streams, device: torch.device) -> None:
        self.planner, self.streams, self.device = planner, streams, device

    def init_carry(self, num_envs: int) -> Carry:
        """Return the carry of ``num_envs`` fresh episodes."""
        return Carry(self.planner.init(num_envs, self.device))

    @torch.no_grad()
    def act(self, model: Model, carry: Carry, obs: Tensor, mode: Mode, explore: bool) -> ActOutput:
        """Plan from observations [E, O], with the noise of a mode, and choose actions [E, A]; noise of the model itself is bound to it."""
        noise = self.streams.acting(mode).draw(self.planner.noise_specs(len(obs)))
        return plan_output(self.planner.plan(model, model.encode(obs.to(self.device)), carry.plan, noise, explore))


def _planner_of(agent: Any) -> Planner:
    return agent.actor.planner


def _replace_planner(agent: Any, planner: Planner) -> None:
    agent.actor.planner = planner


actors_planner = property(_planner_of, _replace_planner, doc="What the agent's ``actor`` plans with; another one may be put in its place.")
