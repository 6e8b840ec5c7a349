"""Players and learners for tests, whose every move can be told."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.types import ActOutput, EnvSpec


class Counting:
    """Acts with ``value`` + 0.01 per step of its game, and notes what it is asked and shown."""

    def __init__(self, value: float = 0.0, size: int = 2) -> None:
        self.value, self.size, self.fresh = value, size, 0
        self.asked: list[tuple[list[float], Tensor]] = []
        """Steps of the games that it was asked in, and its views."""
        self.watched: list[tuple[Tensor, Tensor]] = []

    def init_carry(self, games: int, generator: torch.Generator) -> tuple[Tensor]:
        self.fresh += 1
        return (torch.zeros(games),)

    def act(self, carry: tuple[Tensor], obs: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor]]:
        self.asked.append((carry[0].tolist(), obs))
        return (self.value + 0.01 * carry[0])[:, None].expand(-1, self.size), (carry[0] + 1,)

    def watch(self, carry: tuple[Tensor], obs: Tensor, other_action: Tensor) -> tuple[Tensor]:
        self.watched.append((obs, other_action))
        return carry

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Learner:
    """An agent of one parameter, which is what it does."""

    modes = ("explore", "eval")

    def __init__(self, value: float = 0.0, spec: EnvSpec | None = None) -> None:
        self.model, self.spec = nn.Linear(1, 1, bias=False), spec or EnvSpec("duel_v0", (3,), 2, 6)
        self.config = SimpleNamespace(seed=1)
        self.be(value)

    def be(self, value: float) -> None:
        nn.init.constant_(self.model.weight, value)

    @property
    def value(self) -> float:
        return self.model.weight.item()

    def init_carry(self, games: int) -> tuple[()]:
        return ()

    def reset_eval_noise(self, *index: int) -> None:
        pass

    def act(self, carry: Any, obs: Tensor, mode: str) -> ActOutput:
        return ActOutput(torch.full((len(obs), self.spec.action_dim), self.value), carry, {}, {})


def copied(agent: Any) -> Any:
    return Learner(agent.value, agent.spec)
