"""Pure maths of the objectives. Loss terms return [T, B], weighted over time; their mean is the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.types import LossTerm, Metrics, Noise, SequenceBatch, TransitionBatch


class Rollout(NamedTuple):
    """What the loss terms of a world model share for one batch."""

    zs: Tensor  # [T+1, B, Z] latents imagined from the first observation, with gradient
    next_z: Tensor  # [T, B, Z] encodings of the observations that followed, without gradient
    td_target: Tensor  # [T, B]
    time_weight: Tensor  # [T, B] rho**t where the step is real, else 0


def noise_specs(length: int, batch_size: int, action_dim: int, num_q: int, hidden_dim: int, dropout: float) -> dict[str, NoiseSpec]:
    """Declare the noise of one update on a batch of ``length`` steps."""
    specs = {
        "td_policy": NoiseSpec("normal", (length, batch_size, action_dim)),
        "td_critics": NoiseSpec("subset", (2,), num_q),
        "pi_policy": NoiseSpec("normal", (length + 1, batch_size, action_dim)),
        "pi_critics": NoiseSpec("subset", (2,), num_q),
    }
    if dropout:
        specs["q_keep"] = NoiseSpec("keep", (num_q, length, batch_size, hidden_dim), dropout)
        specs["pi_keep"] = NoiseSpec("keep", (2, length + 1, batch_size, hidden_dim), dropout)
    return specs


def time_weights(rho: float, mask: Tensor) -> Tensor:
    """rho**t where the step is real, else 0: mask [T, B] -> [T, B]."""
    return rho ** torch.arange(len(mask), device=mask.device, dtype=mask.dtype)[:, None] * mask


@torch.no_grad()
def td_target(model: WorldModel, next_z: Tensor, batch: SequenceBatch, discount: float, noise: Noise) -> Tensor:
    """r + discount (1 - terminated) min over two slow critics at a sampled action -> [T, B] (TD-MPC2 eq. 4, without entropy).

    One-hot actions are not sampled: the minimum is expected over all of them.
    """
    if model.discrete:
        value = model.expected(model.choice_values(next_z, noise["td_critics"], slow=True).amin(0), next_z)
    else:
        action = model.propose(next_z, noise["td_policy"])
        value = model.target_q_values(next_z, action, noise["td_critics"]).amin(0)
    return batch.reward + discount * (1 - batch.terminated) * value


def roll(model: WorldModel, batch: SequenceBatch, discount: float, rho: float, noise: Noise) -> Rollout:
    """Encode the targets, imagine the batch's actions from its first observation, and compute the TD targets."""
    with torch.no_grad():
        next_z = model.encode(batch.obs[1:])
    target = td_target(model, next_z, batch, discount, noise)
    zs = model.imagine(model.encode(batch.obs[0]), batch.action)
    return Rollout(zs, next_z, target, time_weights(rho, batch.mask))


