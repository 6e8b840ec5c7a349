"""Data sources: they take transitions, hand out batches, and say when an update is due."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from worldmpc.config import ConfigError
from worldmpc.data.replay import Replay
from worldmpc.types import Batch, Transition


class ReplaySource:
    """Off-policy data: a replay, sampled uniformly, ``utd`` updates per decision whatever the number of environments."""

    def __init__(self, replay: Replay, batch_size: int, utd: float, seed_decisions: int, generator: torch.Generator) -> None:
        """Wrap a replay.

        Args:
            replay: where transitions go.
            batch_size: windows per batch, B.
            utd: updates per decision.
            seed_decisions: decisions before the first update; as many updates as they are worth are due right after them.
            generator: CPU generator of the sampling stream; saving it is its owner's business.

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
        self.decisions = 0
        self.updates = 0
        self.resume_at = 0
        self.forgone = 0
        # Exact in decimal: 100 decisions at 0.29 are 29 updates, in floating point only 28.
        self._ratio = Fraction(str(utd))

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
        """Return how many updates are due: 0 before the end of the seed phase and while there is no window to train on."""
        if self.decisions < max(self.seed_decisions, self.resume_at) or not self.replay.num_windows():
            return 0
        return max(0, self._worth(self.decisions) - self.updates - self.forgone)

    def next(self) -> Batch:
        """Return the batch of the next update [T, B, ...] and count it as done.

        Raises:
            RuntimeError: the replay has no window yet.
        """
        batch = self.replay.sample(torch.rand(self.batch_size, dtype=torch.float64, generator=self.generator))
        self.updates += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; replay and generator are saved by their owner."""
        return {"decisions": self.decisions, "updates": self.updates, "resume_at": self.resume_at, "forgone": self.forgone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self.decisions = int(state["decisions"])
        self.updates = int(state["updates"])
        self.resume_at, self.forgone = int(state["resume_at"]), int(state["forgone"])

    def _worth(self, decisions: int) -> int:
        """Return how many updates a number of decisions is worth."""
        return decisions * self._ratio.numerator // self._ratio.denominator
