"""Planners that sample action sequences, score them, and refit the sampling distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmpc.config import PlannerConfig
from worldmpc.noise import NoiseSpec
from worldmpc.planners import propose, rollout_return
from worldmpc.types import Model, Noise, PlanResult, PlanState

WORST = -1e30
"""Score of a candidate whose return is not finite: never an elite while any other candidate is finite."""


PLAN_RECORDS = {"plan_mean": 1, "plan_std": 1, "plan_value": 0}
"""What a plan leaves in the replay for each step, and its rank: [A] for mean and std of the first action, [] for the value."""


class MPPI:
    """Model predictive path integral control with policy proposals (TD-MPC2 section 3.3 and its published code).

    Works on a batch of environments. Nothing is remembered between calls: the warm start is an argument.

    Args:
        config: sizes; ``extra_iterations`` are added where ``action_dim`` is 20 or more.
        action_dim: action dimensions.
        discount: per decision.
        num_q: critics to draw the two of each bootstrap from.
    """

    def __init__(self, config: PlannerConfig, action_dim: int, discount: float, num_q: int) -> None:
        self.config, self.action_dim, self.discount, self.num_q = config, action_dim, discount, num_q
        self.iterations = config.iterations + (config.extra_iterations if action_dim >= 20 else 0)

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes: zero mean."""
        return PlanState(torch.zeros(num_envs, self.config.horizon, self.action_dim, device=device))

    def noise_specs(self, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan."""
        config, dim = self.config, self.action_dim
        fresh = config.num_samples - config.num_pi_trajs
        return {
            "proposal": NoiseSpec("normal", (config.horizon, num_envs, config.num_pi_trajs, dim)),
            "samples": NoiseSpec("normal", (self.iterations, config.horizon, num_envs, fresh, dim)),
            "terminal": NoiseSpec("normal", (self.iterations, num_envs, config.num_samples, dim)),
            "critics": NoiseSpec("subset", (self.iterations, 2), self.num_q),
            "elite": NoiseSpec("exponential", (num_envs, config.num_elites)),
            "action": NoiseSpec("normal", (num_envs, dim)),
        }

    @torch.no_grad()
    def plan(self, model: Model, z: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """Refine a plan for every environment and choose the action to execute.

        One elite is drawn with probability proportional to its weight, in evaluation as well (as published); exploration
        adds Gaussian noise of the plan's first standard deviation.

        Args:
            model: what to imagine with.
            z: [E, Z] current latents.
            state: warm start, one entry per environment.
            noise: tensors of :meth:`noise_specs`.
            explore: add exploration noise to the action.
        """
        config = self.config
        proposals = propose(model, z, noise["proposal"])
        starts = z[:, None].expand(-1, config.num_samples, -1)
        mean = state.mean.transpose(0, 1)  # [H, E, A]
        std = torch.full_like(mean, config.max_std)
        for iteration in range(self.iterations):
            fresh = (mean[:, :, None] + std[:, :, None] * noise["samples"][iteration]).clamp(-1, 1)
            actions = torch.cat((proposals, fresh), 2)  # [H, E, S, A]
            returns = rollout_return(model, starts, actions, self.discount, noise["terminal"][iteration], noise["critics"][iteration])
            bad = ~returns.isfinite()
            elite_value, index = returns.masked_fill(bad, WORST).topk(config.num_elites, dim=1)  # [E, elites]
            elites = actions.gather(2, index[None, :, :, None].expand(config.horizon, -1, -1, self.action_dim))
            score = torch.softmax(config.temperature * elite_value, 1)
            weight = score[None, :, :, None] / (score.sum(1)[:, None, None] + 1e-9)
            mean = (weight * elites).sum(2)
            std = (weight * (elites - mean[:, :, None]).square()).sum(2).sqrt().clamp(config.min_std, config.max_std)
        chosen = (score / noise["elite"]).argmax(1, keepdim=True)  # Gumbel-max over log(score), written without the log
        elite = elites[0].gather(1, chosen[:, :, None].expand(-1, -1, self.action_dim)).squeeze(1)
        action = (elite + std[0] * noise["action"]).clamp(-1, 1) if explore else elite
        mean, std = mean.transpose(0, 1).contiguous(), std.transpose(0, 1).contiguous()
        return PlanResult(
            action=action,
            elite=elite,
            mean=mean,
            std=std,
            value=elite_value.gather(1, chosen).squeeze(1),
            state=PlanState(torch.cat((mean[:, 1:], torch.zeros_like(mean[:, :1])), 1)),
            metrics={"plan_std": std[:, 0].mean(), "plan_bad": bad.float().mean()},
        )
