"""Transitions of one or several steps, out of sampled windows."""

from __future__ import annotations

import torch

from worldmpc.types import SequenceBatch, TransitionBatch


def n_step_transitions(batch: SequenceBatch, discount: float) -> TransitionBatch:
    """Sum up each window as one transition of its real steps: [T, B, ...] -> [B, ...] (Sutton and Barto 2018, eq. 7.1).

    ``reward`` is the sum of ``discount ** t * reward[t]``, ``next_obs`` what followed the last real step, ``terminated`` how that one
    ended and ``discount`` is ``discount ** steps``: after a truncation there is a shorter sum, and still a value to add to it.
    """
    if len(batch.mask) == 1:  # every window of a replay has one real step at least
        reward, next_obs, terminated, remaining = batch.reward[0], batch.obs[1], batch.terminated[0], batch.mask[0] * discount
    else:
        weight = discount ** torch.arange(len(batch.mask), device=batch.mask.device, dtype=batch.mask.dtype)[:, None]
        steps = batch.mask.sum(0)
        reward = (weight * batch.mask * batch.reward).sum(0)
        next_obs = batch.obs[steps.long(), torch.arange(len(steps), device=steps.device)]
        terminated = (batch.mask * batch.terminated).amax(0)
        remaining = discount**steps
    return TransitionBatch(
        batch.obs[0],
        batch.action[0],
        reward,
        next_obs,
        terminated,
        remaining,
        {name: value[0] for name, value in batch.extras.items()},
    )


def first_steps(batch: SequenceBatch, steps: int) -> SequenceBatch:
    """Return the first steps of windows: [T, B, ...] -> [steps, B, ...], observations [steps + 1, B, *O]."""
    cut = {name: value[:steps] for name, value in batch._asdict().items() if name not in ("obs", "extras")}
    return SequenceBatch(batch.obs[: steps + 1], **cut, extras={name: value[:steps] for name, value in batch.extras.items()})


def first_windows(batch: SequenceBatch, windows: int) -> SequenceBatch:
    """Return the first windows of a batch, views of it: [T, B, ...] -> [T, windows, ...]."""
    cut = {name: value[:, :windows] for name, value in batch._asdict().items() if name != "extras"}
    return SequenceBatch(**cut, extras={name: value[:, :windows] for name, value in batch.extras.items()})
