"""Goals while acting: which one is followed in each environment, and when the next one is due."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.models.hierarchy import Hierarchy
from worldmpc.noise import NoiseSpec
from worldmpc.types import PlanState


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
