"""A world model whose policy prior proposes with another width."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.models.world_model import WorldModel


class WiderProposals:
    """Everything of a world model but the bounds of the prior's log standard deviation in what it proposes; values stay what they are.

    Args:
        model: the world model; one's own ``propose`` must take such bounds, as that of :class:`WorldModel` does.
        low: lower bound of the log standard deviation.
        high: upper bound.

    Raises:
        ConfigError: the model's ``propose`` takes no bounds.
    """

    def __init__(self, model: WorldModel, low: float, high: float) -> None:
        if "log_std" not in inspect.signature(model.propose).parameters:
            raise ConfigError("reanalyze: the model's propose(z, eps) has no parameter log_std=None for wider proposals; give it one")
        self._model, self._log_std = model, (low, high)
        self.encode, self.step, self.terminal_value = model.encode, model.step, model.terminal_value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def propose(self, z: Tensor, eps: Tensor) -> Tensor:
        """Sample of the policy prior: [..., Z], [..., A] -> [..., A]."""
        return self._model.propose(z, eps, self._log_std)

    def fast_proposals(self, z: Tensor, eps: Tensor) -> Tensor | None:
        """Do what :func:`worldmpc.planners.propose` does in one call of the CPU library; None where that cannot do it."""
        return self._model.fast_proposals(z, eps, self._log_std)
