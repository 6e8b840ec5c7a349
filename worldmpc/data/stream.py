"""On-policy data: rollouts, handed out as shuffled minibatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.data.rollout import Experience
from worldmpc.types import RolloutBatch, Transition


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
