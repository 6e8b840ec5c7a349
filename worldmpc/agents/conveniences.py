"""Methods for whoever steps environments by hand: single observations, stored transitions, a table of the networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmpc.data.source import ReplaySource
from worldmpc.functional import parameter_table, tree_fill, tree_map, tree_rows, tree_tensors
from worldmpc.noise import NoiseStream
from worldmpc.types import ActOutput, EnvSpec, Metrics, Mode, Transition


class _ByHand(NamedTuple):
    """What an agent that is used by hand remembers."""

    source: ReplaySource
    carries: dict[int, Any]


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
    _hand: _ByHand | None = None
    num_hand_envs: int = 1
    """Environments that transitions are stored of; set it before the first one."""

    def act_batch(
        self, states: Any, deterministic: bool = False, t0s: Sequence[bool] | None = None, env_ids: Sequence[int] | None = None
    ) -> np.ndarray:
        """Choose actions for observations of several environments: [n, O] -> [n, A]; ``t0s`` [n]: a new episode begins."""
        return self._answer(states, deterministic, t0s, env_ids).action.cpu().numpy()

    def act_with_stats(
        self, state: Any, deterministic: bool = False, t0: bool = False, env_id: int = 0
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Choose an action for one observation: [O] -> [A], and what the plan says about it, name -> number."""
        output = self._answer(np.asarray(state)[None], deterministic, [t0], [env_id])
        stats = {name: float(value) for name, value in output.metrics.items()}
        stats |= {name: float(value[0]) for name, value in output.extras.items() if value.dim() == 1}
        return output.action[0].cpu().numpy(), stats

    def store_transition(self, transition: Sequence[Any], winner: int | None = None, env_id: int = 0, truncated: bool = False) -> None:
        """Store ``(state, action, reward, next_state, done)`` of one environment, and of a game what is known of its other player.

        Args:
            transition: [O], [A], number, [O], flag: the episode terminated. Of a game the other's view [O2] and action [A2] may follow.
            winner: of a game that ends with this step: 1, -1, or 0 for a draw.
            env_id: which environment, below ``num_hand_envs``.
            truncated: the episode was cut, as by a time limit; a draw ends a game as well.

        Raises:
            ValueError: another number of entries, or no such environment.
        """
        if len(transition) not in (5, 7) or not 0 <= env_id < self.num_hand_envs:
            raise ValueError(
                f"store_transition: expected (state, action, reward, next_state, done), of games with the other's view and action, and "
                f"env_id below {self.num_hand_envs}; got {len(transition)} entries and env_id {env_id}"
            )
        state, action, reward, next_state, done, *others = transition
        valid = torch.arange(self.num_hand_envs) == env_id
        cut = valid & torch.tensor(bool(truncated) or (winner is not None and not done))
        extras: dict[str, Tensor] = {}
        if self.spec.other is not None:
            shapes = (*self.spec.other.obs_shape,), (self.spec.other.action_dim,)
            given = others or [np.zeros(shape, np.float32) for shape in shapes]
            extras = dict(zip(("other_obs", "other_action"), map(self._everywhere, given), strict=True))
            extras |= {"opponent": torch.zeros(self.num_hand_envs), "winner": torch.full((self.num_hand_envs,), float(winner or 0))}
        obs, taken, gained, following = (self._everywhere(part) for part in (state, action, reward, next_state))
        ended = valid & torch.tensor(bool(done))
        self._by_hand().source.observe(Transition(obs, taken, gained, ended, cut, following, valid, extras))
        if bool(done) or bool(cut.any()):
            self._by_hand().carries.pop(env_id, None)

    def train(self, steps: int = 1) -> list[Metrics]:
        """Do up to ``steps`` updates on stored transitions, and return their metrics; none while there are too few."""
        source = self._by_hand().source
        return [self.update(source.next()) for _ in range(steps) if source.replay.num_windows()]

    def evaluate(self, state: Any, t0: bool = False, env_id: int = 0) -> np.ndarray:
        """Choose an action for one observation without exploring: [O] -> [A]."""
        return self.act_with_stats(state, deterministic=True, t0=t0, env_id=env_id)[0]

    def on_episode_start(self, episode: int, env_id: int = 0) -> None:
        """Forget what was remembered of an environment's former episode."""
        self._by_hand().carries.pop(env_id, None)

    def on_episode_end(self, episode: int, env_id: int = 0) -> None:
        """Forget what was remembered of the episode."""
        self._by_hand().carries.pop(env_id, None)

    def log_architecture(self) -> str:
        """Return a table of the networks and their parameters, one line each."""
        rows = parameter_table(self.model)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {count:>12,}" for name, count in rows)

    def _by_hand(self) -> _ByHand:
        if self._hand is None:
            self._hand = _ByHand(self.make_source(self.num_hand_envs, NoiseStream(self.config.seed, "replay").generator), {})
        return self._hand

    def _answer(self, states: Any, deterministic: bool, t0s: Sequence[bool] | None, env_ids: Sequence[int] | None) -> ActOutput:
        """Act for each environment with what is remembered of it."""
        obs = torch.as_tensor(np.asarray(states), dtype=torch.float32)
        ids = list(range(len(obs))) if env_ids is None else list(env_ids)
        begins = [False] * len(obs) if t0s is None else list(t0s)
        carries = self._by_hand().carries
        for env_id, begin in zip(ids, begins, strict=True):
            if begin or env_id not in carries:
                carries[env_id] = self.init_carry(1)
        mode: Mode = "eval" if deterministic else "explore"
        output = self.act(stack_carries([carries[env_id] for env_id in ids]), obs, mode)
        for row, env_id in enumerate(ids):
            carries[env_id] = tree_rows(output.carry, torch.tensor([row]))
        return output

    def _everywhere(self, value: Any) -> Tensor:
        """Repeat what belongs to one environment for all, of which only that one counts."""
        tensor = torch.as_tensor(np.asarray(value), dtype=torch.float32)
        return tensor.expand(self.num_hand_envs, *tensor.shape)


def stack_carries(carries: Sequence[Any]) -> Any:
    """Return carries of one episode each as one, [1, ...] each -> [n, ...]."""
    columns = zip(*(tree_tensors(carry) for carry in carries), strict=True)
    places = tree_map(lambda tensor: tensor.expand(len(carries), *tensor.shape[1:]), carries[0])
    return tree_fill(places, [torch.cat(column) for column in columns])
