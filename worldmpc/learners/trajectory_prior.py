"""A prior over action sequences that an agent trains beside its model, for planners that sample from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.config import RunConfig
from worldmpc.models.trajectory import TrajectoryModel
from worldmpc.noise import NoiseStream
from worldmpc.optim import GroupOptimizer
from worldmpc.types import EnvSpec, Metrics


class TrajectoryPrior:
    """A :class:`~worldmpc.models.trajectory.TrajectoryModel` with its optimiser and random stream (``planner.prior=learned``).

    It is made after everything else and draws from streams of its own, so that an agent's other networks are the same with and
    without it.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        latent_dim: width of the states that it is conditioned on.
        device: where to learn.
        total_updates: length of the learning-rate schedule.
    """

    def __init__(self, config: RunConfig, spec: EnvSpec, latent_dim: int, device: torch.device, total_updates: int) -> None:
        planner = config.planner
        self.model = TrajectoryModel(
            spec.action_dim, planner.horizon, latent_dim, steps=planner.prior_steps, discrete=spec.discrete, seed=config.seed
        )
        self.model.to(device)
        self.optimizer = GroupOptimizer(self.model, {"net.": 1.0}, config.optim, total_updates=total_updates)
        self.stream = NoiseStream(config.seed, "trajectory", device=device)
        self.max_loss, self.updates = config.train.max_loss, 0

    def update(self, z: Tensor, actions: Tensor, mask: Tensor) -> Metrics:
        """Learn from sequences actions [H, B, A] taken from latents z [B, Z], those that are whole by their mask [H, B]."""
        self.optimizer.begin(self.updates)
        noise = self.stream.draw(self.model.noise_specs(len(z)))
        whole = mask.amin(0)
        loss = self.model.loss(z.detach(), actions.transpose(0, 1), noise, whole).sum() / whole.sum().clamp(min=1)
        skip = (~(loss.detach().abs() < self.max_loss)).to(loss.dtype)
        _, skip = self.optimizer.step(self.optimizer.gradients(loss), skip)
        self.model.update_ema()
        self.updates += 1
        return {"trajectory_loss": loss.detach(), "trajectory_skipped": skip}

    def state_dict(self) -> dict[str, Any]:
        """Return optimiser, counter and random stream; the parameters belong to the agent's model."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = int(state["updates"])
        self.stream.load_state_dict(state["stream"])


def make_prior(config: RunConfig, spec: EnvSpec, latent_dim: int, device: torch.device, total_updates: int) -> TrajectoryPrior | None:
    """Return the prior that the planner asks for, or None."""
    return TrajectoryPrior(config, spec, latent_dim, device, total_updates) if config.planner.prior == "learned" else None
