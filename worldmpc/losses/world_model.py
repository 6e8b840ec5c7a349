"""Objectives of the world model. Loss terms return [T, B], weighted over time; their mean is the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmpc.config import ValueConfig
from worldmpc.functional import tree_map
from worldmpc.losses.targets import value_targets
from worldmpc.models.world_model import WorldModel
from worldmpc.types import LossTerm, Metrics, Noise, SequenceBatch


class Rollout(NamedTuple):
    """What the loss terms of a world model share for one batch."""

    zs: Tensor  # [T+1, B, Z] latents imagined from the first observation, with gradient
    next_z: Tensor  # [T, B, Z] encodings of the observations that followed, without gradient
    td_target: Tensor  # [T, B]
    time_weight: Tensor  # [T, B] rho**t where the step is real, else 0
    bootstrap: Tensor | None = None  # [T, B] values of next_z by the slow critics, where the targets are made of them


def time_weights(rho: float, mask: Tensor) -> Tensor:
    """rho**t where the step is real, else 0: mask [T, B] -> [T, B]."""
    return rho ** torch.arange(len(mask), device=mask.device, dtype=mask.dtype)[:, None] * mask


def roll(model: WorldModel, batch: SequenceBatch, discount: float, rho: float, noise: Noise, value: ValueConfig | None = None) -> Rollout:
    """Encode the targets, imagine the batch's actions from its first observation, and compute the critics' targets.

    Args:
        model: of a world; of several dynamics each imagines an equal part of the batch, see :func:`for_each_dynamics`.
        batch: windows.
        discount: per decision.
        rho: temporal decay.
        noise: of the update.
        value: which targets; None: the published ones.
    """
    with torch.no_grad():
        next_z = model.encode(batch.obs[1:])
    first = model.encode(batch.obs[0])
    value = value or ValueConfig()
    z = torch.cat((first.detach()[None], next_z[:-1])) if value.target == "model" else None
    target, bootstrap = value_targets(value, model, z, next_z, batch, discount, noise)
    return Rollout(model.imagine(first, model.acted(batch)), next_z, target, time_weights(rho, batch.mask), bootstrap)


def for_each_dynamics(batch: SequenceBatch, count: int) -> SequenceBatch:
    """Repeat a batch for each of several dynamics networks: [T, B, ...] -> [T, count * B, ...]."""
    return batch if count == 1 else tree_map(lambda part: torch.cat([part] * count, 1), batch)


def consistency(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Squared error between imagined and encoded latents, mean over the latent -> [T, B]."""
    return (rollout.zs[1:] - rollout.next_z).square().mean(-1) * rollout.time_weight, {}


def reward(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Two-hot cross-entropy of the reward on imagined latents -> [T, B]."""
    logits = model.reward(rollout.zs[:-1], model.acted(batch))
    return model.two_hot.loss(logits, batch.reward) * rollout.time_weight, {}


def value(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Two-hot cross-entropy of all critics against their target, mean over critics -> [T, B]."""
    keep = noise.get("q_keep")
    logits = model.v_logits(rollout.zs[:-1], keep=keep) if model.state_values else model.q_logits(rollout.zs[:-1], batch.action, keep=keep)
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
        ValueError: a term without a weight, a weight without a term, a term that is not [T, B], or a metric of a name that is taken.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"loss terms and weights differ: {sorted(terms.keys() ^ weights.keys())}")
    total = batch.reward.new_zeros(())
    metrics: Metrics = {}
    for name, term in terms.items():
        loss, extra = term(model, rollout, batch, noise)
        if loss.shape != batch.reward.shape:
            shapes = f"{list(batch.reward.shape)}, a number for each step, got {list(loss.shape)}"
            raise ValueError(f"loss term '{name}': expected {shapes}; the mean is taken later, and rollout.time_weight leaves padding out")
        mean = loss.mean()
        total = total + weights[name] * mean
        found = {f"{name}_loss": mean.detach(), **extra}
        if taken := sorted(metrics.keys() & found.keys()) or sorted(extra.keys() & {f"{name}_loss", "total_loss"}):
            raise ValueError(f"loss term '{name}': metrics of the names {', '.join(taken)} are there already; use others")
        metrics |= found
    return total, metrics | {"total_loss": total.detach()}
