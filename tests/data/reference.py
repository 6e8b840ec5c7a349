"""A replay as plain lists of episodes: slow, obvious, and what the real one is held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from worldmpc.types import Transition

EXTRAS: dict[str, tuple[int, ...]] = {"vec": (2,), "num": ()}


@dataclass
class Step:
    """One stored decision; ``obs`` and ``next_obs`` are serial numbers, unique in the run unless one follows the other."""

    stream: int
    position: int
    obs: float
    next_obs: float
    action: float
    reward: float
    terminated: bool
    truncated: bool
    extra: float | None


@dataclass
class Episode:
    """Steps of one episode, in order; closed once it ended."""

    steps: list[Step] = field(default_factory=list)
    closed: bool = False


class Reference:
    """Episodes of each stream; a step is forgotten when the ring writes over its row."""

    def __init__(self, num_envs: int, rows: int, padded: bool) -> None:
        """Start empty."""
        self.rows, self.padded = rows, padded
        self.episodes: list[list[Episode]] = [[Episode()] for _ in range(num_envs)]
        self.position = [0] * num_envs

    def add(self, stream: int, step: Step) -> None:
        """Append a step and forget what it overwrites: its own row and the row of what follows it."""
        episodes = self.episodes[stream]
        step.position = self.position[stream]
        episodes[-1].steps.append(step)
        self.position[stream] += 1
        if step.terminated or step.truncated:
            episodes[-1].closed = True
            episodes.append(Episode())
            self.position[stream] += 1
        oldest = step.position + 1 - self.rows
        for episode in episodes:
            episode.steps = [kept for kept in episode.steps if kept.position > oldest]

    def stored(self) -> int:
        """Return the number of steps kept."""
        return sum(len(episode.steps) for episodes in self.episodes for episode in episodes)

    def windows(self, horizon: int) -> list[list[Step]]:
        """Return the real steps of every available window, streams one after the other, oldest first."""
        found = []
        for episodes in self.episodes:
            for episode in episodes:
                for first in range(len(episode.steps)):
                    window = episode.steps[first : first + horizon]
                    if len(window) == horizon or (self.padded and episode.closed):
                        found.append(window)
        return found


class Stream:
    """Makes transitions of recognisable numbers with random episode lengths, and feeds a reference with them."""

    def __init__(self, num_envs: int, rows: int, padded: bool, *, seed: int, longest: int, invalid: float, dtype: torch.dtype) -> None:
        """Episodes last 1 to ``longest`` steps; an entry is not valid with probability ``invalid``."""
        self.reference = Reference(num_envs, rows, padded)
        self.rng = np.random.default_rng(seed)
        self.longest, self.invalid, self.dtype = longest, invalid, dtype
        self.serial = 0
        self.obs = [self._number() for _ in range(num_envs)]
        self.left = [self._length() for _ in range(num_envs)]

    def step(self) -> Transition:
        """Return the next transition of all streams."""
        envs = len(self.obs)
        valid = self.rng.random(envs) >= self.invalid
        with_extras = self.rng.random() < 0.7
        rows = []
        obs = list(self.obs)
        for stream in range(envs):
            following = self._number()
            last = self.left[stream] == 1
            how = self.rng.integers(3) if last else -1
            made = Step(
                stream,
                -1,
                self.obs[stream],
                following,
                self._number(),
                self._number(),
                bool(how in (0, 2)),
                bool(how in (1, 2)),
                self._number() if with_extras else None,
            )
            rows.append(made)
            if valid[stream]:
                self.reference.add(stream, made)
                self.left[stream] = self._length() if last else self.left[stream] - 1
                self.obs[stream] = self._number() if last else following
        column = lambda name: torch.tensor([getattr(row, name) for row in rows])  # noqa: E731
        extras = {}
        if with_extras:
            number = column("extra").float()
            extras = {"vec": torch.stack((number, -number), 1), "num": number + 0.5, "undeclared": number}
        return Transition(
            obs=self._image(torch.tensor(obs)),
            action=torch.stack((column("action"), -column("action")), 1).float(),
            reward=column("reward").float(),
            terminated=column("terminated"),
            truncated=column("truncated"),
            next_obs=self._image(column("next_obs")),
            valid=torch.from_numpy(valid),
            extras=extras,
        )

    def _number(self) -> float:
        self.serial += 1
        return float(self.serial)

    def _length(self) -> int:
        return int(self.rng.integers(1, self.longest + 1))

    def _image(self, number: torch.Tensor) -> torch.Tensor:
        return image(number, self.dtype)


def image(number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the observation of a serial number: [E] -> [E, 1, 3], exact also as bytes."""
    number = number.long()
    return torch.stack((number % 251, number // 251 % 251, number // 63001), -1)[:, None].to(dtype)
