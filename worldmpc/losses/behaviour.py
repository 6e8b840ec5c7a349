"""What a policy imitates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from worldmpc.types import TransitionBatch


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
