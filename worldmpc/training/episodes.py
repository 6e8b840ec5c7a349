"""The one account of episodes under way, kept by whoever steps environments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from worldmpc.types import EnvStep


class Episode(NamedTuple):
    """A finished episode."""

    ret: float
    length: int
    """Decisions."""
    success: float = math.nan
    """Largest that was reported on the way, NaN where none was."""


class EpisodeTally:
    """What the running episode of each environment has brought so far.

    Args:
        num_envs: environments, E.
        limit: an episode counts as over after as many decisions; None: when its environment says so.
    """

    def __init__(self, num_envs: int, limit: int | None = None) -> None:
        self.limit = limit
        self._return = torch.zeros(num_envs, dtype=torch.float64)
        self._length = torch.zeros(num_envs, dtype=torch.int64)
        self._success = torch.full((num_envs,), torch.nan)

    def note(self, step: EnvStep) -> dict[int, Episode]:
        """Add one step of every environment, and return the episodes that ended with it, by the index of their environment."""
        self._return += step.reward
        self._length += step.valid
        self._success = torch.fmax(self._success, step.success)
        over = step.terminated | step.truncated
        if self.limit is not None:
            over = over | (self._length >= self.limit)
        finished = {
            env: Episode(float(self._return[env]), int(self._length[env]), float(self._success[env]))
            for env in over.nonzero().flatten().tolist()
        }
        if finished:
            self._return[over], self._length[over], self._success[over] = 0.0, 0, torch.nan
        return finished

    def reset(self) -> None:
        """Begin a new episode everywhere."""
        self._return.zero_()
        self._length.zero_()
        self._success.fill_(torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums, each [E]."""
        return {
            "running_return": self._return.clone(),
            "running_length": self._length.clone(),
            "running_success": self._success.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; states saved before there was a ``running_success`` begin with none."""
        self.reset()
        self._return.copy_(state["running_return"])
        self._length.copy_(state["running_length"])
        if "running_success" in state:
            self._success.copy_(state["running_success"])
