"""Rollouts: a policy's own steps, packed in order of time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.types import RolloutBatch, Transition


class Experience:
    """A rollout: ``T`` steps of ``E`` environments, time-major.

    A rollout goes on where the last one ended and may hold parts of several episodes; what followed each action is kept beside it,
    as the value of that is needed wherever an episode was truncated, and at the end. Entries that were no transition (``valid``
    False) are kept in place and left out of batches.

    Args:
        steps: length of a rollout, T.
        num_envs: E.
        obs_shape: of one observation.
        action_dim: A.
        obs_dtype: of observations.
        device: where to keep it.

    Raises:
        ConfigError: fewer than one step.
    """

    def __init__(
        self,
        steps: int,
        num_envs: int,
        obs_shape: tuple[int, ...],
        action_dim: int,
        *,
        obs_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if steps < 1 or num_envs < 1:
            raise ConfigError(f"ppo.rollout_steps: expected at least one step of one environment, got {steps} of {num_envs}")
        self.steps, self.num_envs, self.device = steps, num_envs, torch.device(device)
        self.filled = 0
        """Steps so far."""

        def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(steps, num_envs, *shape, dtype=dtype, device=device)

        self._data = {
            "obs": make(obs_shape, obs_dtype),
            "action": make((action_dim,)),
            "reward": make(()),
            "terminated": make((), torch.bool),
            "truncated": make((), torch.bool),
            "next_obs": make(obs_shape, obs_dtype),
            "valid": make((), torch.bool),
            "log_prob": make(()),
            "value": make(()),
        }
        self.obs, self.next_obs, self.action = self._data["obs"], self._data["next_obs"], self._data["action"]  # [T, E, ...]
        self.reward, self.log_prob, self.value = self._data["reward"], self._data["log_prob"], self._data["value"]  # [T, E]
        self.terminated, self.truncated = self._data["terminated"], self._data["truncated"]  # [T, E] bool
        self.valid = self._data["valid"]  # [T, E] bool

    @property
    def ready_for_training(self) -> bool:
        """Whether the rollout is full."""
        return self.filled == self.steps

    @property
    def last_obs(self) -> Tensor:
        """What followed the last step, [E, *O].

        Raises:
            RuntimeError: there is no step.
        """
        if not self.filled:
            raise RuntimeError("last_obs: the rollout is empty; add a transition first")
        return self.next_obs[self.filled - 1]

    def add(self, step: Transition) -> None:
        """Take one decision of every environment, with ``log_prob`` and ``value`` [E] among its extras; none of them valid: not kept.

        Raises:
            RuntimeError: the rollout is full.
            ConfigError: an extra is missing.
            ValueError: a field of another shape than the rollout's.
        """
        if self.ready_for_training:
            raise RuntimeError(f"add: the rollout already has its {self.steps} steps; train on it and clear it first")
        missing = [name for name in ("log_prob", "value") if name not in step.extras]
        if missing:
            raise ConfigError(f"extras: a rollout needs {' and '.join(missing)} of every decision; the policy returns them when it acts")
        if not bool(step.valid.any()):
            return
        for name, stored in self._data.items():
            values = step.extras[name] if name in step.extras else getattr(step, name)
            if values.shape != stored.shape[1:]:
                raise ValueError(f"{name}: expected shape {list(stored.shape[1:])}, got {list(values.shape)}")
            stored[self.filled].copy_(values)
        self.filled += 1

    def clear(self) -> None:
        """Begin the next rollout."""
        self.filled = 0

    def cut(self) -> None:
        """End all running episodes where they are, as if truncated."""
        if self.filled:
            self.truncated[self.filled - 1] |= ~self.terminated[self.filled - 1]

    def flat(self, advantage: Tensor) -> RolloutBatch:
        """Return all valid steps as one batch, in order of time: advantages [T, E] -> [B, ...].

        Shares memory with the rollout where every step is valid.
        """

        def rows(values: Tensor) -> Tensor:
            return values.flatten(0, 1) if everything else values[self.valid]

        everything = bool(self.valid.all())
        parts = self.obs, self.action, self.log_prob, self.reward, self.value, advantage, advantage + self.value
        return RolloutBatch(*map(rows, parts))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the steps so far, each [t, E, ...]; shares memory until the next one is added."""
        return {name: values[: self.filled] for name, values in self._data.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it was saved with other sizes.
        """
        count = len(state["reward"])
        for name, stored in self._data.items():
            if count > self.steps or state[name].shape[1:] != stored.shape[1:]:
                found, expected = list(state[name].shape), list(stored.shape)
                raise ConfigError(f"{name}: the saved rollout has shape {found}, this one holds {expected}; resume with the same sizes")
            stored[:count].copy_(state[name])
        self.filled = count
