"""On-policy data: steps are packed into rollouts, and rollouts are handed out as shuffled minibatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def minibatches(total: int, size: int) -> int:
    """Return into how many minibatches of about ``size`` a number of steps is divided."""
    return max(1, round(total / size))


def take(batch: RolloutBatch, rows: Tensor) -> RolloutBatch:
    """Return a copy of some rows [b] of a batch."""
    rows = rows.to(batch.reward.device)
    return RolloutBatch(*(values[rows] for values in batch))


class StreamSource:
    """A data source of fresh rollouts: each is trained on ``update_epochs`` times in shuffled minibatches, then forgotten.

    Args:
        experience: the rollout to fill.
        prepare: makes a batch of all valid steps of a full rollout, with advantages; called once per rollout, before its first update.
        update_epochs: passes over a rollout.
        minibatch_size: steps per update, about; exactly where it divides the rollout.
        generator: CPU generator of the shuffling; saving it is its owner's business.

    Raises:
        ConfigError: a number below 1, or a generator on another device.
    """

    seed_decisions = 0

    def __init__(
        self,
        experience: Experience,
        prepare: Callable[[Experience], RolloutBatch],
        update_epochs: int,
        minibatch_size: int,
        generator: torch.Generator,
    ) -> None:
        for name, value in (("update_epochs", update_epochs), ("minibatch_size", minibatch_size)):
            if value < 1:
                raise ConfigError(f"ppo.{name}: expected at least 1, got {value}")
        if generator.device.type != "cpu":
            raise ConfigError(f"shuffling needs a CPU generator, so that every device draws the same minibatches, got {generator.device}")
        self.experience, self.prepare = experience, prepare
        self.update_epochs, self.minibatch_size, self.generator = update_epochs, minibatch_size, generator
        self.decisions = 0
        self.updates = 0
        self._batch: RolloutBatch | None = None  # of the rollout that is being trained on
        self._order = torch.zeros(0, dtype=torch.int64)  # of the present pass
        self._done = 0  # updates on that rollout

    def observe(self, step: Transition) -> None:
        """Pack one decision of every environment; entries that are not valid do not count.

        Raises:
            RuntimeError: updates on the full rollout are still due.
            ConfigError: extras without ``log_prob`` or ``value``.
            ValueError: a field of another shape than the rollout's.
        """
        self.experience.add(step)
        self.decisions += int(step.valid.sum())

    def ready(self) -> int:
        """Return how many updates are due: 0 until a rollout is full, then those on it that have not been done."""
        if not self.experience.ready_for_training:
            return 0
        total = int(self.experience.valid.sum())
        return self.update_epochs * minibatches(total, self.minibatch_size) - self._done

    def next(self) -> RolloutBatch:
        """Return the minibatch of the next update [B, ...] and count it as done.

        Raises:
            RuntimeError: the rollout is not full yet.
        """
        due = self.ready()
        if not due:
            raise RuntimeError(f"next: the rollout has {self.experience.filled} of {self.experience.steps} steps; nothing is due yet")
        if self._batch is None:
            self._batch = self.prepare(self.experience)
        total = len(self._batch.reward)
        parts = minibatches(total, self.minibatch_size)
        if self._done % parts == 0:
            self._order = torch.randperm(total, generator=self.generator)
        batch = take(self._batch, self._order.tensor_split(parts)[self._done % parts])
        self._done += 1
        self.updates += 1
        if due == 1:
            self._forget()
        return batch

    def describe(self) -> str:
        """Return one line: what a rollout holds and where."""
        rollout = self.experience
        return (
            f"rollouts of {rollout.steps:,} steps x {rollout.num_envs:,} environments on {rollout.device}, "
            f"{self.update_epochs} passes in minibatches of {self.minibatch_size:,}"
        )

    def cut(self) -> None:
        """End all running episodes where they are, as if truncated."""
        if self._batch is None:
            self.experience.cut()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; what is collected is :meth:`data_state`, the generator is saved by its owner."""
        return {"decisions": self.decisions, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self.decisions, self.updates = int(state["decisions"]), int(state["updates"])

    def data_state(self) -> dict[str, Tensor]:
        """Return the rollout so far, and how far the updates on it are; shares memory until the next step is observed."""
        state = self.experience.state_dict()
        if self._batch is not None:
            state |= {f"batch_{name}": values for name, values in self._batch._asdict().items()}
            state |= {"order": self._order, "done": torch.tensor(self._done)}
        return state

    def load_data(self, data: Mapping[str, Tensor] | None) -> None:
        """Restore what :meth:`data_state` returned; None: begin a new rollout.

        Raises:
            ConfigError: it was saved with other sizes.
        """
        self._forget()
        if data is None:
            return
        self.experience.load_state_dict(data)
        if "done" in data:
            device = self.experience.device
            self._batch = RolloutBatch(*(data[f"batch_{name}"].to(device, copy=True) for name in RolloutBatch._fields))
            self._order, self._done = data["order"].cpu(), int(data["done"])

    def _forget(self) -> None:
        self.experience.clear()
        self._batch, self._done = None, 0
