"""One update of TD-MPC2: world model, policy, slow critics, running scale; for one seed or a stack of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from worldmpc.config import RunConfig
from worldmpc.functional import Captured, Compiled
from worldmpc.models.packing import constant_parameters
from worldmpc.optim import GroupOptimizer
from worldmpc.types import Metrics, Noise, SequenceBatch

ModelLoss = Callable[[SequenceBatch, Noise], tuple[Tensor, Tensor, Metrics]]
"""``(batch, noise) -> loss [*N], imagined latents without gradient, metrics [*N]``."""
PolicyLoss = Callable[[Tensor, Tensor, Tensor, Noise], tuple[Tensor, Metrics]]
"""``(latents, mask, running scale [*N], noise) -> loss [*N], metrics [*N]``."""


class Learner:
    """What an update changes, and the order in which it does.

    ``*N`` is nothing for one seed and ``N`` for a stack. All state is changed in place, so that an update can be captured as a graph.

    Args:
        config: weights, rates and limits.
        model_loss: of the world model.
        policy_loss: of the policy prior.
        model_optimizer: of the world model.
        policy_optimizer: of the policy prior.
        update_target: moves the slow critics by a rate [*N].
        scale: running range of values [*N].
    """

    def __init__(
        self,
        config: RunConfig,
        model_loss: ModelLoss,
        policy_loss: PolicyLoss,
        model_optimizer: GroupOptimizer,
        policy_optimizer: GroupOptimizer,
        update_target: Callable[[Tensor], None],
        scale: Tensor,
    ) -> None:
        self.config = config
        self.model_loss, self.policy_loss, self.update_target = model_loss, policy_loss, update_target
        self.model_optimizer, self.policy_optimizer = model_optimizer, policy_optimizer
        self.scale, self.skipped = scale, torch.zeros_like(scale)
        self.updates = 0
        self._step = Captured(self.step) if config.cuda_graph else self.step

    def update(self, batch: SequenceBatch, noise: Noise) -> Metrics:
        """Do one update; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied, in no seed."""
        self.model_optimizer.schedule(self.updates)
        self.policy_optimizer.schedule(self.updates)
        metrics = self._step(batch, noise)
        self.updates += 1
        return metrics

    def step(self, batch: SequenceBatch, noise: Noise) -> Metrics:
        """Do one update with the learning rates as they are; nothing here depends on numbers outside of tensors that change."""
        with constant_parameters():
            with self._autocast():
                loss, zs, metrics = self.model_loss(batch, noise)
            gradients = self.model_optimizer.gradients(loss.sum())
        metrics["grad_norm"], skip = self.model_optimizer.step(gradients, self._diverged(loss))
        with constant_parameters():
            with self._autocast():
                loss, policy_metrics = self.policy_loss(zs, batch.mask, self.scale, noise)
            gradients = self.policy_optimizer.gradients(loss.sum())
        skip = torch.maximum(skip, self._diverged(loss))
        policy_metrics["pi_grad_norm"], skip = self.policy_optimizer.step(gradients, skip)
        with torch.no_grad():
            any_skip = skip.amax().expand_as(skip)
            self.scale.copy_(torch.where(any_skip > 0, self.scale, policy_metrics["pi_scale"]))
            self.update_target(self.config.loss.tau * (1 - any_skip))
            self.skipped += skip
        return metrics | policy_metrics | {"pi_loss": loss.detach(), "skipped_updates": self.skipped.clone()}

    def leave_to_stack(self) -> None:
        """Refuse to update from now on: whoever shares the counters of a stack must not go on alone."""

        def refuse(batch: SequenceBatch, noise: Noise) -> Metrics:
            raise RuntimeError("this agent learns through its stack; save it and load it to go on alone")

        self._step = refuse

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling the losses took."""
        return sum(loss.seconds or 0.0 for loss in (self.model_loss, self.policy_loss) if isinstance(loss, Compiled))

    def _autocast(self) -> torch.autocast:
        """Networks inside multiply bfloat16 numbers with ``train.precision=bf16``; what they return is float32."""
        return torch.autocast(self.scale.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _diverged(self, loss: Tensor) -> Tensor:
        return (~(loss.detach().abs() < self.config.train.max_loss)).to(loss.dtype)
