"""Planners by name, and the one score function that all of them use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.types import Model, ModelStep, Planner


def following(model: Model, z: Tensor, action: Tensor) -> Tensor:
    """Next latent alone, of particles their mean: [..., Z], [..., A] -> [..., Z].

    A model that can leave out reward, continuation and particles offers ``next``.
    """
    dynamics, particles = getattr(model, "next", None), getattr(model, "num_particles", 1)
    if dynamics is not None:
        return dynamics(z, action)
    if particles == 1:
        return model.step(z, action).z
    return model.step(z.expand(particles, *z.shape), action.expand(particles, *action.shape)).z.mean(0)


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


def rollout_return(
    model: Model,
    z: Tensor,
    actions: Tensor,
    discount: float,
    eps: Tensor,
    critics: Tensor,
    differentiable: bool = False,
    uncertainty_coef: float = 0.0,
) -> Tensor:
    """Discounted return of imagined sequences with a value bootstrap (TD-MPC2 eq. 6).

    A model that can do all of it at once offers ``fast_returns`` itself, which returns None where it cannot.

    The reward of the step that reaches a terminal state still counts; everything behind it is weighted by the
    probability that the episode went on, and where that is 0 it does not matter what the model says there.

    Args:
        model: what to imagine with.
        z: [..., Z] start.
        actions: [H, ..., A].
        discount: per decision.
        eps: [..., A] policy noise of the bootstrap.
        critics: [2] indices of the critics that the bootstrap averages.
        differentiable: leave out ``fast_returns``, which may have no gradient.
        uncertainty_coef: subtract this times the standard deviation over the model's particles, such as the members of an ensemble.

    Returns:
        [...].
    """
    fast = None if differentiable else getattr(model, "fast_returns", None)
    if fast is not None and (values := fast(z, actions, discount, eps, critics)) is not None:
        return values
    particles = getattr(model, "num_particles", 1)
    if particles > 1:
        z, eps = z.expand(particles, *z.shape), eps.expand(particles, *eps.shape)
        actions = actions[:, None].expand(len(actions), particles, *actions.shape[1:])
    steps = rollout(model, z, actions)
    value, weight = torch.zeros_like(steps.reward[0]), torch.ones_like(steps.reward[0])
    for reward, cont in zip(steps.reward, steps.cont, strict=True):
        over = weight == 0  # where a model may say anything, NaN too
        value = value + weight * reward.masked_fill(over, 0.0)
        weight = torch.where(over, weight, weight * discount * cont)
    value = value + weight * model.terminal_value(steps.z[-1], eps, critics).masked_fill(weight == 0, 0.0)
    if particles > 1:
        aggregate = getattr(model, "aggregate", None)
        if aggregate is not None:
            return aggregate(value).to(actions.dtype)
        value = value.mean(0) - uncertainty_coef * value.std(0) if uncertainty_coef else value.mean(0)
    return value.to(actions.dtype)  # of a reward in float64, actions would become that


def propose(model: Model, z: Tensor, eps: Tensor, disturb: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
    """Sample sequences of the policy prior: [E, Z], [H, E, P, A] -> [H, E, P, A].

    A model that can do all of it at once offers ``fast_proposals`` itself, which returns None where it cannot.

    Args:
        model: what to imagine with.
        z: [E, Z] start.
        eps: [H, E, P, A] policy noise.
        disturb: changes the actions [E, P, A] of a step; the next ones are proposed at the state that the changed ones lead to.

    Returns:
        [H, E, P, A].
    """
    if eps.shape[2] == 0:
        return torch.zeros_like(eps)
    fast = getattr(model, "fast_proposals", None) if disturb is None else None
    if fast is not None and (actions := fast(z, eps)) is not None:
        return actions
    z = z[:, None].expand(-1, eps.shape[2], -1)
    sampled = []
    for index, step_eps in enumerate(eps):
        action = model.propose(z, step_eps)
        sampled.append(action if disturb is None else disturb(index, action))
        if index + 1 < len(eps):
            z = following(model, z, sampled[-1])
    return torch.stack(sampled)


def make_planner(config: PlannerConfig, action_dim: int, discount: float, num_q: int, discrete: bool = False) -> Planner:
    """Return the planner of ``config.name``.

    Args:
        config: which one, and its sizes.
        action_dim: action dimensions, or choices.
        discount: per decision.
        num_q: critics to draw the two of each bootstrap from.
        discrete: actions are one-hot.

    Raises:
        ConfigError: an unknown planner, or one that cannot be had with such actions or sizes.
    """
    from worldmpc.planners.diffusion import Diffusion
    from worldmpc.planners.mcts import MCTS
    from worldmpc.planners.rules import RULES
    from worldmpc.planners.sampling import SamplingPlanner

    kinds: dict[str, Callable[..., Planner]] = {**dict.fromkeys(RULES, SamplingPlanner), "diffusion": Diffusion, "mcts": MCTS}
    if config.name not in kinds:
        raise ConfigError(f"planner.name: unknown planner '{config.name}'; use one of {', '.join(kinds)}")
    if config.name == "mcts" and not discrete:
        raise ConfigError("planner.name: mcts needs a discrete action space; use planner=mppi, or another that samples sequences")
    if config.gradient_steps and discrete:
        raise ConfigError("planner.gradient_steps: there is no gradient for discrete actions; use gradient_steps=0")
    if config.gradient_steps and config.name == "diffusion":
        raise ConfigError("planner.gradient_steps: diffusion does not climb its result; use gradient_steps=0, or planner.guidance")
    return kinds[config.name](config, action_dim, discount, num_q, discrete)
