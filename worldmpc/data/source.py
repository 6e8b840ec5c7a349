"""Data sources: they take transitions, hand out batches, and say when an update is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from worldmpc.config import ConfigError, exact_ratio, updates_worth
from worldmpc.data.replay import Replay
from worldmpc.data.shaping import Transform
from worldmpc.types import Batch, SequenceBatch, Transition


class ReplaySource:
    """Off-policy data: a replay, sampled uniformly, ``utd`` updates per decision whatever the number of environments."""

    def __init__(
        self,
        replay: Replay,
        batch_size: int,
        utd: float | Fraction,
        seed_decisions: int,
        generator: torch.Generator,
        convert: Callable[[SequenceBatch], Batch] | None = None,
        draw: Callable[[int], Any] | None = None,
        refresh: Callable[[SequenceBatch, int], SequenceBatch] | None = None,
    ) -> None:
        """Wrap a replay.

        Args:
            replay: where transitions go.
            batch_size: windows per batch, B.
            utd: updates per decision; a fraction counts exactly, a float as it is written.
            seed_decisions: decisions before the first update; as many updates as they are worth are due right after them.
            generator: CPU generator of the sampling stream; saving it is its owner's business.
            convert: makes what an update wants out of windows; None: windows.
            draw: returns one batch for a number of updates that are due, instead of windows at random, such as all that is stored; then
                what is due is done at once, and the first comes with the end of a seed phase, ahead of its time, so that nobody acts on
                what has learned nothing.
            refresh: may renew what is stored with the windows of an update, which is counted from 1, and returns them as they then are.

        Raises:
            ConfigError: a value out of range, or a generator on another device.
        """
        if batch_size < 1:
            raise ConfigError(f"loss.batch_size: expected at least 1, got {batch_size}")
        if not utd > 0:
            raise ConfigError(f"train.utd: expected more than 0, got {utd}")
        if seed_decisions < 0:
            raise ConfigError(f"train.seed_decisions: expected 0 or more, got {seed_decisions}")
        if generator.device.type != "cpu":
            raise ConfigError(f"replay sampling needs a CPU generator, so that every device draws the same batches, got {generator.device}")
        self.replay = replay
        self.batch_size = batch_size
        self.utd = utd
        self.seed_decisions = seed_decisions
        self.generator = generator
        self.convert, self.draw, self.refresh = convert, draw, refresh
        self.transforms: list[Transform] = []
        """What is made of the windows of every update, in this order, before they are converted."""
        self.decisions = 0
        self.updates = 0
        self.resume_at = 0
        self.forgone = 0
        self._ratio = exact_ratio(utd)

    def start_over(self) -> None:
        """Go on with an empty replay: collect for another seed phase before the next update, and do not catch up on those missed."""
        self.resume_at = self.decisions + self.seed_decisions
        self.forgone = self._worth(self.resume_at) - self.updates

    def observe(self, step: Transition) -> None:
        """Store one decision of every environment; entries that are not valid do not count.

        Raises:
            ValueError: a field of another shape than the replay's.
        """
        self.replay.add(step)
        self.decisions += int(step.valid.sum())

    def ready(self) -> int:
        """Return how many batches are due: 0 before the end of the seed phase and while there is no window to train on.

        Raises:
            ConfigError: there is no window long after the seed phase.
        """
        if self.decisions < max(self.seed_decisions, self.resume_at):
            return 0
        if not self.replay.num_windows():
            if not self.updates and self.decisions >= 2 * max(self.seed_decisions, 500):
                raise ConfigError(
                    f"replay.windows: after {self.decisions} decisions there is no window of {self.replay.horizon} steps, "
                    f"as episodes are shorter; use replay.windows=padded or a smaller planner.horizon"
                )
            return 0
        due = max(0, self._due())
        if self.draw is None:
            return due
        first = self.seed_decisions > 0 and not self.updates
        return 1 if due or first else 0

    def next(self) -> Any:
        """Return the batch of the next update, windows [T, B, ...] unless converted, and count it, or all it is for, as done.

        Raises:
            RuntimeError: the replay has no window yet.
        """
        if self.draw is not None:
            due = max(1, self._due())
            self.updates += due
            return self.draw(due)
        batch = self.replay.sample(torch.rand(self.batch_size, dtype=torch.float64, generator=self.generator))
        self.updates += 1
        if self.refresh is not None:
            batch = self.refresh(batch, self.updates)
        for transform in self.transforms:
            batch = transform(batch)
        return batch if self.convert is None else self.convert(batch)

    def describe(self) -> str:
        """Return one line: what the replay holds and where."""
        rate = f"{self.seed_decisions:,} random decisions first, {float(self.utd):g} updates per decision"
        return f"{self.replay.describe()}; {rate}"

    def cut(self) -> None:
        """End all running episodes where they are, as if truncated."""
        self.replay.cut()

    def data_state(self) -> dict[str, Tensor]:
        """Return the replay's state; ``obs`` may share memory with it until the next step is observed."""
        return self.replay.state_dict(copy=False)

    def load_data(self, data: Mapping[str, Tensor] | None) -> None:
        """Restore what :meth:`data_state` returned; None: see :meth:`start_over`."""
        if data is None:
            self.start_over()
        else:
            self.replay.load_state_dict(data)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; replay and generator are saved by their owner."""
        return {"decisions": self.decisions, "updates": self.updates, "resume_at": self.resume_at, "forgone": self.forgone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self.decisions = int(state["decisions"])
        self.updates = int(state["updates"])
        self.resume_at, self.forgone = int(state["resume_at"]), int(state["forgone"])

    def _due(self) -> int:
        """Return how many updates behind the decisions' worth those done are; below 0 after :meth:`start_over`."""
        return self._worth(self.decisions) - self.updates - self.forgone

    def _worth(self, decisions: int) -> int:
        """Return how many updates a number of decisions is worth."""
        return updates_worth(decisions, self._ratio)


class NoSource:
    """Nothing to learn from: counts decisions, never asks for an update."""

    def __init__(self) -> None:
        self.decisions = 0
        self.updates = 0
        self.seed_decisions = 0

    def observe(self, step: Transition) -> None:
        """Count one decision of every environment."""
        self.decisions += int(step.valid.sum())

    def ready(self) -> int:
        """Return 0."""
        return 0

    def next(self) -> Batch:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("this agent learns nothing, so there is no batch")

    def describe(self) -> str:
        """Return one line."""
        return "no replay: this agent learns nothing"

    def cut(self) -> None:
        """Do nothing, as nothing is stored."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counter."""
        return {"decisions": self.decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counter."""
        self.decisions = int(state["decisions"])

    def data_state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_data(self, data: Mapping[str, Tensor] | None) -> None:
        """Do nothing, as nothing is stored."""
