"""Losses of several parts, descended one after the other in each update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.config import RunConfig
from worldmpc.optim import GroupOptimizer


class Descent:
    """Optimisers of the parts of a module, whose losses are descended one after the other in each update.

    Args:
        module: owner of the parameters.
        parts: names of the modules in it that have an optimiser of their own, or these and their learning rates relative to ``optim.lr``.
        config: learning rate, clip, schedule and largest loss.
        total_updates: length of the learning-rate schedule.
    """

    def __init__(self, module: nn.Module, parts: Sequence[str] | Mapping[str, float], config: RunConfig, total_updates: int) -> None:
        rates = parts if isinstance(parts, Mapping) else dict.fromkeys(parts, 1.0)
        self.optimizers = {
            part: GroupOptimizer(module, {f"{part}.": rate}, config.optim, total_updates=total_updates) for part, rate in rates.items()
        }
        self.max_loss = config.train.max_loss
        self.updates = 0
        self.skipped = torch.zeros((), device=next(module.parameters()).device)

    def begin(self) -> Tensor:
        """Begin the next update, before its losses are computed, and return that nothing is to be skipped so far, [] 0."""
        for optimizer in self.optimizers.values():
            optimizer.begin(self.updates)
        return torch.zeros_like(self.skipped)

    def step(self, part: str, loss: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Descend the loss [] of a part, unless ``skip`` [] is 1, or loss or gradient are not finite, or the loss is too large.

        Returns:
            The gradient's norm before clipping [], and 1 where nothing was applied, else 0 [].
        """
        optimizer = self.optimizers[part]
        diverged = (~(loss.detach().abs() < self.max_loss)).to(skip.dtype)
        return optimizer.step(optimizer.gradients(loss), torch.maximum(skip, diverged))

    def end(self, skip: Tensor) -> Tensor:
        """Count the update, and return how many have been skipped, in full or in part, []."""
        self.updates += 1
        self.skipped += skip
        return self.skipped.clone()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimisers' states and the counter."""
        return {"optimizers": {part: optimizer.state_dict() for part, optimizer in self.optimizers.items()}, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for part, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][part])
        self.updates = int(state["updates"])
