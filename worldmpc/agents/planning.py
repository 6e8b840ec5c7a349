"""What agents that plan have in common: a replay with records of plans, and plans as answers."""

from __future__ import annotations

import torch

from worldmpc.config import RunConfig
from worldmpc.data.replay import Replay, make_replay
from worldmpc.planners.sampling import PLAN_RECORDS
from worldmpc.types import ActOutput, Carry, EnvSpec, PlanResult


def plan_replay(config: RunConfig, spec: EnvSpec, num_envs: int, device: torch.device) -> Replay:
    """Return a replay of windows of ``planner.horizon`` steps, with what plans leave in it for every step."""
    extras = {name: (spec.action_dim,) * rank for name, rank in PLAN_RECORDS.items()} if config.planner.mpc else {}
    return make_replay(config, spec, num_envs, config.planner.horizon, device=device, extras=extras)


def plan_output(plan: PlanResult) -> ActOutput:
    """Return a plan as the answer of an agent."""
    return ActOutput(
        plan.action, Carry(plan.state), {"plan_mean": plan.mean[:, 0], "plan_std": plan.std[:, 0], "plan_value": plan.value}, plan.metrics
    )
