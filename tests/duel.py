"""A tiny game of two, whose every number can be told by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from pettingzoo import ParallelEnv

from worldmpc.types import Mirror


class Duel(ParallelEnv[str, np.ndarray, Any]):
    """Two players push a bead: a step's gain is the first entry of left's action minus that of right's; beyond 1 it is over.

    Views are (own pushes so far, those of the other, time), of a wide right player one more entry. Infos have ``winner``, and the hints
    ``effort`` (own push) and ``late`` (time).

    Args:
        length: time limit, in steps.
        low: bound of Box actions.
        high: the other.
        choices: Discrete actions -1, 0, 1, ... instead, of which the number is the push.
        wide: entries that the right player's view has more.
        tells: infos have ``winner``.
        mirror: its symmetry, as it says.
    """

    metadata: ClassVar[dict[str, Any]] = {"name": "duel_v0", "render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        length: int = 6,
        low: float = -1.0,
        high: float = 1.0,
        choices: int = 0,
        wide: int = 0,
        tells: bool = True,
        mirror: Mirror | None = None,
    ) -> None:
        self.possible_agents, self.agents = ["left", "right"], []
        self.length, self.choices, self.wide, self.tells, self.mirror = length, choices, wide, tells, mirror
        self.low, self.high = np.float32(low), np.float32(high)
        self.begun: list[tuple[int | None, dict[str, Any] | None]] = []
        self.taken: list[dict[str, Any]] = []

    def observation_space(self, agent: str) -> Space[Any]:
        return Box(-np.inf, np.inf, (3 + (self.wide if agent == "right" else 0),), np.float64)

    def action_space(self, agent: str) -> Space[Any]:
        return Discrete(self.choices, start=-1) if self.choices else Box(self.low, self.high, (2,), np.float32)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.begun.append((seed, options))
        rng = np.random.default_rng(seed)
        self.agents, self.time = list(self.possible_agents), 0
        self.pushes = rng.uniform(-0.3, 0.3, 2) + (options or {}).get("offset", 0.0)
        return self._views(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        self.taken.append(actions)
        push = [float(actions[agent] if self.choices else actions[agent][0]) for agent in self.possible_agents]
        self.pushes, self.time = self.pushes + push, self.time + 1
        gain = push[0] - push[1]
        lead = float(np.subtract(*self.pushes))
        over, late = abs(lead) > 1, self.time >= self.length
        winner = int(np.sign(lead)) * over
        rewards = {"left": gain, "right": -gain}
        infos: dict[str, Any] = {
            agent: {"effort": own, "late": self.time} | ({"winner": sign * winner} if self.tells else {})
            for agent, own, sign in zip(self.possible_agents, push, (1, -1), strict=True)
        }
        if over or late:
            self.agents = []
        return self._views(), rewards, self._both(over), self._both(late and not over), infos

    def _views(self) -> dict[str, np.ndarray]:
        left, right = self.pushes
        return {"left": np.array([left, right, self.time]), "right": np.array([right, left, self.time, *[7.0] * self.wide])}

    def _both(self, value: bool) -> dict[str, bool]:
        return dict.fromkeys(self.possible_agents, value)
