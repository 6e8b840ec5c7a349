"""Planners that sample action sequences, score them, and refit the sampling distribution: one loop, the rules of :mod:`.rules`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.noise import NoiseSpec
from worldmpc.planners import propose, rollout_return
from worldmpc.planners.coloured import colour
from worldmpc.planners.distributions import Categorical, Gaussian
from worldmpc.planners.gradient import ascend, better
from worldmpc.planners.rules import RULES, WORST, equal_weights, soft_weights
from worldmpc.types import Model, Noise, PlanResult, PlanState

PLAN_RECORDS = {"plan_mean": 1, "plan_std": 1, "plan_value": 0}
"""What a plan leaves in the replay for each step, and its rank: [A] for mean and std of the first action, [] for the value."""

ABSENT = float("inf")
"""An action in :attr:`PlanState.elites` that is not decided yet: it is sampled as any other."""


class SamplingPlanner:
    """MPPI, CEM, iCEM, random shooting and policy-guided shooting, by ``config.name``.

    All sample candidate sequences, score them by :func:`worldmpc.planners.rollout_return`, and refit a distribution to the best:

    ==================  ==========================  =======================================  =======================
    name                samples                     refit                                    executes
    ==================  ==========================  =======================================  =======================
    ``mppi``            normal                      elites weigh exp(temperature * value)    an elite, by weight
    ``cem``             normal                      elites weigh the same; momentum          the refined mean
    ``icem``            coloured, fewer by the      elites weigh the same; momentum          the best sequence seen
                        iteration; kept elites
    ``random_shooting`` uniform, once               elites weigh the same                    the best sequence
    ``policy_guided``   the policy prior with       elites weigh exp(temperature * value)    the best sequence
                        noise, once
    ==================  ==========================  =======================================  =======================

    ``mppi`` is TD-MPC2's (section 3.3 and published code). One-hot actions are sampled from a categorical per step, and ``cem`` then
    executes the most likely one, as ``mppi`` does in evaluation. Works on a batch of environments; nothing is remembered between calls:
    the warm start is an argument.

    Args:
        config: which planner, and its sizes; ``extra_iterations`` are added where ``action_dim`` is 20 or more.
        action_dim: action dimensions, or choices.
        discount: per decision.
        num_q: critics to draw the two of each bootstrap from.
        discrete: actions are one-hot.

    Raises:
        ConfigError: more proposals and kept elites than candidates.
    """

    def __init__(self, config: PlannerConfig, action_dim: int, discount: float, num_q: int, discrete: bool = False) -> None:
        self.config, self.action_dim, self.discount, self.num_q = config, action_dim, discount, num_q
        self.rule, self.discrete = RULES[config.name], discrete
        self.space = Categorical(action_dim, config.uniform_mix) if discrete else Gaussian(config.min_std, config.max_std)
        self.iterations = config.iterations + (config.extra_iterations if action_dim >= 20 else 0) if self.rule.refines else 1
        self.num_pi = config.num_samples if self.rule.guided else config.num_pi_trajs
        self.num_kept = round(config.keep_elites * config.num_elites) if self.rule.keeps else 0
        self.sizes = [self._size(iteration) for iteration in range(self.iterations)]
        """Candidates of each iteration."""

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes: zero mean or uniform probabilities, and no elites."""
        shape = (self.config.horizon, self.action_dim)
        mean = torch.full((num_envs, *shape), self.space.rest, device=device)
        return PlanState(mean, torch.full((num_envs, self.num_kept, *shape), ABSENT, device=device))

    def noise_specs(self, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan."""
        config, dim = self.config, self.action_dim
        fresh = config.num_samples if self.rule.guided else config.num_samples - self.num_pi
        return {
            "proposal": NoiseSpec("normal", (config.horizon, num_envs, self.num_pi, dim)),
            "samples": NoiseSpec("normal", (self.iterations, config.horizon, num_envs, fresh, dim)),
            "terminal": NoiseSpec("normal", (self.iterations, num_envs, config.num_samples, dim)),
            "critics": NoiseSpec("subset", (self.iterations, 2), self.num_q),
            "elite": NoiseSpec("exponential", (num_envs, config.num_elites)),
            "action": NoiseSpec("normal", (num_envs, dim)),
        }

    @torch.no_grad()
    def plan(self, model: Model, z: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """Refine a plan for every environment and choose the action to execute.

        ``mppi`` draws an elite with probability proportional to its weight, in evaluation as well (as published). Exploration adds
        Gaussian noise of the plan's first standard deviation; a one-hot action is drawn from the plan's first probabilities, and in
        evaluation the most likely one executed: unlike Gaussian elites, its neighbours are not almost the same.
        Candidates whose return is not finite count as worst; ``plan_bad`` is their share over all iterations.

        Args:
            model: what to imagine with.
            z: [E, Z] current latents.
            state: warm start, one entry per environment.
            noise: tensors of :meth:`noise_specs`.
            explore: choose an exploring action.

        Returns:
            The plan; ``value`` is the return of the executed sequence, of ``cem``'s mean that of the best elite of the last iteration.
        """
        config, rule, space = self.config, self.rule, self.space
        proposals = self._proposals(model, z, noise)
        mean, std = space.start(state.mean.transpose(0, 1))  # [H, E, A]
        elites = state.elites.permute(2, 0, 1, 3)  # [H, E, kept, A]
        bad, tops = [], []
        for iteration, size in enumerate(self.sizes):
            fresh = self._samples(mean, std, noise["samples"][iteration], elites, iteration)
            actions = torch.cat((proposals, fresh), 2)  # [H, E, S, A]
            starts, eps = z[:, None].expand(-1, size, -1), _first(noise["terminal"][iteration], 1, size)
            returns = rollout_return(
                model, starts, actions, self.discount, eps, noise["critics"][iteration], uncertainty_coef=config.uncertainty_coef
            )
            bad.append(~returns.isfinite())
            elite_value, index = returns.masked_fill(bad[-1], WORST).topk(config.num_elites, dim=1)  # [E, elites], best first
            elites = actions.gather(2, index[None, :, :, None].expand(config.horizon, -1, -1, self.action_dim))
            elites = elites.nan_to_num(0.0, 0.0, 0.0)  # of a broken prior, where hardly any candidate is better
            score = self._weights(elite_value)
            weight = score[None, :, :, None] / (score.sum(1)[:, None, None] + 1e-9)
            mean, std = space.refit(elites, weight, mean, std, config.momentum if rule.momentum else 0.0)
            if rule.execute == "best":
                tops.append((elites[:, :, 0], elite_value[:, 0]))
        if rule.execute == "draw" and (explore or not self.discrete):
            chosen = (score / noise["elite"]).argmax(1, keepdim=True)  # Gumbel-max over log(score), written without the log
            best = elites.gather(2, chosen[None, :, :, None].expand(config.horizon, -1, -1, self.action_dim)).squeeze(2)
            best_value = elite_value.gather(1, chosen).squeeze(1)
        elif rule.execute in ("draw", "mean"):
            best, best_value = space.mode(mean), elite_value[:, 0]
        else:
            best, best_value = functools.reduce(lambda former, top: better(*top, *former), tops)
        if config.gradient_steps:
            best, best_value, mean = self._climb(model, z, best, mean, noise)
        action = space.explore(best[0], mean[0], std[0], noise["action"]) if explore else best[0]
        mean, std = mean.transpose(0, 1).contiguous(), std.transpose(0, 1).contiguous()
        return PlanResult(
            action=action,
            elite=best[0],
            mean=mean,
            std=std,
            value=best_value,
            state=PlanState(_shifted(mean, space.rest), self._kept(elites) if rule.keeps else state.elites),
            metrics={"plan_std": std[:, 0].mean(), "plan_bad": torch.cat(bad, 1).float().mean()},
        )

    def _size(self, iteration: int) -> int:
        """Return the number of candidates of an iteration (Pinneri et al. 2020, section 3.2), and check that all kinds have room."""
        config = self.config
        if not self.rule.keeps:
            return config.num_samples
        least = min(2 * config.num_elites, config.num_samples)
        size = max(round(config.num_samples * config.sample_decay**-iteration), least)
        needed = self.num_pi + self.num_kept + 1
        if size < needed:
            raise ConfigError(
                f"planner.num_samples: {size} candidates of iteration {iteration + 1} have no room for {self.num_pi} policy proposals, "
                f"{self.num_kept} kept elites and the mean; use at least {needed}, or smaller num_pi_trajs or keep_elites"
            )
        return size

    def _proposals(self, model: Model, z: Tensor, noise: Noise) -> Tensor:
        """Sequences of the policy prior [H, E, P, A]; if they are all that there is, with noise, but for one that follows the mode."""
        eps = noise["proposal"]
        if not self.rule.guided:
            return propose(model, z, eps)

        def disturb(step: int, action: Tensor) -> Tensor:
            disturbed = self.space.disturb(action[:, 1:], noise["samples"][0, step, :, 1:], self.config.pi_noise)
            return torch.cat((action[:, :1], disturbed), 1)

        return propose(model, z, torch.cat((torch.zeros_like(eps[:, :, :1]), eps[:, :, 1:]), 2), disturb)

    def _samples(self, mean: Tensor, std: Tensor, eps: Tensor, elites: Tensor, iteration: int) -> Tensor:
        """Return candidates beside the proposals: [H, E, A], [H, E, A], [H, E, n, A], [H, E, elites, A] -> [H, E, S - P, A]."""
        rule, last = self.rule, self.rule.keeps and iteration == self.iterations - 1
        eps = _first(eps, 2, self.sizes[iteration] - self.num_pi - last)
        if rule.noise == "uniform":
            return self.space.uniform(eps)
        if rule.noise == "coloured":
            eps = colour(eps, self.config.noise_exponent)
        fresh = self.space.sample(mean[:, :, None], std[:, :, None], eps)
        if not rule.keeps:
            return fresh
        kept = elites[:, :, : self.num_kept]
        parts = [kept.where(kept.isfinite(), fresh[:, :, : self.num_kept]), fresh[:, :, self.num_kept :]]
        return torch.cat((*parts, self.space.mode(mean)[:, :, None]) if last else parts, 2)

    def _kept(self, elites: Tensor) -> Tensor:
        """Candidates of the next plan: [H, E, elites, A] -> [E, kept, H, A]."""
        return _shifted(elites[:, :, : self.num_kept].permute(1, 2, 0, 3), ABSENT)

    def _weights(self, values: Tensor) -> Tensor:
        """Weights of elites: [E, elites] -> [E, elites]."""
        temperature = self.config.temperature
        return soft_weights(values, temperature) if self.rule.soft and temperature else equal_weights(values)

    def _climb(self, model: Model, z: Tensor, best: Tensor, mean: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Return the chosen sequences [H, E, A] refined by gradient, their returns [E], and the mean, which they replace if better."""
        eps, critics = noise["terminal"][-1, :, :1], noise["critics"][-1]

        def score(actions: Tensor) -> Tensor:
            how = {"differentiable": True, "uncertainty_coef": self.config.uncertainty_coef}
            return rollout_return(model, z[:, None], actions[:, :, None], self.discount, eps, critics, **how)[:, 0]

        climbed, value = ascend(score, best, self.config.gradient_steps, self.config.gradient_lr)
        improved = (climbed != best).any(2, keepdim=True).any(0, keepdim=True)
        return climbed, value, climbed.where(improved, mean)


def _first(noise: Tensor, dim: int, count: int) -> Tensor:
    """Return the first entries along a dimension, at no cost where these are all."""
    return noise if noise.shape[dim] == count else noise.narrow(dim, 0, count)


def _shifted(sequences: Tensor, rest: float) -> Tensor:
    """Drop the first step and put one that nothing is known about at the end: [E, ..., H, A] -> [E, ..., H, A]."""
    return torch.cat((sequences[..., 1:, :], torch.full_like(sequences[..., :1, :], rest)), -2)
