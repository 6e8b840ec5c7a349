"""Planning as inference over action sequences, p(tau | z) ~ p0(tau | z) exp(beta R(tau)), by diffusion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.trajectory import UNGUIDED_STEPS, GuidanceFn, TrajectoryModel
from worldmpc.noise import NoiseSpec, gumbel
from worldmpc.planners import propose, rollout_return
from worldmpc.planners.rules import WORST
from worldmpc.types import Model, Noise, PlanResult, PlanState

FLAT = 1e-4
"""Returns that spread less than this are not standardised, as in the published code of model-based diffusion."""


def geometric_sigmas(steps: int, first: float, last: float) -> list[float]:
    """Return ``steps`` standard deviations from ``first`` down to ``last``, each the same factor below the one before.

    Not those of model-based diffusion, sqrt(1 - abar_i) (Pan et al. 2024), which suit its 100 steps: of the few that fit into a decision
    they never search far, and end below what is worth telling apart.
    """
    return [first * (last / first) ** (step / max(steps - 1, 1)) for step in range(steps)]


def moments(returns: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation [E, 1] of returns [E, S], which count where their weight is above 0; 0 where none does."""
    counts = weight > 0
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    mean = (weight * torch.where(counts, returns, 0.0)).sum(1, keepdim=True)
    variance = (weight * torch.where(counts, returns - mean, 0.0).square()).sum(1, keepdim=True)
    return mean, variance.sqrt()


