"""What an agent that is used by hand remembers, and checks of what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmpc.data.transforms import shape_windows
from worldmpc.functional import tree_fill, tree_map, tree_tensors
from worldmpc.noise import NoiseStream
from worldmpc.opponents.pool import bonus_schedules
from worldmpc.types import Transition


class ByHand:
    """Transitions of some environments, and what is remembered of the episode under way in each.

    Windows drawn of them are shaped by who won, and mirrored, as configured.

    Args:
        agent: has ``config``, ``spec`` and ``make_source``.
        num_envs: environments.
    """

    def __init__(self, agent: Any, num_envs: int) -> None:
        generator = NoiseStream(agent.config.seed, "replay").generator
        self.spec, self.num_envs, self.games = agent.spec, num_envs, 0
        self.source = agent.make_source(num_envs, generator)
        self.carries: dict[int, Any] = {}
        self.seen: Tensor | None = None
        """Own views that were last acted on, [n, O]."""
        bonus, discount = bonus_schedules(agent.config.opponents)
        wins = None if self.spec.other is None else lambda: (bonus.at(self.games), discount.at(self.games))
        shape_windows(self.source, self.spec, agent.config, generator, wins, bool(bonus.start or bonus.final))

    def store(self, transition: Sequence[Any], winner: int | None, env_id: int, truncated: bool, opponent: int, whole: bool) -> bool:
        """Store a transition of one environment, and return whether its episode ends with it.

        Args:
            transition: state, action, reward, next state and whether it terminated; of a game perhaps the other's view and action.
            winner: of a game: 1, 0, -1, or None.
            env_id: which environment.
            truncated: the episode was cut.
            opponent: number of the other player.
            whole: the other's view and action must be there.

        Raises:
            ValueError: another number of entries, of another size or not finite, no such winner or no such environment.
        """
        needed = (7,) if whole else (5,) if self.spec.other is None else (5, 7)
        if len(transition) not in needed or not 0 <= env_id < self.num_envs:
            raise ValueError(
                f"store_transition: expected (state, action, reward, next_state, done), of games with the other's view and action"
                f"{', which imagined opponents need' * whole}, and env_id below {self.num_envs}; "
                f"got {len(transition)} entries and env_id {env_id}"
            )
        if winner not in (None, 1, 0, -1):
            raise ValueError(f"store_transition: winner: expected 1, 0, -1 or None, got {winner!r}")
        shapes = {"state": self.spec.obs_shape, "action": (self.spec.action_dim,), "reward": (), "next_state": self.spec.obs_shape}
        given = zip(shapes.items(), transition, strict=False)
        obs, action, reward, next_obs = (self._of_all(value, shape, name) for (name, shape), value in given)
        extras = {} if self.spec.other is None else self._of_the_other(transition[5:], winner, opponent)
        done = bool(transition[4])
        cut = truncated or (winner is not None and not done)
        valid = torch.arange(self.num_envs) == env_id
        ends = [valid & torch.tensor(flag) for flag in (done, cut)]
        self.source.observe(Transition(obs, action, reward, ends[0], ends[1], next_obs, valid, extras))
        self.games += done or cut
        return done or cut

    def _of_the_other(self, given: Sequence[Any], winner: int | None, opponent: int) -> dict[str, Tensor]:
        """Return what the replay of a game keeps beside a transition; zeros where nobody said what the other player saw and did."""
        other = self.spec.other
        assert other is not None
        shapes = {"other_obs": other.obs_shape, "other_action": (other.action_dim,)}
        values = given or [np.zeros(shape, np.float32) for shape in shapes.values()]
        known = {name: self._of_all(value, shape, name) for (name, shape), value in zip(shapes.items(), values, strict=True)}
        numbers = {"opponent": float(opponent), "winner": float("nan") if winner is None else float(winner)}
        return known | {name: torch.full((self.num_envs,), value) for name, value in numbers.items()}

    def _of_all(self, value: Any, shape: Sequence[int], name: str) -> Tensor:
        """Repeat what belongs to one environment for all, of which only that one counts."""
        return row_of(value, shape, f"store_transition: {name}").expand(self.num_envs, *shape)


def rows_of(value: Any, shape: Sequence[int], what: str) -> Tensor:
    """Return numbers as rows, [n, *shape] float32; of one row alone the ``n`` may be left out.

    Raises:
        ValueError: another shape, no row at all, or a number that is not finite.
    """
    rows = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value), dtype=torch.float32)
    rows = rows[None] if rows.dim() == len(shape) else rows
    if rows.shape[1:] != tuple(shape) or not len(rows):
        raise ValueError(f"{what}: expected [n, {', '.join(map(str, shape))}] numbers, got {list(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{what}: expected finite numbers, got {int((~torch.isfinite(rows)).sum())} of {rows.numel()} that are not")
    return rows


def row_of(value: Any, shape: Sequence[int], what: str) -> Tensor:
    """Return numbers of exactly one row, [*shape]; errors are those of :func:`rows_of`."""
    rows = rows_of(value, shape, what)
    if len(rows) != 1:
        raise ValueError(f"{what}: expected [{', '.join(map(str, shape))}] numbers, got {list(rows.shape)}")
    return rows[0]


def stack_carries(carries: Sequence[Any]) -> Any:
    """Return carries of one episode each as one, [1, ...] each -> [n, ...]."""
    columns = zip(*(tree_tensors(carry) for carry in carries), strict=True)
    places = tree_map(lambda tensor: tensor.expand(len(carries), *tensor.shape[1:]), carries[0])
    return tree_fill(places, [torch.cat(column) for column in columns])
