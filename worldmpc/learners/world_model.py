"""One update of TD-MPC2: world model, policy, slow critics, running scale; for one seed or a stack of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.config import RunConfig
from worldmpc.functional import Captured, maybe_compile, seconds_compiling
from worldmpc.learners.objectives import Objectives
from worldmpc.models.packing import constant_parameters
from worldmpc.models.world_model import WorldModel
from worldmpc.optim import GroupOptimizer, check_all_learn
from worldmpc.types import Metrics, Noise, SequenceBatch

ModelLoss = Callable[[SequenceBatch, Noise], tuple[Tensor, Tensor, Metrics]]
"""``(batch, noise) -> loss [*N], imagined latents without gradient, metrics [*N]``."""
PolicyLoss = Callable[[Tensor, SequenceBatch, Tensor, Noise], tuple[Tensor, Metrics]]
"""``(latents, batch, running scale [*N], noise) -> loss [*N], metrics [*N]``."""


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
        policy_from: updates of the world model alone before the policy learns as well.
        reset: draws anew, in the update of the given number, what the optimizers hold apart.
        check: raises where networks and optimizers no longer belong together; called in the first update, and where one fails.
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
        *,
        policy_from: int = 0,
        reset: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        self.config = config
        self.model_loss, self.policy_loss, self.update_target = model_loss, policy_loss, update_target
        self.model_optimizer, self.policy_optimizer = model_optimizer, policy_optimizer
        self.scale, self.skipped = scale, torch.zeros_like(scale)
        self.policy_from, self.reset, self.check = policy_from, reset, check
        self.updates, self._checked = 0, False
        self._steps: dict[bool, Callable[..., Metrics]] = {policy: functools.partial(self.step, policy=policy) for policy in (True, False)}
        if config.cuda_graph:
            self._steps = {policy: Captured(step) for policy, step in self._steps.items()}

    def update(self, batch: SequenceBatch, noise: Noise) -> Metrics:
        """Do one update; a loss or gradient that is not finite, or a loss above ``train.max_loss``, is not applied, in no seed.

        Raises:
            ValueError: a parameter that learns nothing, or a network that was replaced since the learner was made.
        """
        if not self._checked:
            self.check()
            self._checked = True
        self.model_optimizer.begin(self.updates)
        self.policy_optimizer.begin(self.updates)
        every = self.config.train.reset_every
        if every is not None and self.updates and self.updates % every == 0:
            self.reset(self.updates)
            self.model_optimizer.forget()
            self.policy_optimizer.forget()
        try:
            metrics = self._steps[self.updates >= self.policy_from](batch, noise)
        except RuntimeError:
            self.check()  # autograd does not say that a network was replaced
            raise
        self.updates += 1
        return metrics

    def step(self, batch: SequenceBatch, noise: Noise, policy: bool = True) -> Metrics:
        """Do one update with the learning rates as they are, of the ``policy`` too or of the world model alone.

        Nothing here depends on numbers outside of tensors that change.
        """
        with constant_parameters():
            with self._autocast():
                loss, zs, metrics = self.model_loss(batch, noise)
            gradients = self.model_optimizer.gradients(loss.sum())
        metrics["grad_norm"], skip = self.model_optimizer.step(gradients, self._diverged(loss))
        if policy:
            found, skip = self._step_policy(zs, batch, noise, skip)
            metrics |= found
        with torch.no_grad():
            self.update_target(self.config.loss.tau * (1 - skip.amax().expand_as(skip)))
            self.skipped += skip
        return metrics | {"skipped_updates": self.skipped.clone()}

    def _step_policy(self, zs: Tensor, batch: SequenceBatch, noise: Noise, skip: Tensor) -> tuple[Metrics, Tensor]:
        """Do the policy's part of an update, unless ``skip`` [*N] is 1 for any seed; return metrics and the new ``skip``."""
        with constant_parameters():
            with self._autocast():
                loss, metrics = self.policy_loss(zs, batch, self.scale, noise)
            gradients = self.policy_optimizer.gradients(loss.sum())
        skip = torch.maximum(skip, self._diverged(loss))
        metrics["pi_grad_norm"], skip = self.policy_optimizer.step(gradients, skip)
        with torch.no_grad():
            self.scale.copy_(torch.where(skip.amax().expand_as(skip) > 0, self.scale, metrics["pi_scale"]))
        return metrics | {"pi_loss": loss.detach()}, skip

    def state_dict(self) -> dict[str, Any]:
        """Return optimisers, running scale and counter."""
        return {
            "model_optimizer": self.model_optimizer.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "scale": self.scale,
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model_optimizer.load_state_dict(state["model_optimizer"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.scale.copy_(state["scale"])
        self.updates = int(state["updates"])

    def leave_to_stack(self) -> None:
        """Refuse to update from now on: whoever shares the counters of a stack must not go on alone."""

        def refuse(batch: SequenceBatch, noise: Noise) -> Metrics:
            raise RuntimeError("this agent learns through its stack; save it and load it to go on alone")

        self._steps = dict.fromkeys((True, False), refuse)

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling the losses took."""
        return seconds_compiling(self.model_loss, self.policy_loss)

    def _autocast(self) -> torch.autocast:
        """Networks inside multiply bfloat16 numbers with ``train.precision=bf16``; what they return is float32."""
        return torch.autocast(self.scale.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _diverged(self, loss: Tensor) -> Tensor:
        return (~(loss.detach().abs() < self.config.train.max_loss)).to(loss.dtype)


def make_learner(config: RunConfig, model: WorldModel, objectives: Objectives, total_updates: int, policy_from: int = 0) -> Learner:
    """Return the learner of one agent, which has not learned anything yet.

    Args:
        config: of the run.
        model: with all networks that are to learn.
        objectives: read in every update.
        total_updates: length of the learning-rate schedule.
        policy_from: updates of the world model alone before the policy learns as well.
    """
    apart = model.last_layers if config.train.reset_every else ()
    optimizer = GroupOptimizer(model, objectives.groups, config.optim, total_updates=total_updates, apart=apart)
    policy = GroupOptimizer(model, {"pi.": 1.0}, config.optim, eps=1e-5, total_updates=total_updates, apart=apart)
    return Learner(
        config,
        maybe_compile(objectives.model_loss, config.compile),
        maybe_compile(objectives.policy_loss, config.compile),
        optimizer,
        policy,
        model.update_target,
        torch.ones((), device=optimizer.flats[0].device),
        policy_from=policy_from,
        reset=model.reset_last_layers,
        check=functools.partial(check_all_learn, model, (optimizer, policy), apart_from=("trajectory.", "opponents.")),
    )