def standardise(returns: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """(returns - mean) / spread, where a spread below :data:`FLAT` counts as 1: [E, S], [E, 1], [E, 1] -> [E, S]."""
    return (returns - mean) / torch.where(spread < FLAT, 1.0, spread)


def systematic(weight: Tensor, uniform: Tensor) -> Tensor:
    """Resample: [E, S] that sum to one, [E] -> indices [E, S], each as often as its weight times S, rounded up or down.

    Systematic resampling (Kitagawa 1996): equally spaced places with one random shift on the cumulative weights.
    """
    samples = weight.shape[1]
    cumulative = weight.cumsum(1)
    places = (torch.arange(samples, device=weight.device) + uniform[:, None]) / samples
    # Below 1, so that the first entry beyond a place exists and has weight, whatever the rounding.
    return torch.searchsorted(cumulative / cumulative[:, -1:], places.clamp(max=1 - 2**-24), right=True)


class Particles(NamedTuple):
    """Candidates of the last step, and what became of all of them."""

    actions: Tensor  # [H, E, S, A]
    returns: Tensor  # [E, S], WORST where not finite
    weight: Tensor  # [E, S], sums to one
    bad: Tensor  # [] share of candidates without a finite return, over all steps


class Diffusion:
    """Diffusion over action sequences, with and without a learned prior. Nothing is remembered between calls.

    ``prior="none"``: model-based diffusion (Pan et al. 2024). Each step scores candidates around a centre, at a prescribed deviation that
    falls geometrically from ``max_std`` to ``min_std``, and moves the centre to their mean weighted by exp(beta * standardised return).
    Proposals of the policy are candidates at every step. The last plan, shifted, is the first centre. In evaluation the centre's first
    action is executed. One-hot actions: the centre is a distribution, and candidates take the largest entry of centre plus noise.

    ``prior="learned"``: ``num_samples`` particles of the model's ``trajectory`` (a :class:`TrajectoryModel`) are denoised as a twisted
    particle filter (Wu et al. 2023; guidance is not corrected for, but part of the prior). A particle's potential is beta * abar *
    standardised return of its predicted clean sequence, in the end beta * standardised return. At every step particles are resampled by
    how much it has grown since that of their parent: these weights multiply up to the last potential, so that the result is a sample of
    p0 exp(beta R), where weights of the whole potential would count the return once per step. abar is about the part of the spread of
    clean sequences that their predictions show, so that early guesses do not decide. Returns are standardised by the prior's spread: that
    with the selection undone by weights, and the largest so far, as both are estimates from below. The executed sequence is drawn by the
    last weights, in evaluation as well. Neither the policy's proposals nor the last plan take part, as neither comes from p0.

    Exploration adds noise of ``min_std`` to Box actions; of one-hot actions it draws from the centre.

    Args:
        config: ``extra_iterations`` are added where ``action_dim`` is 20 or more.
        action_dim: action dimensions, or choices.
        discount: per decision.
        num_q: critics to draw the two of each bootstrap from.
        discrete: actions are one-hot vectors.

    Raises:
        ConfigError: more iterations than the learned prior has diffusion steps.
    """

    def __init__(self, config: PlannerConfig, action_dim: int, discount: float, num_q: int, discrete: bool = False) -> None:
        self.config, self.action_dim, self.discount, self.num_q, self.discrete = config, action_dim, discount, num_q, discrete
        self.iterations = config.iterations + (config.extra_iterations if action_dim >= 20 else 0)
        self.learned = config.prior == "learned"
        if self.learned and self.iterations > config.prior_steps:
            which = "planner.iterations" if self.iterations == config.iterations else "planner.iterations + planner.extra_iterations"
            raise ConfigError(f"planner.prior_steps: expected at least {which} ({self.iterations}), got {config.prior_steps}")
        self.sigmas = geometric_sigmas(self.iterations, config.max_std, config.min_std)

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes: zero, or equal probabilities."""
        mean = torch.full((num_envs, self.config.horizon, self.action_dim), self._rest, device=device)
        return PlanState(mean, mean[:, None][:, :0])

    def noise_specs(self, num_envs: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one plan."""
        config, dim, steps = self.config, self.action_dim, self.iterations
        shared = {
            "terminal": NoiseSpec("normal", (steps, num_envs, config.num_samples, dim)),
            "critics": NoiseSpec("subset", (steps, 2), self.num_q),
            "action": NoiseSpec("normal", (num_envs, dim)),
        }
        if self.learned:
            return {
                "denoising": NoiseSpec("normal", (steps, num_envs, config.num_samples, config.horizon, dim)),
                "resample": NoiseSpec("uniform", (steps - 1, num_envs)),
                "choice": NoiseSpec("exponential", (num_envs, config.num_samples)),
                **shared,
            }
        fresh = config.num_samples - config.num_pi_trajs
        return {
            "proposal": NoiseSpec("normal", (config.horizon, num_envs, config.num_pi_trajs, dim)),
            "samples": NoiseSpec("normal", (steps, config.horizon, num_envs, fresh, dim)),
            **shared,
        }

    @torch.no_grad()
    def plan(self, model: Model, z: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """Refine a plan for every environment and choose the action to execute.

        Args:
            model: what to imagine with.
            z: [E, Z] current latents.
            state: warm start, one entry per environment.
            noise: tensors of :meth:`noise_specs`.
            explore: add exploration noise to the action.

        Raises:
            ConfigError: a learned prior is wanted, and the model has none, or one for other sequences.
        """
        actions, returns, weight, bad = self._denoise(model, z, noise) if self.learned else self._anneal(model, z, state, noise)
        mean = _weighted(weight, actions)  # [H, E, A]
        std = _weighted(weight, (actions - mean[:, :, None]).square()).sqrt()
        if not self.discrete:
            mean, std = mean.clamp(-1, 1), std.clamp(min=self.config.min_std)
        if self.learned:
            chosen = (weight / noise["choice"]).argmax(1, keepdim=True)  # Gumbel-max over log(weight), written without the log
            elite = actions[0].gather(1, chosen[:, :, None].expand(-1, -1, self.action_dim)).squeeze(1)
            value = returns.gather(1, chosen).squeeze(1)
        else:
            elite, value = one_hot_argmax(mean[0]) if self.discrete else mean[0], (weight * returns).sum(1)
        action = elite
        if explore and not self.discrete:
            action = (elite + self.config.min_std * noise["action"]).clamp(-1, 1)
        elif explore and not self.learned:
            action = one_hot_argmax(mean[0].log() + gumbel(noise["action"]))
        mean, std = mean.transpose(0, 1).contiguous(), std.transpose(0, 1).contiguous()
        return PlanResult(
            action=action,
            elite=elite,
            mean=mean,
            std=std,
            value=value,
            state=PlanState(torch.cat((mean[:, 1:], torch.full_like(mean[:, :1], self._rest)), 1), state.elites),
            metrics={"plan_std": std[:, 0].mean(), "plan_bad": bad},
        )

    @property
    def _rest(self) -> float:
        """What is known of an action that nobody has planned."""
        return 1 / self.action_dim if self.discrete else 0.0

    def _anneal(self, model: Model, z: Tensor, state: PlanState, noise: Noise) -> Particles:
        """Model-based diffusion: weighted means at falling deviations."""
        proposals = propose(model, z, noise["proposal"])
        centre, shares = state.mean.transpose(0, 1), []
        for step, sigma in enumerate(self.sigmas):
            fresh = centre[:, :, None] + sigma * noise["samples"][step]
            actions = torch.cat((proposals, one_hot_argmax(fresh) if self.discrete else fresh.clamp(-1, 1)), 2)  # [H, E, S, A]
            returns = self._returns(model, z, actions, noise, step)
            finite = returns.isfinite()
            logits = self.config.beta * standardise(returns, *moments(returns, finite.float()))
            weight = torch.softmax(torch.where(finite, logits, WORST), 1)
            actions = actions.nan_to_num(0.0, 0.0, 0.0)  # of a broken policy; they weigh nothing
            centre = _weighted(weight, actions)
            shares.append(1 - finite.float().mean())
        return Particles(actions, torch.where(finite, returns, WORST), weight, torch.stack(shares).mean())

    def _denoise(self, model: Model, z: Tensor, noise: Noise) -> Particles:
        """Reverse diffusion of the learned prior, twisted by returns."""
        prior, given = self._prior(model), z[:, None]
        x, inherited, spread = noise["denoising"][0], z.new_zeros(len(z), self.config.num_samples), z.new_zeros(())
        shares = []
        for index, (step, before) in enumerate(prior.grid(self.iterations)):
            clean = prior.denoise(x, given, step)  # [E, S, H, A]
            returns = self._returns(model, z, prior.decode(clean).movedim(2, 0), noise, index)
            clean = clean.nan_to_num(0.0, 0.0, 0.0)  # of a broken prior
            finite = returns.isfinite()
            shares.append(1 - finite.float().mean())
            mean, own = moments(returns, finite * torch.softmax(-inherited, 1))  # of the prior: the selection undone
            spread = torch.maximum(spread, own)
            shown = prior.alpha_bar[step] if before else 1.0  # the last prediction is the sample itself
            potential = torch.where(finite, self.config.beta * shown * standardise(returns, mean, spread), 0.0)
            weight = torch.softmax(torch.where(finite, potential - inherited, WORST), 1)
            if before:
                survivor = systematic(weight, noise["resample"][index])
                inherited = potential.gather(1, survivor)
                survivor = survivor[:, :, None, None].expand(x.shape)
                x, clean = x.gather(1, survivor), clean.gather(1, survivor)
                x = prior.reverse(x, clean, step, before, noise["denoising"][index + 1], self._guide(model, z, noise, index))
        actions = prior.decode(clean).movedim(2, 0)
        return Particles(actions, torch.where(finite, returns, WORST), weight, torch.stack(shares).mean())

    def _returns(self, model: Model, z: Tensor, actions: Tensor, noise: Noise, step: int, **how: bool) -> Tensor:
        """[E, Z], [H, E, S, A] -> [E, S], with the noise of one step."""
        starts = z[:, None].expand(-1, actions.shape[2], -1)
        return rollout_return(
            model,
            starts,
            actions,
            self.discount,
            noise["terminal"][step],
            noise["critics"][step],
            uncertainty_coef=self.config.uncertainty_coef,
            **how,
        )

    def _guide(self, model: Model, z: Tensor, noise: Noise, step: int) -> GuidanceFn | None:
        """Return what a denoising step climbs, if anything."""
        if not self.config.guidance or step >= self.iterations - UNGUIDED_STEPS:
            return None
        return lambda sequences: self.config.guidance * self._returns(model, z, sequences.movedim(2, 0), noise, step, differentiable=True)

    def _prior(self, model: Model) -> TrajectoryModel:
        prior = getattr(model, "trajectory", None)
        if prior is None:
            raise ConfigError("planner.prior: this model has no learned prior over action sequences; use planner.prior=none")
        wanted, found = (self.config.horizon, self.action_dim, self.discrete), (prior.horizon, prior.action_dim, prior.discrete)
        if wanted != found:
            raise ConfigError(
                f"planner.prior: the model's prior is over (horizon, action dimensions, discrete) {found}, the planner's sequences are "
                f"{wanted}; train a prior for these"
            )
        if self.iterations > prior.steps:
            raise ConfigError(f"planner.iterations: expected at most the {prior.steps} diffusion steps of the prior, got {self.iterations}")
        return prior


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """Weighted mean over candidates: [E, S], [H, E, S, A] -> [H, E, A]."""
    return (weight[None, :, :, None] * values).sum(2)
