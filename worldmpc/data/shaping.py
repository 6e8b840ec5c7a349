"""What is made of replayed windows before anybody learns from them: rewards of won games, mirrored worlds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from worldmpc.types import Mirror, SequenceBatch

Transform = Callable[[SequenceBatch], SequenceBatch]
"""Makes windows of windows; the replay itself stays as it is."""


def shape_wins(batch: SequenceBatch, bonus: float, discount: float) -> SequenceBatch:
    """Add ``bonus * discount ** (left - 1)`` to rewards before the last step of won games, where ``left`` steps are behind them.

    Rewards are shaped from the stored winner, so that bonus and discount may change at any time. Games under way, lost or drawn, and the
    last step itself, keep their rewards.
    """
    if not bonus:
        return batch
    left = batch.extras["left"]
    won = (batch.extras["winner"] == 1) & (left >= 1) & (batch.mask > 0)
    return batch._replace(reward=batch.reward + torch.where(won, bonus * discount ** (left - 1), 0.0))


def reflect(batch: SequenceBatch, mirror: Mirror, flip: Tensor) -> SequenceBatch:
    """Return windows whose world is mirrored where ``flip`` [B] is True: observations, actions, and what plans and games left of them."""
    flip = flip.to(batch.reward.device)
    obs_signs = batch.obs.new_tensor(mirror.obs_signs)

    def seen(obs: Tensor) -> Tensor:
        return torch.where(flip[:, None], obs * obs_signs, obs)

    signs, order = batch.action.new_tensor(mirror.action_signs), list(mirror.action_order)

    def done(action: Tensor, signs: Tensor = signs) -> Tensor:
        return torch.where(flip[:, None], action[..., order] * signs, action)

    extras: Mapping[str, Tensor] = batch.extras
    changed = {name: done(extras[name]) for name in ("plan_mean", "plan_elite", "other_action") if name in extras}
    if "plan_std" in extras:  # a spread has no sign
        changed["plan_std"] = done(extras["plan_std"], signs.abs())
    if "other_obs" in extras:
        changed["other_obs"] = seen(extras["other_obs"])
    return batch._replace(obs=seen(batch.obs), action=done(batch.action), extras={**extras, **changed})
