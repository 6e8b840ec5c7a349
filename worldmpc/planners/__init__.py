"""Planners, and the one score function that all of them use."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmpc.types import Model, ModelStep


def following(model: Model, z: Tensor, action: Tensor) -> Tensor:
    """Next latent alone: [..., Z], [..., A] -> [..., Z]; a model that can leave out reward and continuation offers ``next``."""
    dynamics = getattr(model, "next", None)
    return model.step(z, action).z if dynamics is None else dynamics(z, action)


def rollout(model: Model, z: Tensor, actions: Tensor) -> ModelStep:
    """Imagine sequences: [..., Z], [H, ..., A] -> z [H+1, ..., Z], reward [H, ...], cont [H, ...].

    A model that evaluates whole sequences faster than step by step offers ``rollout`` itself.
    """
    whole = getattr(model, "rollout", None)
    if whole is not None:
        return whole(z, actions)
    steps = []
    zs = [z]
    for action in actions:
        steps.append(model.step(zs[-1], action))
        zs.append(steps[-1].z)
    return ModelStep(torch.stack(zs), torch.stack([step.reward for step in steps]), torch.stack([step.cont for step in steps]))


def rollout_return(model: Model, z: Tensor, actions: Tensor, discount: float, eps: Tensor, critics: Tensor) -> Tensor:
    """Discounted return of imagined sequences with a value bootstrap (TD-MPC2 eq. 6).

    A model that can do all of it at once offers ``fast_returns`` itself, which returns None where it cannot.

    The reward of the step that reaches a terminal state still counts; everything behind it is weighted by the
    probability that the episode went on.

    Args:
        model: what to imagine with.
        z: [..., Z] start.
        actions: [H, ..., A].
        discount: per decision.
        eps: [..., A] policy noise of the bootstrap.
        critics: [2] indices of the critics that the bootstrap averages.

    Returns:
        [...].
    """
    fast = getattr(model, "fast_returns", None)
    if fast is not None and (values := fast(z, actions, discount, eps, critics)) is not None:
        return values
    steps = rollout(model, z, actions)
    value, weight = torch.zeros_like(steps.reward[0]), torch.ones_like(steps.reward[0])
    for reward, cont in zip(steps.reward, steps.cont, strict=True):
        value = value + weight * reward
        weight = weight * discount * cont
    return value + weight * model.terminal_value(steps.z[-1], eps, critics)


def propose(model: Model, z: Tensor, eps: Tensor) -> Tensor:
    """Sample sequences of the policy prior: [E, Z], [H, E, P, A] -> [H, E, P, A].

    A model that can do all of it at once offers ``fast_proposals`` itself, which returns None where it cannot.
    """
    if eps.shape[2] == 0:
        return torch.zeros_like(eps)
    fast = getattr(model, "fast_proposals", None)
    if fast is not None and (actions := fast(z, eps)) is not None:
        return actions
    z = z[:, None].expand(-1, eps.shape[2], -1)
    sampled = []
    for index, step_eps in enumerate(eps):
        sampled.append(model.propose(z, step_eps))
        if index + 1 < len(eps):
            z = following(model, z, sampled[-1])
    return torch.stack(sampled)
