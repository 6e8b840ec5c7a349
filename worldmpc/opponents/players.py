"""Who can take a seat in a game: scripted bots, chance, and agents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from worldmpc.functional import tree_put, tree_rows
from worldmpc.models.cloning import Clone
from worldmpc.models.heads import one_hot_argmax
from worldmpc.types import Agent, Mode, Seat


class Player(Protocol):
    """Takes a seat in any number of games at once; what it remembers of them is an argument."""

    def init_carry(self, games: int, generator: torch.Generator) -> Any:
        """Return what it remembers of fresh games: nested tuples of tensors [games, ...]."""
        ...

    def act(self, carry: Any, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Own views [games, *O] -> actions [games, A] in [-1, 1], or one-hot, and what it remembers then."""
        ...

    def watch(self, carry: Any, obs: Tensor, other_action: Tensor) -> Any:
        """See what the other player did in a step: own views acted on [games, *O], its actions [games, A2] -> what it remembers then."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what makes it go on exactly, besides carries and parameters."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


class _Stateless:
    def watch(self, carry: Any, obs: Tensor, other_action: Tensor) -> Any:
        return carry

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class RandomPlayer(_Stateless):
    """Acts at random, uniformly."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat

    def init_carry(self, games: int, generator: torch.Generator) -> tuple[()]:
        """Return nothing."""
        return ()

    def act(self, carry: tuple[()], obs: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[()]]:
        """Draw actions [games, A]."""
        uniform = torch.rand(len(obs), self.seat.action_dim, generator=generator)
        return (one_hot_argmax(uniform) if self.seat.discrete else uniform * 2 - 1), carry


class StillPlayer(_Stateless):
    """Does nothing: zeros, or the first choice."""

    def __init__(self, seat: Seat) -> None:
        self.action = torch.zeros(seat.action_dim)
        self.action[0] = float(seat.discrete)

    def init_carry(self, games: int, generator: torch.Generator) -> tuple[()]:
        """Return nothing."""
        return ()

    def act(self, carry: tuple[()], obs: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[()]]:
        """Return the same actions [games, A] always."""
        return self.action.expand(len(obs), -1), carry


class BotPlayer(_Stateless):
    """A scripted bot of hockey; it remembers the phase of its racket's swing.

    Args:
        kind: weak or strong.
        keep_mode: rackets catch the puck.
    """

    def __init__(self, kind: str, keep_mode: bool) -> None:
        from worldmpc.envs.hockey.bots import ScriptedBot

        self.bot = ScriptedBot(kind, np.random.default_rng(0), keep_mode)

    def init_carry(self, games: int, generator: torch.Generator) -> tuple[Tensor]:
        """Draw phases [games]."""
        return (math.pi * torch.rand(games, dtype=torch.float64, generator=generator),)

    def act(self, carry: tuple[Tensor], obs: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor]]:
        """Own views [games, 18] -> actions [games, 4], or [games, 16] -> [games, 3]."""
        phase = carry[0] + 0.2 * torch.rand(len(obs), dtype=torch.float64, generator=generator)
        actions = [self.bot.aim(view, now) for view, now in zip(obs.numpy(), phase.tolist(), strict=True)]
        return torch.from_numpy(np.array(actions, np.float32)), (phase,)


class AgentCarry(NamedTuple):
    """What an agent in a seat remembers of games."""

    own: Any
    """The agent's carry."""
    action: Tensor
    """Its last actions, [games, A]."""
    held: Tensor
    """For how many more steps they hold, [games]."""
    seen: Tensor
    """Own views that they were chosen for, [games, *O]; of agents that imagine no opponents [games, 0]."""
    others: Tensor
    """What the other player has done since, its share of the mean, [games, A2]; as ``seen``."""


class AgentPlayer:
    """An agent that acts and no longer learns; where it was made to repeat its actions it decides as often as it did in training.

    Its random numbers depend on its seed and on how often it has decided alone.

    Args:
        agent: acts.
        mode: ``eval``, or ``prior`` for its policy without planning, where it has one apart.
        index: another number gives other random numbers.
    """

    def __init__(self, agent: Agent, mode: Mode = "eval", index: int = 0) -> None:
        self.agent = agent
        self.mode: Mode = mode if mode in agent.modes else "eval"
        self.index, self.turns = index, 0

    def init_carry(self, games: int, generator: torch.Generator) -> AgentCarry:
        """Return what it remembers of fresh games."""
        spec, imagines = self.agent.spec, getattr(self.agent, "simulation", None) is not None
        seen = (spec.obs_shape, (spec.other.action_dim,)) if imagines and spec.other is not None else ((0,), (0,))
        held = torch.zeros(games, dtype=torch.int64)
        return AgentCarry(
            self.agent.init_carry(games), torch.zeros(games, spec.action_dim), held, *(torch.zeros(games, *shape) for shape in seen)
        )

    def act(self, carry: AgentCarry, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, AgentCarry]:
        """Own views [games, *O] -> actions [games, A]."""
        own, action = carry.own, carry.action
        due = (carry.held == 0).nonzero().flatten()
        if len(due):
            self.agent.reset_eval_noise(self.index, self.turns)
            self.turns += 1
            output = self.agent.act(tree_rows(own, due), obs[due], self.mode)
            own, action = tree_put(own, due, output.carry), action.index_copy(0, due, output.action.detach().to(action))
        return action, carry._replace(own=own, action=action, held=(carry.held - 1) % self.agent.spec.action_repeat)

    def watch(self, carry: AgentCarry, obs: Tensor, other_action: Tensor) -> AgentCarry:
        """Let an agent that imagines opponents see, after the steps of each of its decisions, what the other player did in their mean."""
        if not carry.seen.shape[1]:
            return carry
        repeat = self.agent.spec.action_repeat
        first = (carry.held == repeat - 1)[:, None]
        seen, others = torch.where(first, obs, carry.seen), torch.where(first, 0.0, carry.others) + other_action / repeat
        due = (carry.held == 0).nonzero().flatten()
        own = tree_put(carry.own, due, self.note(tree_rows(carry.own, due), seen[due], others[due])) if len(due) else carry.own
        return carry._replace(own=own, seen=seen, others=others)

    def note(self, own: Any, obs: Tensor, other_action: Tensor) -> Any:
        """Tell the agent what the other player did in a decision: its carry, own views [n, *O], mean actions [n, A2] -> its carry."""
        agent: Any = self.agent
        return agent.watch_game(own, obs, {"other_action": other_action})

    def state_dict(self) -> dict[str, Any]:
        """Return how often it has decided."""
        return {"turns": self.turns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.turns = int(state["turns"])


class ClonePlayer(_Stateless):
    """A cloned policy (:class:`worldmpc.models.cloning.Clone`) on observations.

    Args:
        clone: reads own views.
        deterministic: act with its expectation instead of a sample.
    """

    def __init__(self, clone: Clone, deterministic: bool = False) -> None:
        self.clone, self.deterministic = clone, deterministic

    def init_carry(self, games: int, generator: torch.Generator) -> tuple[()]:
        """Return nothing."""
        return ()

    @torch.no_grad()
    def act(self, carry: tuple[()], obs: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[()]]:
        """Own views [games, *O] -> actions [games, A]."""
        if self.deterministic:
            return self.clone.mean(obs), carry
        return self.clone.sample(obs, torch.rand(len(obs), self.clone.action_dim, generator=generator)), carry
