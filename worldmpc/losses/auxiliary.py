"""Auxiliary values at several discounts: signals that shape latents and dynamics, and decide nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.losses.world_model import Rollout
from worldmpc.models.world_model import WorldModel
from worldmpc.types import Metrics, Noise, SequenceBatch


class AuxiliaryTargets(NamedTuple):
    """What the auxiliary heads learn, without gradient."""

    target: Tensor  # [T, B, G]
    bootstrap: Tensor  # [T, B, G] values of the next latents in them


@torch.no_grad()
def auxiliary_targets(model: WorldModel, rollout: Rollout, batch: SequenceBatch) -> AuxiliaryTargets:
    """r + gamma (1 - terminated) V of the next latent for every discount, with V by the slow heads or by the slow critics.

    With the critics' values, targets of different discounts differ by (gamma - gamma') V alone: they are no values at these discounts.
    """
    auxiliary = model.auxiliary
    assert auxiliary is not None
    if auxiliary.slow is None:
        assert rollout.bootstrap is not None
        bootstrap = rollout.bootstrap[..., None].expand(*rollout.bootstrap.shape, len(auxiliary.gammas))
    else:
        bootstrap = model.two_hot.decode(auxiliary.slow(rollout.next_z))
    goes_on = (1 - batch.terminated)[..., None]
    return AuxiliaryTargets(batch.reward[..., None] + auxiliary.discounts * goes_on * bootstrap, bootstrap)


def auxiliary_value(model: WorldModel, rollout: Rollout, batch: SequenceBatch, noise: Noise) -> tuple[Tensor, Metrics]:
    """Two-hot cross-entropy of every auxiliary head on imagined latents, sum over heads -> [T, B].

    Metrics are the mean cross-entropy of each head, and statistics of values and targets at the first step of each window, which is
    always real, and whose latent is encoded.
    """
    auxiliary = model.auxiliary
    assert auxiliary is not None
    logits = auxiliary.heads(rollout.zs[:-1])  # [T, B, G, K]
    target = auxiliary_targets(model, rollout, batch).target
    loss = model.two_hot.loss(logits, target) * rollout.time_weight[..., None]
    values, means = model.two_hot.decode(logits[0].detach()), loss.detach().mean((0, 1))
    of_heads = {
        "aux_value_ce/": means,
        "aux_value/mean_": values.mean(0),
        "aux_value/std_": values.std(0, correction=0),
        "aux_value/target_mean_": target[0].mean(0),
    }
    names = [f"g{gamma:g}" for gamma in auxiliary.gammas]
    metrics = {prefix + name: own for prefix, found in of_heads.items() for name, own in zip(names, found.unbind(), strict=True)}
    return loss.sum(-1), {"aux_value_ce/mean": means.mean(), **metrics}


@torch.no_grad()
def auxiliary_snapshot(model: WorldModel, rollout: Rollout, batch: SequenceBatch, examples: int, details: bool) -> dict[str, Tensor]:
    """Return what the heads say about the first windows of a batch, and what they should, for looking at.

    Args:
        model: with auxiliary values.
        rollout: of the batch.
        batch: windows.
        examples: most windows, N.
        details: all T steps instead of the first, and whole distributions.

    Returns:
        name -> [T or 1, N, G, ...]: ``target``, ``prediction``, ``error`` (absolute), ``bootstrap``, ``lower_bin`` and ``upper_weight`` of
        the two-hot target, the two most likely ``top_bins`` and their ``top_probs``; with details ``cross_entropy`` and ``probs`` as well.
        And ``mask`` [T or 1, N].
    """
    auxiliary, found = model.auxiliary, auxiliary_targets(model, rollout, batch)
    assert auxiliary is not None
    steps = len(batch.reward) if details else 1
    logits = auxiliary.heads(rollout.zs[:steps, :examples])
    target, bootstrap = found.target[:steps, :examples], found.bootstrap[:steps, :examples]
    prediction, probs = model.two_hot.decode(logits), logits.softmax(-1)
    lower, weight = model.two_hot.position(target)
    top = probs.topk(2, -1)
    snapshot = {
        "target": target,
        "prediction": prediction,
        "error": (prediction - target).abs(),
        "bootstrap": bootstrap,
        "lower_bin": lower,
        "upper_weight": weight,
        "top_bins": top.indices,
        "top_probs": top.values,
        "mask": batch.mask[:steps, :examples],
    }
    return snapshot | ({"cross_entropy": model.two_hot.loss(logits, target), "probs": probs} if details else {})
