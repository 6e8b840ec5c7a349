"""Objectives of TD-MPC2's policy prior: values, the planner's distribution, or both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.config import ConfigError, LossConfig, PlannerConfig, PolicyConfig
from worldmpc.losses.world_model import time_weights
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.types import Metrics, Noise, PolicySample, SequenceBatch

GREEDY = 1e-6
"""Least entropy coefficient of Boltzmann distributions, where next to nothing but the best choice is left."""
LEAST_LOG_PROB = -50_000.0
"""Bound of the planner's log-density in ``bc`` (published)."""
LEAST_PROBABILITY = 1e-3
"""Bound of a plan's probabilities of one-hot actions, whose logarithms are taken."""
AWAC_WEIGHTS = (0.1, 10.0)
"""Bounds of the weights of ``awac`` (published)."""


class Coefficients(NamedTuple):
    """Numbers of an objective."""

    rho: float
    """Temporal decay."""
    entropy: float
    tau: float
    """Rate of the running scale."""
    prior: float = 0.0
    """Weight of the planner's part beside max_q."""
    threshold: float = 0.0
    """Running scale from which on there is that part."""
    min_std: float = 0.05
    """Least standard deviation of the planner's distribution."""
    awac_temperature: float = 1.0


class PlanTarget(NamedTuple):
    """What the planner left at each step."""

    mean: Tensor  # [T, B, A] first action of the chosen sequence; of one-hot actions the plan's probabilities
    std: Tensor  # [T, B, A]
    known: Tensor  # [T, B] 1 where the step is real and has a plan, else 0


PolicyObjective = Callable[[WorldModel, Tensor, SequenceBatch, Tensor, Coefficients, Noise], tuple[Tensor, Metrics]]
"""``(model, zs [T+1, B, Z] without gradient, batch, scale [], coefficients, noise) -> loss [], metrics``, among them the new ``pi_scale``.

``scale`` is the running 5th-to-95th percentile range, from before this update, of what the objective is divided by: values, or for
``kl_to_planner`` divergences. The model is read; gradients reach the policy alone.
"""


def make_objective(config: PolicyConfig, discrete: bool, clipped: bool) -> PolicyObjective:
    """Return the objective of a configuration, for Box (with a ``clipped`` Gaussian policy or a squashed one) or Discrete actions.

    Raises:
        ConfigError: an objective that is not defined for such a policy.
    """
    if config.objective == "kl_to_planner" and not discrete and not clipped:
        raise ConfigError(
            "model.policy: the divergence of policy.objective=kl_to_planner has a closed form between Gaussians, and a squashed one is "
            "none; use model.policy=clipped"
        )
    table = DISCRETE if discrete else BOX
    if config.objective not in table:
        raise ConfigError(
            f"policy.objective: {config.objective} is defined by distances or densities of Box actions, this task has Discrete ones; use "
            f"one of {', '.join(table)}"
        )
    return table[config.objective]


def coefficients(config: PolicyConfig, loss: LossConfig, planner: PlannerConfig, action_dim: int) -> Coefficients:
    """Return an objective's numbers; where ``prior_coef`` is left open, the published ones."""
    published = {"max_q+planner_prior": action_dim / 61, "max_q+weighted_prior": action_dim / 50, "max_q+bc": 1.0}
    prior = published.get(config.objective, 0.0) if config.prior_coef is None else config.prior_coef
    return Coefficients(loss.rho, loss.entropy_coef, loss.tau, prior, config.scale_threshold, planner.min_std, config.awac_temperature)


def policy_noise(config: PolicyConfig, model: WorldModel, length: int, batch_size: int, dropout: float) -> dict[str, NoiseSpec]:
    """Declare the noise that an objective reads, on latents of ``length`` steps; values of one-hot actions are not sampled."""
    latents = length + 1 if config.objective == "max_q" else length
    valued = config.objective not in (("kl_to_planner", "bc") if model.discrete else ("kl_to_planner",))
    specs = {} if model.discrete else {"pi_policy": NoiseSpec("normal", (latents, batch_size, model.action_dim))}
    if valued:
        specs["pi_critics"] = NoiseSpec("subset", (2,), model.num_q)
    if valued and dropout and not model.discrete and not model.state_values:
        specs["pi_keep"] = NoiseSpec("keep", (2, latents, batch_size, model.hidden_dim), dropout)
    return specs


def max_q(model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise) -> tuple[Tensor, Metrics]:
    """TD-MPC2: maximise the mean of two critics plus entropy, on all latents."""
    sample, values, scale = _values(model, zs, scale, coefs, noise)
    loss = -(coefs.entropy * sample.scaled_entropy + values / scale) * time_weights(coefs.rho, _of_latents(batch.mask))
    return loss.mean(), _metrics(sample, scale)