def consistency(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Squared error between imagined and encoded latents, mean over the latent -> [T, B]."""
    return (rollout.zs[1:] - rollout.next_z).square().mean(-1) * rollout.time_weight, {}


def reward(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Two-hot cross-entropy of the reward on imagined latents -> [T, B]."""
    logits = model.reward(rollout.zs[:-1], batch.action)
    return model.two_hot.loss(logits, batch.reward) * rollout.time_weight, {}


def value(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Two-hot cross-entropy of all critics against the TD target, mean over critics -> [T, B]."""
    logits = model.q_logits(rollout.zs[:-1], batch.action, keep=noise.get("q_keep"))
    target = rollout.td_target
    bound = torch.expm1(target.new_tensor(model.two_hot.vmax))
    metrics = {"td_target": target.mean(), "td_target_saturated": (target.abs() > bound).to(target.dtype).mean()}
    return model.two_hot.loss(logits, target).mean(0) * rollout.time_weight, metrics


def termination(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Binary cross-entropy of termination on imagined latents, all steps weighted alike -> [T, B]."""
    logit = model.termination_logit(rollout.zs[1:])
    loss = F.binary_cross_entropy_with_logits(logit, batch.terminated, reduction="none") * batch.mask
    last = (batch.mask.sum(0, keepdim=True).long() - 1).clamp(min=0)  # the last real step of each window; T - 1 where nothing is padded
    rate, f1 = termination_statistics(logit.detach().gather(0, last)[0], batch.terminated.gather(0, last)[0])
    return loss, {"termination_rate": rate, "termination_f1": f1}


@torch.no_grad()
def termination_statistics(logit: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rate of terminations [] and the F1 score of their prediction [], for logits and targets [B]."""
    hit = (logit > 0).to(target.dtype)
    return target.mean(), 2 * (hit * target).sum() / (hit.sum() + target.sum()).clamp(min=1)


def weighted_sum(
    terms: Mapping[str, LossTerm], weights: Mapping[str, float], model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise
) -> tuple[Tensor, Metrics]:
    """Evaluate all terms and sum their means with their weights -> loss [], metrics ``<term>_loss`` and those of the terms.

    Raises:
        ValueError: a term without a weight, or a weight without a term.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"loss terms and weights differ: {sorted(terms.keys() ^ weights.keys())}")
    total = batch.reward.new_zeros(())
    metrics: Metrics = {}
    for name, term in terms.items():
        loss, extra = term(model, rollout, batch, noise)
        mean = loss.mean()
        total = total + weights[name] * mean
        metrics |= {f"{name}_loss": mean.detach(), **extra}
    return total, metrics | {"total_loss": total.detach()}


GREEDY = 1e-6
"""Least entropy coefficient of :func:`boltzmann_policy`, where next to nothing but the best choice is left."""


def max_q_policy(
    model: WorldModel, zs: Tensor, mask: Tensor, scale: Tensor, rho: float, entropy_coef: float, tau: float, noise: Noise
) -> tuple[Tensor, Metrics]:
    """Policy objective of TD-MPC2: maximise the mean of two critics plus entropy, on imagined latents.

    Args:
        model: its critics are read, and get no gradient.
        zs: [T+1, B, Z] without gradient.
        mask: [T+1, B] 1 where the latent stands for a real state.
        scale: [] running range of values, from before this update.
        rho: temporal decay.
        entropy_coef: weight of the scaled entropy.
        tau: rate of the running range.
        noise: ``pi_policy`` [T+1, B, A], ``pi_critics`` [2], and ``pi_keep`` where the critics use dropout.

    Returns:
        Loss []; metrics, among them the new ``pi_scale`` [].
    """
    sample = model.policy(zs, noise["pi_policy"])
    values = model.q_values(zs, sample.action, noise["pi_critics"], noise.get("pi_keep"), frozen=True).mean(0)
    scale = update_scale(scale, values[0].detach(), tau)
    loss = -(entropy_coef * sample.scaled_entropy + values / scale) * time_weights(rho, mask)
    metrics = {
        "pi_entropy": sample.entropy.detach().mean(),
        "pi_scaled_entropy": sample.scaled_entropy.detach().mean(),
        "pi_scale": scale,
        "pi_std": sample.log_std.detach().exp().mean(),
    }
    return loss.mean(), metrics


def boltzmann_policy(
    model: WorldModel, zs: Tensor, mask: Tensor, scale: Tensor, rho: float, entropy_coef: float, tau: float, noise: Noise
) -> tuple[Tensor, Metrics]:
    """Policy objective for one-hot actions: cross-entropy to the distribution that :func:`max_q_policy`'s objective is largest at.

    E[Q] / scale + entropy_coef * entropy is largest for p = softmax(Q / (scale * entropy_coef)) (Boltzmann), so the loss is -E_p[log pi].
    Climbing the objective itself stalls: its gradient vanishes with the probability of a choice, and a policy that is sure of a choice
    does not change its mind. Arguments and result are those of :func:`max_q_policy`.
    """
    log_probs = torch.log_softmax(model.pi(zs), -1)  # [T+1, B, A]
    with torch.no_grad():
        values = model.choice_values(zs, noise["pi_critics"]).mean(0)  # [T+1, B, A]
        expected = model.expected(values, zs)
        scale = update_scale(scale, expected[0], tau)
        best = torch.softmax(values / (scale * max(entropy_coef, GREEDY)), -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    loss = -(best * log_probs).sum(-1) * time_weights(rho, mask)
    return loss.mean(), {"pi_entropy": entropy.mean(), "pi_scale": scale}


def update_scale(scale: Tensor, values: Tensor, tau: float) -> Tensor:
    """Move a running 5th-to-95th percentile range, at least 1, towards that of ``values`` [B]: [] -> []."""
    ordered = values.sort().values
    low, high = (_between(ordered, fraction * (len(values) - 1)) for fraction in (0.05, 0.95))
    return torch.lerp(scale, (high - low).clamp(min=1.0), tau)


def _between(ordered: Tensor, place: float) -> Tensor:
    """Value at a fractional index, linear in between (what torch.quantile does, and torch.vmap can)."""
    lower = int(place)
    return torch.lerp(ordered[lower], ordered[min(lower + 1, len(ordered) - 1)], place - lower)


def behaviour_targets(batch: TransitionBatch, advantage: Tensor, kind: Literal["bc", "awr"], temperature: float) -> tuple[Tensor, Tensor]:
    """Return what a policy should imitate: actions [B, A] and their weights [B].

    ``bc``: the mean of the plan (of one-hot actions its probabilities), where there was a plan. ``awr``: the action that was taken,
    weighted by exp(standardised advantage / temperature), at most 20 (Peng et al. 2019, eq. 8 and section 4).
    """
    if kind == "awr":
        standard = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        return batch.action, (standard / temperature).exp().clamp(max=20.0)
    if "plan_mean" not in batch.extras:
        return batch.action, torch.ones_like(batch.reward)
    mean = batch.extras["plan_mean"]
    planned = mean.isfinite().all(-1, keepdim=True)  # random decisions of the seed phase have no plan, which the replay marks by NaN
    return torch.where(planned, mean, batch.action), planned.squeeze(-1).to(batch.reward.dtype)


def behaviour_loss(log_prob: Tensor, weight: Tensor) -> Tensor:
    """Return the negative log-likelihood of actions, weighted: [B], [B] -> []."""
    return -(weight * log_prob).sum() / weight.sum().clamp(min=1.0)
