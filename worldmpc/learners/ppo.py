"""The update of PPO, usable alone: losses, custom losses, gradient clip, early stop."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc import on_policy
from worldmpc.config import ConfigError, PPOConfig
from worldmpc.data.rollout import Experience
from worldmpc.data.stream import StreamSource
from worldmpc.noise import derive_seed
from worldmpc.on_policy import CustomLoss, LossError
from worldmpc.types import Metrics, RolloutBatch


class PPOOptimizer:
    """Proximal policy optimisation (Schulman et al. 2017) of any policy that can be called like
    :class:`worldmpc.models.actor_critic.ActorCritic`: ``policy(obs, state, action) -> action, log_prob, entropy, value, _``.

    Args:
        policy: the module that learns.
        optimizer: over its parameters; its learning rate is its owner's business.
        device: where batches go.
        config: coefficients; ``gamma`` is the discount.
        max_loss: an update whose loss is above this, or not finite, is not applied.
        seed: of the shuffling in :meth:`update`.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device | str = "cpu",
        config: PPOConfig | None = None,
        *,
        max_loss: float = math.inf,
        seed: int = 1,
    ) -> None:
        self.policy, self.optimizer, self.device = policy, optimizer, torch.device(device)
        self.config, self.max_loss = config or PPOConfig(), max_loss
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches"))
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.stopped = False
        """Whether the policy has moved by ``target_kl`` since the rollout under training was collected."""
        self.updates = 0
        """Updates so far, those included that were not applied."""
        self.skipped = 0
        """Updates of this object that were not applied because of their loss or gradient; such an update ends a run, so that one that
        goes on begins at 0."""

    @torch.no_grad()
    def prepare(self, experience: Experience) -> RolloutBatch:
        """Return all steps of a full rollout with their advantages, as one batch [B, ...], and begin to train on it."""
        self.stopped = False
        next_value = self.policy(experience.next_obs.flatten(0, 1).to(self.device))[3].view_as(experience.value).to(experience.device)
        terminated, done = experience.terminated.to(next_value.dtype), (experience.terminated | experience.truncated).to(next_value.dtype)
        values = experience.reward, experience.value, next_value
        return experience.flat(on_policy.gae(*values, terminated, done, self.config.gamma, self.config.gae_lambda))

    def compute_ppo_loss(
        self,
        obs: Tensor,
        actions: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        returns: Tensor,
        values: Tensor,
        progress: float = 0.0,
    ) -> Metrics:
        """Return ``policy_loss, value_loss, entropy_loss, total_loss, approx_kl, clipfrac``, all [].

        Arguments are those of :class:`worldmpc.types.RolloutBatch`; ``progress`` is that of the training, for ``anneal_clip``.

        Raises:
            LossError: an argument, or what the policy returns, is not one number per observation [B].
        """
        config, (_, log_prob, entropy, value, _) = self.config, self.policy(obs, None, actions)
        return on_policy.ppo_terms(
            log_prob,
            entropy,
            value,
            RolloutBatch(obs, actions, old_logprobs, torch.zeros_like(returns), values, advantages, returns),
            clip_coef=config.clip_coef * (1 - progress if config.anneal_clip else 1),
            vf_coef=config.vf_coef,
            ent_coef=config.ent_coef,
            norm_adv=config.norm_adv,
            vf_clip_coef=config.vf_clip_coef if config.clip_vloss else None,
        )

    def step(self, batch: RolloutBatch, custom_loss_fns: Sequence[CustomLoss] = (), *, progress: float = 0.0) -> Metrics:
        """Do one update on a minibatch.

        It is not applied where the policy has moved by ``target_kl`` since the rollout (``applied`` is 0 then, to the end of the
        rollout), nor where loss or gradient are not finite or the loss is above ``max_loss`` (``skipped_updates`` counts these).

        Args:
            batch: [B, ...].
            custom_loss_fns: added to the loss; see :data:`worldmpc.on_policy.CustomLoss`. Their metrics are ``custom/<name>``, as in
                :func:`worldmpc.on_policy.custom_names`.
            progress: share of the training that is done, for ``anneal_clip``.

        Raises:
            LossError: a custom loss fails or is no finite scalar, or see :meth:`compute_ppo_loss`; this call changed nothing.
        """
        batch = RolloutBatch(*(values.to(self.device) for values in batch))
        obs, action, log_prob, _, value, advantage, returns = batch
        metrics = self.compute_ppo_loss(obs, action, log_prob, advantage, returns, value, progress)
        loss = metrics["total_loss"]
        for name, function in zip(on_policy.custom_names(custom_loss_fns), custom_loss_fns, strict=True):
            metrics[f"custom/{name}"] = extra = on_policy.custom_loss(name, function, self.policy, batch)
            loss = loss + extra
        metrics = {name: value.detach() for name, value in (metrics | {"total_loss": loss}).items()}
        self.updates += 1
        if self.config.target_kl is not None and not self.stopped:
            self.stopped = bool(metrics["approx_kl"] > self.config.target_kl)
        if not self.stopped:
            metrics["grad_norm"] = self._descend(loss)
        return metrics | {"applied": loss.new_tensor(float(not self.stopped)), "skipped_updates": loss.new_tensor(float(self.skipped))}

    def update(
        self,
        experience: Experience,
        update_epochs: int | None = None,
        custom_loss_fns: Sequence[CustomLoss] | None = None,
        progress: float = 0.0,
    ) -> dict[str, float]:
        """Train on a full rollout, clear it, and return each metric's mean over the updates.

        ``update_epochs`` passes over it, or as configured; the other arguments are those of :meth:`step`.

        Raises:
            LossError: a loss or gradient is not finite, or a loss above ``max_loss``, or see :meth:`step`; that update was not applied,
                those before it on the same rollout were.
            ConfigError: the rollout is not full.
        """
        if not experience.ready_for_training:
            raise ConfigError(f"experience: has {experience.filled} of {experience.steps} steps; fill it before training on it")
        epochs = self.config.update_epochs if update_epochs is None else update_epochs
        source = StreamSource(experience, self.prepare, epochs, self.config.minibatch_size, self.generator)
        found, skipped = defaultdict[str, list[Tensor]](list), self.skipped
        for _ in range(source.ready()):
            metrics = self.step(source.next(), custom_loss_fns or (), progress=progress)
            if self.skipped > skipped:
                raise LossError(f"update: {self._why_skipped(metrics)}; that update was not applied")
            for name, value in metrics.items():
                found[name].append(value)
        return {name: float(torch.stack(values).mean()) for name, values in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what training is resumed with, besides policy and optimizer."""
        return {"stopped": self.stopped, "updates": self.updates, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.stopped, self.updates = bool(state["stopped"]), int(state["updates"])
        self.generator.set_state(state["generator"].cpu())

    def _why_skipped(self, metrics: Metrics) -> str:
        """Return which numbers of an update were out of bounds, and where to look."""
        good = bool(metrics["total_loss"].abs() < self.max_loss)
        what = "the gradient is not finite" if good else f"the loss is not finite, or not below max_loss={self.max_loss:g}"
        terms = {name: value for name, value in metrics.items() if name.endswith("_loss") or name.startswith("custom/")}
        values = ", ".join(f"{name} {float(value):g}" for name, value in terms.items())
        custom = " and at the custom losses" if any(name.startswith("custom/") for name in terms) else ""
        return f"{what} ({values}); look at the scale of rewards{custom}"

    def _descend(self, loss: Tensor) -> Tensor:
        """Take one step down the clipped gradient, unless it or the loss is out of bounds; return the norm before clipping []."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        # Waits for the GPU once per update, which then has the whole rollout's updates to do anyway.
        if bool(norm.isfinite() & (loss.detach().abs() < self.max_loss)):
            self.optimizer.step()
        else:
            self.skipped += 1
        return norm.detach()
