"""Pure maths of learning from a policy's own rollouts: advantages, the objective of PPO, and what others add to it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.types import Metrics, RolloutBatch

CustomLoss = Callable[..., Tensor]
"""Called with the keywords ``policy``, ``obs`` [B, *O], ``actions`` [B, A], ``rewards``, ``values`` (when the actions were taken) and
``advantages`` (not standardised) [B]; returns a scalar that is added to the loss. What it needs the gradient of, it asks the policy."""


class LossError(ConfigError):
    """A loss that cannot be used; its update was not applied."""


def gae(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, discount: float, lam: float) -> Tensor:
    """Generalised advantage estimate (Schulman et al. 2016, eq. 16) of a rollout that may hold parts of several episodes.

    Only a termination cuts the bootstrap: after a truncation, and after the last step, there would have been more reward. Every end
    of an episode cuts the sum over later steps.

    Args:
        reward: [T, E].
        value: [T, E] of the observation that was acted on.
        next_value: [T, E] of the observation that followed the action, also where the episode ended there.
        terminated: [T, E] 0 or 1.
        done: [T, E] 0 or 1, terminated or truncated.
        discount: per step.
        lam: 0 takes one step of reward and the value behind it, 1 all reward to the end.

    Returns:
        [T, E].
    """
    delta = reward + discount * (1 - terminated) * next_value - value
    weight = discount * lam * (1 - done)
    advantage = torch.empty_like(delta)
    later = torch.zeros_like(delta[0])
    for step in reversed(range(len(delta))):
        later = torch.addcmul(delta[step], weight[step], later)
        advantage[step] = later
    return advantage


def ppo_terms(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    batch: RolloutBatch,
    *,
    clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    norm_adv: bool = True,
    vf_clip_coef: float | None = None,
) -> Metrics:
    """Objective of PPO (Schulman et al. 2017, eq. 9) and what is watched beside it, all [].

    Args:
        log_prob: [B] of the batch's actions under the policy as it is now.
        entropy: [B] of that policy.
        value: [B] as it is now.
        batch: what was true when the actions were taken.
        clip_coef: probability ratios beyond 1 +- this are clipped.
        vf_coef: weight of the value loss.
        ent_coef: weight of the entropy.
        norm_adv: standardise the batch's advantages.
        vf_clip_coef: the value may move this far from what it was; None: as far as it likes.

    Returns:
        ``total_loss`` = ``policy_loss`` + vf_coef ``value_loss`` + ent_coef ``entropy_loss``, where ``value_loss`` is half the squared
        error and ``entropy_loss`` the negative entropy; and without gradient ``approx_kl`` (of the old from the new policy: the mean
        of r - 1 - log r, Schulman 2020) and ``clipfrac`` (share of ratios beyond the clip).

    Raises:
        LossError: anything but one number per observation, which would be broadcast to a wrong loss.
    """
    policy = {"the policy's log_prob": log_prob, "the policy's entropy": entropy, "the policy's value": value}
    given = {f"the batch's {name}": getattr(batch, name) for name in ("log_prob", "value", "advantage", "returns")}
    for name, values in (policy | given).items():
        if values.shape != batch.obs.shape[:1]:
            raise LossError(f"{name}: expected one number per observation, {list(batch.obs.shape[:1])}, got shape {list(values.shape)}")
    log_ratio = log_prob - batch.log_prob
    ratio = log_ratio.exp()
    advantage = batch.advantage
    if norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    policy_loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()
    error = (value - batch.returns).square()
    if vf_clip_coef is not None:
        clipped = batch.value + (value - batch.value).clamp(-vf_clip_coef, vf_clip_coef)
        error = torch.maximum(error, (clipped - batch.returns).square())
    value_loss, entropy_loss = 0.5 * error.mean(), -entropy.mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > clip_coef).to(ratio.dtype).mean()
    return {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy_loss": entropy_loss,
        "total_loss": policy_loss + vf_coef * value_loss + ent_coef * entropy_loss,
        "approx_kl": approx_kl,
        "clipfrac": clipfrac,
    }


def custom_names(functions: Sequence[CustomLoss]) -> list[str]:
    """Return what custom losses are called: the functions' names, numbered from the second of the same name on."""
    seen, names = Counter[str](), []
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__name__", type(function).__name__)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def custom_loss(name: str, function: CustomLoss, policy: Any, batch: RolloutBatch) -> Tensor:
    """Evaluate a custom loss [].

    Raises:
        LossError: it fails, or is no finite scalar; the message has its ``name``.
    """
    tensors = {
        "obs": batch.obs,
        "actions": batch.action,
        "rewards": batch.reward,
        "values": batch.value,
        "advantages": batch.advantage,
    }
    try:
        loss = function(policy=policy, **tensors)
    except Exception as error:
        shapes = ", ".join(f"{key} {list(values.shape)}" for key, values in tensors.items())
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise LossError(f"custom loss {name}: {reason}; it is called with the keywords policy, {shapes}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"a tensor of {loss.dtype} and shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise LossError(f"custom loss {name}: expected a float tensor with one number, got {got}; return its mean")
    if not bool(loss.isfinite()):
        raise LossError(f"custom loss {name}: is {float(loss.detach()):g}; that update was not applied")
    return loss.reshape(())