def max_q_and_planner_prior(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """TD-M(PC)^2: max_q, and the planner's log-density at the policy's action, once values have grown (Lin et al. 2025)."""
    sample, values, scale = _values(model, zs[:-1], scale, coefs, noise)
    plan, weight = plan_target(batch, model.discrete), time_weights(coefs.rho, batch.mask)
    log_prior = _log_prior(sample.action, plan.mean, plan.std.clamp(min=coefs.min_std)) * plan.known
    prior = (log_prior / scale * _begun(scale, coefs)) * weight
    loss = -(coefs.entropy * sample.scaled_entropy + values / scale) * weight - coefs.prior * prior
    return loss.mean(), _metrics(sample, scale) | {"pi_prior_loss": -prior.detach().mean()}


def max_q_and_weighted_prior(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """BOOM: max_q by the lesser of two critics, and the likelihood of the planner's actions under a Gaussian of the policy's own width.

    Each action of a time step weighs softmax(value / scale) over the batch, so that good ones count more.
    """
    sample, values, scale = _values(model, zs[:-1], scale, coefs, noise, reduce="min")
    plan, weight = plan_target(batch, model.discrete), time_weights(coefs.rho, batch.mask)
    std = sample.log_std.detach().exp().clamp(min=coefs.min_std)
    share = torch.softmax((values.detach() / scale).masked_fill(plan.known == 0, -torch.inf), -1).nan_to_num(0.0)  # 0 without any plan
    log_prior = _log_prior(sample.action, plan.mean, std) * plan.known
    prior = share * len(share[0]) * log_prior / scale * _begun(scale, coefs) * weight
    loss = -(coefs.entropy * sample.scaled_entropy + values / scale) * weight - coefs.prior * prior
    return loss.mean(), _metrics(sample, scale) | {"pi_prior_loss": -prior.detach().mean()}


def max_q_and_bc(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """TD-M(PC)^2's BC-SAC form: max_q, and the squared distance to the action that was taken."""
    sample, values, scale = _values(model, zs[:-1], scale, coefs, noise)
    weight = time_weights(coefs.rho, batch.mask)
    distance = (sample.action - batch.action).square().sum(-1) * weight
    loss = -(coefs.entropy * sample.scaled_entropy + values / scale) * weight + coefs.prior * distance
    return loss.mean(), _metrics(sample, scale) | {"pi_prior_loss": distance.detach().mean()}


def planner_bc(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """TD-M(PC)^2's BC form: the planner's log-density at the policy's action alone, divided by the scale of values."""
    sample = model.policy(zs[:-1], noise["pi_policy"])
    with torch.no_grad():
        _, scale = _valued(model, zs[:-1], sample, scale, coefs, noise)
    plan, weight = plan_target(batch, model.discrete), time_weights(coefs.rho, batch.mask)
    log_prior = _log_prior(sample.action, plan.mean, plan.std.clamp(min=coefs.min_std)).clamp(LEAST_LOG_PROB, 0.0)
    loss = -log_prior / scale * plan.known * weight
    return loss.mean(), _metrics(sample, scale)


def awac(model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise) -> tuple[Tensor, Metrics]:
    """Likelihood of the action that was taken, weighted by exp(advantage / temperature), clipped (Nair et al. 2020)."""
    with torch.no_grad():
        sample, values, scale = _values(model, zs[:-1], scale, coefs, noise)
        taken = model.q_values(zs[:-1], batch.action, noise["pi_critics"], noise.get("pi_keep")).mean(0)  # with the same dropout
        share = torch.exp((taken - values) / scale / coefs.awac_temperature).clamp(*AWAC_WEIGHTS)
    loss = -share * model.policy_log_prob(zs[:-1], batch.action) * time_weights(coefs.rho, batch.mask)
    return loss.mean(), _metrics(sample, scale) | {"pi_awac_weight": share.mean()}


def kl_to_planner(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """BMPC: divergence KL(policy || planner) of Gaussians, mean over actions and divided by its running range, minus entropy.

    Where a step has no plan the policy is pulled towards the standard normal distribution (published).
    """
    sample = model.policy(zs[:-1], noise["pi_policy"])
    plan, weight = plan_target(batch, model.discrete), time_weights(coefs.rho, batch.mask)
    divergence = gaussian_kl(sample.mean, sample.log_std.exp(), plan.mean, plan.std).mean(-1)
    scale = update_scale(scale, divergence[0].detach(), coefs.tau)
    loss = (divergence / scale - coefs.entropy * sample.scaled_entropy) * weight
    return loss.mean(), _metrics(sample, scale) | {"pi_kl": divergence.detach().mean()}


def boltzmann(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """max_q for one-hot actions: cross-entropy to the distribution that :func:`max_q`'s objective is largest at.

    E[Q] / scale + entropy coefficient * entropy is largest for p = softmax(Q / (scale * coefficient)) (Boltzmann), so the loss is
    -E_p[log pi]. Climbing the objective itself stalls: its gradient vanishes with the probability of a choice, and a policy that is sure
    of a choice does not change its mind.
    """
    return _boltzmann(model, zs, _of_latents(batch.mask), scale, coefs, noise, None)


def boltzmann_and_planner_prior(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """TD-M(PC)^2 for one-hot actions: :func:`boltzmann` with the planner's log-probabilities added to the values."""
    plan = plan_target(batch, model.discrete)
    log_prior = plan.mean.log() * plan.known[..., None]
    return _boltzmann(model, zs[:-1], batch.mask, scale, coefs, noise, log_prior)


def categorical_kl(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """BMPC for one-hot actions: KL(policy || plan's probabilities), divided by its running range, minus entropy.

    Where a step has no plan the policy is pulled towards the uniform distribution.
    """
    log_probs, plan = torch.log_softmax(model.pi(zs[:-1]), -1), plan_target(batch, model.discrete)
    probs = log_probs.exp()
    divergence, entropy = (probs * (log_probs - plan.mean.log())).sum(-1), -(probs * log_probs).sum(-1)
    scale = update_scale(scale, divergence[0].detach(), coefs.tau)
    loss = (divergence / scale - coefs.entropy * entropy) * time_weights(coefs.rho, batch.mask)
    return loss.mean(), {"pi_entropy": entropy.detach().mean(), "pi_scale": scale, "pi_kl": divergence.detach().mean()}


def categorical_bc(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """Cross-entropy to the plan's probabilities of one-hot actions; the running scale stays."""
    log_probs, plan = torch.log_softmax(model.pi(zs[:-1]), -1), plan_target(batch, model.discrete)
    loss = -(plan.mean * log_probs).sum(-1) * plan.known * time_weights(coefs.rho, batch.mask)
    return loss.mean(), {"pi_entropy": _entropy(log_probs), "pi_scale": scale}


def categorical_awac(
    model: WorldModel, zs: Tensor, batch: SequenceBatch, scale: Tensor, coefs: Coefficients, noise: Noise
) -> tuple[Tensor, Metrics]:
    """:func:`awac` for one-hot actions; values of the policy are expectations."""
    log_probs = torch.log_softmax(model.pi(zs[:-1]), -1)
    with torch.no_grad():
        values = model.choice_values(zs[:-1], noise["pi_critics"]).mean(0)  # [T, B, A]
        expected = (log_probs.exp() * values).sum(-1)
        scale = update_scale(scale, expected[0], coefs.tau)
        advantage = (values * batch.action).sum(-1) - expected
        share = torch.exp(advantage / scale / coefs.awac_temperature).clamp(*AWAC_WEIGHTS)
    loss = -share * (log_probs * batch.action).sum(-1) * time_weights(coefs.rho, batch.mask)
    return loss.mean(), {"pi_entropy": _entropy(log_probs), "pi_scale": scale, "pi_awac_weight": share.mean()}


BOX: dict[str, PolicyObjective] = {
    "max_q": max_q,
    "kl_to_planner": kl_to_planner,
    "max_q+planner_prior": max_q_and_planner_prior,
    "max_q+weighted_prior": max_q_and_weighted_prior,
    "max_q+bc": max_q_and_bc,
    "bc": planner_bc,
    "awac": awac,
}
DISCRETE: dict[str, PolicyObjective] = {
    "max_q": boltzmann,
    "kl_to_planner": categorical_kl,
    "max_q+planner_prior": boltzmann_and_planner_prior,
    "bc": categorical_bc,
    "awac": categorical_awac,
}


def plan_target(batch: SequenceBatch, discrete: bool) -> PlanTarget:
    """Return the plans of a batch; where there is none (random decisions, padding) a standard normal or uniform distribution."""
    mean = batch.extras["plan_mean" if discrete else "plan_elite"]
    std = batch.extras["plan_std"]
    known = mean.isfinite().all(-1) & std.isfinite().all(-1) & (batch.mask > 0)
    rest = 1 / mean.shape[-1] if discrete else 0.0
    mean, std = torch.where(known[..., None], mean, rest), torch.where(known[..., None], std, 1.0)
    if discrete:
        mean = mean.clamp(min=LEAST_PROBABILITY)
        mean = mean / mean.sum(-1, keepdim=True)
    return PlanTarget(mean, std, known.to(batch.mask.dtype))


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """Divergence KL(N(mean, std) || N(other)) of each dimension, in nats: [..., A] -> [..., A]."""
    ratio = (std / other_std).square()
    return 0.5 * (ratio + ((mean - other_mean) / other_std).square() - 1 - ratio.log())


def update_scale(scale: Tensor, values: Tensor, tau: float, least: float = 1.0) -> Tensor:
    """Move a running 5th-to-95th percentile range towards that of ``values`` [B], or ``least`` where that is more: [] -> []."""
    ordered = values.sort().values
    low, high = (_between(ordered, fraction * (len(values) - 1)) for fraction in (0.05, 0.95))
    return torch.lerp(scale, (high - low).clamp(min=least), tau)


def _between(ordered: Tensor, place: float) -> Tensor:
    """Value at a fractional index, linear in between (what torch.quantile does, and torch.vmap can)."""
    lower = int(place)
    return torch.lerp(ordered[lower], ordered[min(lower + 1, len(ordered) - 1)], place - lower)


def _of_latents(mask: Tensor) -> Tensor:
    """Mask of latents for a mask of steps: [T, B] -> [T+1, B]."""
    return torch.cat((torch.ones_like(mask[:1]), mask))


def _values(
    model: WorldModel, zs: Tensor, scale: Tensor, coefs: Coefficients, noise: Noise, reduce: str = "mean"
) -> tuple[PolicySample, Tensor, Tensor]:
    """Sample actions, and return them with the mean or minimum of two critics there [T, B], and their new running range []."""
    sample = model.policy(zs, noise["pi_policy"])
    return sample, *_valued(model, zs, sample, scale, coefs, noise, reduce)


def _valued(
    model: WorldModel, zs: Tensor, sample: PolicySample, scale: Tensor, coefs: Coefficients, noise: Noise, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Return the values of sampled actions, or of states, and their new running range."""
    if model.state_values:
        found = model.v_values(zs, noise["pi_critics"])
    else:
        found = model.q_values(zs, sample.action, noise["pi_critics"], noise.get("pi_keep"), frozen=True)
    values = found.amin(0) if reduce == "min" else found.mean(0)
    return values, update_scale(scale, values[0].detach(), coefs.tau)


def _log_prior(action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of actions under a Gaussian, times their number as published: [..., A] -> [...].

    The code of TD-M(PC)^2 and BOOM takes it from TD-MPC2's, whose log-densities are multiplied by the number of dimensions.
    """
    residual = -0.5 * ((action - mean) / std).square() - std.log()
    return (residual.sum(-1) - 0.5 * math.log(2 * math.pi)) * action.shape[-1]


def _begun(scale: Tensor, coefs: Coefficients) -> Tensor:
    """1 once the running scale exceeds the threshold, else 0: [] -> []."""
    return (scale > coefs.threshold).to(scale.dtype)


def _boltzmann(
    model: WorldModel, zs: Tensor, mask: Tensor, scale: Tensor, coefs: Coefficients, noise: Noise, log_prior: Tensor | None
) -> tuple[Tensor, Metrics]:
    log_probs = torch.log_softmax(model.pi(zs), -1)  # [T, B, A]
    with torch.no_grad():
        values = model.choice_values(zs, noise["pi_critics"]).mean(0)  # [T, B, A]
        scale = update_scale(scale, model.expected(values, zs)[0], coefs.tau)
        if log_prior is not None:
            values = values + coefs.prior * log_prior * _begun(scale, coefs)
        best = torch.softmax(values / (scale * max(coefs.entropy, GREEDY)), -1)
    loss = -(best * log_probs).sum(-1) * time_weights(coefs.rho, mask)
    return loss.mean(), {"pi_entropy": _entropy(log_probs), "pi_scale": scale}


def _entropy(log_probs: Tensor) -> Tensor:
    """Mean entropy in nats: [..., A] -> []."""
    return -(log_probs.exp() * log_probs).sum(-1).detach().mean()


def _metrics(sample: PolicySample, scale: Tensor) -> Metrics:
    return {
        "pi_entropy": sample.entropy.detach().mean(),
        "pi_scaled_entropy": sample.scaled_entropy.detach().mean(),
        "pi_scale": scale,
        "pi_std": sample.log_std.detach().exp().mean(),
    }
