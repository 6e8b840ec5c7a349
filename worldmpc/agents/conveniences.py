"""Methods for whoever steps environments by hand: single observations, stored transitions, a table of the networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from worldmpc.agents.by_hand import ByHand, rows_of, stack_carries
from worldmpc.functional import parameter_table, tree_rows
from worldmpc.types import ActOutput, EnvSpec, Metrics, Mode


class Conveniences:
    """Methods of an agent with ``init_carry``, ``act``, ``update`` and ``make_source``.

    Games and episodes are told apart by ``env_id``; what is remembered of one begins anew with ``t0=True``, or after a transition that
    ended it.
    """

    config: Any
    spec: EnvSpec
    device: torch.device
    model: Any
    init_carry: Any
    act: Any
    update: Any
    make_source: Any
    simulation: Any
    _note: Any
    _hand: ByHand | None = None
    num_hand_envs: int = 1
    """Environments that transitions are stored of; set it before the first use."""

    def act_batch(
        self, states: Any, deterministic: bool = False, t0s: Sequence[bool] | None = None, env_ids: Sequence[int] | None = None
    ) -> np.ndarray:
        """Choose actions for observations of several environments: [n, O] -> [n, A]; ``t0s`` [n]: a new episode begins.

        Raises:
            ValueError: observations of another size, flags or environments of another number, or one environment twice.
        """
        return self._answer(states, deterministic, t0s, env_ids).action.cpu().numpy()

    def act_with_stats(
        self, state: Any, deterministic: bool = False, t0: bool = False, env_id: int = 0
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Choose an action for one observation: [O] -> [A], and what the plan says about it, name -> number."""
        output = self._answer(np.asarray(state)[None], deterministic, [t0], [env_id])
        stats = {name: float(value) for name, value in output.metrics.items()}
        stats |= {name: float(value[0]) for name, value in output.extras.items() if value.dim() == 1}
        return output.action[0].cpu().numpy(), stats

    def store_transition(
        self, transition: Sequence[Any], winner: int | None = None, env_id: int = 0, truncated: bool = False, opponent: int = 0
    ) -> None:
        """Store ``(state, action, reward, next_state, done)`` of one environment, and of a game what is known of its other player.

        An agent that imagines opponents takes note of what the other player did, as with :meth:`observe_opponent`.

        Args:
            transition: [O], [A], number, [O], flag: the episode terminated. Of a game the other's view [O2] and action [A2] may follow,
                and must where opponents are imagined.
            winner: of a game that ends with this step: 1, -1, or 0 for a draw; None: it goes on, or nobody knows.
            env_id: which environment, below ``num_hand_envs``.
            truncated: the episode was cut, as by a time limit; a draw ends a game as well.
            opponent: a number of your own for whoever plays, which the replay keeps.

        Raises:
            ValueError: another number of entries, of another size or not finite, no such winner or no such environment.
        """
        ended = self._by_hand().store(transition, winner, env_id, bool(truncated), opponent, self.simulation is not None)
        if ended:
            self._forget(env_id)
        elif self.simulation is not None:
            self._note(env_id, transition[0], transition[6], "store_transition")

    def train(self, steps: int = 1) -> list[Metrics]:
        """Do up to ``steps`` updates on stored transitions, and return their metrics; none while there are too few."""
        source = self._by_hand().source
        return [self.update(source.next()) for _ in range(steps) if source.replay.num_windows()]

    def evaluate(self, state: Any, t0: bool = False, env_id: int = 0) -> np.ndarray:
        """Choose an action for one observation without exploring: [O] -> [A]."""
        return self.act_with_stats(state, deterministic=True, t0=t0, env_id=env_id)[0]

    def on_episode_start(self, episode: int, env_id: int = 0) -> None:
        """Forget what was remembered of an environment's former episode."""
        self._forget(env_id)

    def on_episode_end(self, episode: int, env_id: int = 0) -> None:
        """Forget what was remembered of the episode."""
        self._forget(env_id)

    def log_architecture(self) -> str:
        """Return a table of the networks and their parameters, one line each."""
        rows = parameter_table(self.model)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {count:>12,}" for name, count in rows)

    def _by_hand(self) -> ByHand:
        if self._hand is None:
            self._hand = ByHand(self, self.num_hand_envs)
        return self._hand

    def _forget(self, env_id: int) -> None:
        self._by_hand().carries.pop(env_id, None)
        if self.simulation is not None:
            self.simulation.begin_game(env_id)

    def _answer(self, states: Any, deterministic: bool, t0s: Sequence[bool] | None, env_ids: Sequence[int] | None) -> ActOutput:
        """Act for each environment with what is remembered of it."""
        obs = rows_of(states, self.spec.obs_shape, "states")
        ids = list(range(len(obs))) if env_ids is None else list(env_ids)
        begins = [False] * len(obs) if t0s is None else list(t0s)
        if len(set(ids)) != len(obs) or len(ids) != len(obs) or len(begins) != len(obs):
            raise ValueError(f"env_ids, t0s: expected {len(obs)} of each, all environments different, got {ids} and {begins}")
        hand = self._by_hand()
        for env_id, begin in zip(ids, begins, strict=True):
            if begin:
                self._forget(env_id)
            if env_id not in hand.carries:
                hand.carries[env_id] = self.init_carry(1)
        mode: Mode = "eval" if deterministic else "explore"
        output = self.act(stack_carries([hand.carries[env_id] for env_id in ids]), obs, mode)
        hand.seen = obs
        for row, env_id in enumerate(ids):
            hand.carries[env_id] = tree_rows(output.carry, torch.tensor([row]))
        return output
