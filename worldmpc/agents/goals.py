"""Goals while acting: which one is followed in each environment, when the next one is due, and plans towards it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmpc.config import RunConfig
from worldmpc.functional import CapturedByShape, maybe_compile, seconds_compiling
from worldmpc.models.goal_directed import GOAL_ALONE, GoalDirected, with_goal
from worldmpc.models.hierarchy import Hierarchy
from worldmpc.models.packing import constant_parameters
from worldmpc.noise import NoiseSpec
from worldmpc.types import Mode, Noise, Planner, PlanResult, PlanState


class GoalCarry(NamedTuple):
    """What an agent with goals remembers between two decisions, one entry per environment."""

    plan: PlanState
    goal: Tensor  # [E, Z]
    code: Tensor  # [E, L] classes of the goal's codes, as float; NaN where the manager did not choose it
    left: Tensor  # [E] int64 decisions until the next goal


class GoalSetter:
    """Lets the manager choose a goal where an episode begins, and then every ``interval`` decisions.

    Args:
        hierarchy: its manager chooses, its autoencoder decodes.
        interval: decisions between two goals.
    """

    def __init__(self, hierarchy: Hierarchy, interval: int) -> None:
        self.hierarchy, self.interval = hierarchy, interval

    def begin(self, plan: PlanState) -> GoalCarry:
        """Return the carry of fresh episodes with these plans, in which a goal is due at once."""
        num_envs, device, goals = len(plan.mean), plan.mean.device, self.hierarchy.goals
        goal, code = torch.zeros(num_envs, goals.latent_dim, device=device), torch.zeros(num_envs, goals.codes, device=device)
        return GoalCarry(plan, goal, code, torch.zeros(num_envs, dtype=torch.int64, device=device))

    def noise_specs(self, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of goals that are drawn at random."""
        return {"codes": NoiseSpec("normal", (num_envs, self.hierarchy.goals.codes, self.hierarchy.goals.classes))}

    def choose(self, z: Tensor, carry: GoalCarry, eps: Tensor | None) -> GoalCarry:
        """Take new goals where they are due, drawn with noise [E, L, C], or without any the most likely ones, at latents [E, Z]."""
        code, due = self.hierarchy.manager.choose(z, eps), carry.left == 0
        goal = torch.where(due[:, None], self.hierarchy.goals.decode(code), carry.goal)
        number = torch.where(due[:, None], code.argmax(-1).to(carry.code.dtype), carry.code)
        return carry._replace(goal=goal, code=number, left=torch.where(due, self.interval, carry.left) - 1)

    def follow(self, carry: GoalCarry, goal: Tensor | str) -> GoalCarry:
        """Follow given goals [E, Z] for one decision.

        Raises:
            TypeError: no tensor.
            ValueError: goals of another shape, or not finite.
        """
        if not isinstance(goal, Tensor):
            raise TypeError(f"goal: expected 'manager', None or a tensor of latents, got {goal!r}")
        if goal.shape != carry.goal.shape:
            raise ValueError(f"goal: expected latents {list(carry.goal.shape)}, got {list(goal.shape)}")
        if not bool(goal.isfinite().all()):
            raise ValueError("goal: expected finite latents, got some that are not")
        unknown = torch.full_like(carry.code, torch.nan)
        return carry._replace(goal=goal.to(carry.goal), code=unknown, left=torch.ones_like(carry.left))


class GoalPlans:
    """Plans towards goals, compiled and captured as configured.

    Args:
        config: of the run.
        planner: makes them.
        planning: world model with goals, weighed against the task.
        setter: chooses goals where they are due.
        device: where they are made.
    """

    def __init__(self, config: RunConfig, planner: Planner, planning: GoalDirected, setter: GoalSetter, device: torch.device) -> None:
        self._config, self._planner, self._setter, self._device = config, planner, setter, device
        alone = GoalDirected(planning.model, planning.worker, planning.similarity, lambda: GOAL_ALONE)
        self._models = {False: planning, True: alone}
        self._plan = maybe_compile(self._refine, config.compile)
        how = {
            (mode, alone): functools.partial(self._decide, explore=mode == "explore", alone=alone)
            for mode, alone in itertools.product(("explore", "eval"), self._models)
        }
        self._verbs: dict[tuple[str, bool], Callable[..., Any]] = {
            key: CapturedByShape(verb) if config.cuda_graph else verb for key, verb in how.items()
        }

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took so far."""
        return seconds_compiling(self._plan)

    def decide(self, obs: Tensor, carry: GoalCarry, noise: Noise, mode: Mode, alone: bool) -> tuple[GoalCarry, PlanResult]:
        """Take goals where they are due, and plan towards them, the task forgotten where they stand ``alone``: [E, O] -> [E, A]."""
        return self._verbs[mode, alone](obs, carry, noise)

    def state(self, obs: Tensor, carry: GoalCarry, noise: Noise) -> tuple[GoalCarry, Tensor]:
        """Take goals where they are due, and return latents and goals beside each other, [E, 2 Z]."""
        z = self._models[False].encode(obs)
        carry = self._setter.choose(z, carry, noise.get("codes"))
        return carry, with_goal(z, carry.goal)

    def _decide(self, obs: Tensor, carry: GoalCarry, noise: Noise, explore: bool, alone: bool) -> tuple[GoalCarry, PlanResult]:
        reduced = self._config.planner.precision == "bf16"
        with constant_parameters(), torch.autocast(self._device.type, torch.bfloat16, enabled=reduced):
            carry, state = self.state(obs, carry, noise)
            plan = self._plan(state, carry.plan, noise, explore, alone)
        return carry._replace(plan=plan.state), plan

    def _refine(self, z: Tensor, state: PlanState, noise: Noise, explore: bool, alone: bool) -> PlanResult:
        return self._planner.plan(self._models[alone], z, state, noise, explore)
