"""What is made of windows before they are learned from: rewards of won games, mirrored worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worldmpc.data import Replay
from worldmpc.data.shaping import reflect, shape_wins
from worldmpc.envs.hockey.env import HockeyParallelEnv
from worldmpc.envs.hockey.game import mirror_of
from worldmpc.envs.hockey.rink import RinkState
from worldmpc.types import Mirror, SequenceBatch, Transition

RUNNING = math.nan


def stored(lengths: list[int], outcomes: list[float], horizon: int, capacity: int = 200) -> tuple[Replay, list[tuple[int, float, int]]]:
    """A replay of games one after the other (NaN: still under way), whose rewards are their steps' numbers; and (game, outcome, left)."""
    replay = Replay(capacity, 1, (1,), 1, horizon, extras={"winner": (), "left": ()})
    facts, number = [], 0
    for game, (length, outcome) in enumerate(zip(lengths, outcomes, strict=True)):
        for step in range(length):
            over = step == length - 1 and not math.isnan(outcome)
            replay.add(
                Transition(
                    obs=torch.full((1, 1), float(number)),
                    action=torch.zeros(1, 1),
                    reward=torch.full((1,), float(number)),
                    terminated=torch.tensor([over and outcome != 0]),
                    truncated=torch.tensor([over and outcome == 0]),
                    next_obs=torch.full((1, 1), number + 0.5 if over else number + 1.0),
                    valid=torch.ones(1, dtype=torch.bool),
                    extras={"winner": torch.tensor([outcome if over else math.nan])},
                )
            )
            facts.append((game, outcome, length - 1 - step))
            number += 1
    return replay, facts


def every(replay: Replay) -> SequenceBatch:
    count = replay.num_windows()
    return replay.sample((torch.arange(count, dtype=torch.float64) + 0.5) / count)


@pytest.mark.parametrize(("bonus", "discount"), [(10.0, 0.92), (1.5, 1.0), (4.0, 0.0), (-2.0, 0.5)])
def test_won_games_are_shaped_as_a_loop_over_them_would(bonus: float, discount: float) -> None:
    replay, facts = stored([5, 4, 1, 3, 7, 6], [1, -1, 1, 0, 1, RUNNING], horizon=4)
    before = every(replay)
    batch = shape_wins(before, bonus, discount)
    seen = set()
    for column, row in np.ndindex(batch.reward.shape[1], batch.reward.shape[0]):
        number = before.reward[row, column].item()
        if not before.mask[row, column]:
            assert batch.reward[row, column] == 0  # padding
            continue
        seen.add(number)
        _, outcome, left = facts[int(number)]
        expected = number
        if outcome == 1 and left >= 1:
            expected += bonus * math.prod([discount] * (left - 1))
        assert batch.reward[row, column].item() == pytest.approx(expected, rel=1e-6)
    assert len(seen) == len(facts) and all(getattr(batch, name) is getattr(before, name) for name in ("obs", "action", "mask", "extras"))
    assert torch.equal(every(replay).reward, before.reward)  # what is stored stays


def test_without_a_bonus_nothing_changes() -> None:
    batch = every(stored([3], [1], horizon=2)[0])
    assert shape_wins(batch, 0.0, 0.92) is batch


def batch_of(extras: dict[str, tuple[int, ...]]) -> SequenceBatch:
    length, rows = 3, 6
    return SequenceBatch(
        obs=torch.randn(length + 1, rows, 4),
        action=torch.randn(length, rows, 3),
        reward=torch.randn(length, rows),
        terminated=torch.zeros(length, rows),
        truncated=torch.zeros(length, rows),
        mask=torch.ones(length, rows),
        index=torch.arange(length * rows).view(length, rows),
        extras={name: torch.randn(length, rows, *shape) for name, shape in extras.items()},
    )


MIRROR = Mirror((1, -1, 1, -1), (-1, 1, 1), (0, 2, 1))
EXTRAS = {"plan_mean": (3,), "plan_std": (3,), "plan_value": (), "other_obs": (4,), "other_action": (3,), "winner": (), "left": ()}


def test_some_windows_are_mirrored_and_others_not() -> None:
    batch, flip = batch_of(EXTRAS), torch.tensor([True, False, True, True, False, False])
    found = reflect(batch, MIRROR, flip)
    for column in range(6):
        for name in ("obs", "other_obs"):
            one, two = (part.obs if name == "obs" else part.extras[name] for part in (batch, found))
            signs = torch.tensor([1.0, -1, 1, -1]) if flip[column] else torch.ones(4)
            assert torch.equal(two[:, column], one[:, column] * signs)
        for name in ("action", "plan_mean", "plan_std", "other_action"):
            one, two = (part.action if name == "action" else part.extras[name] for part in (batch, found))
            expected = one[:, column]
            if flip[column]:
                sign = 1.0 if name == "plan_std" else -1.0
                expected = torch.stack([expected[:, 0] * sign, expected[:, 2], expected[:, 1]], -1)
            assert torch.equal(two[:, column], expected), name
    for name in ("plan_value", "winner", "left"):
        assert found.extras[name] is batch.extras[name]
    assert found.reward is batch.reward and found.index is batch.index


@pytest.mark.parametrize("keep_mode", [True, False])
@pytest.mark.parametrize("discrete", [True, False])
def test_a_mirrored_mirror_world_is_the_world(keep_mode: bool, discrete: bool) -> None:
    mirror = mirror_of(keep_mode, discrete)
    batch = batch_of({})._replace(obs=torch.randn(4, 6, len(mirror.obs_signs)), action=torch.randn(3, 6, len(mirror.action_signs)))
    once = reflect(batch, mirror, torch.ones(6, dtype=torch.bool))
    twice = reflect(once, mirror, torch.ones(6, dtype=torch.bool))
    assert torch.equal(twice.obs, batch.obs) and torch.equal(twice.action, batch.action) and not torch.equal(once.action, batch.action)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("keep_mode", [True, False])
def test_the_mirrored_game_goes_as_the_mirror_says(keep_mode: bool, discrete: bool) -> None:
    """What both players of a mirrored game see and get is the mirror image of the game, over a few steps of contact."""
    one, two = (HockeyParallelEnv(keep_mode=keep_mode, discrete=discrete) for _ in range(2))
    mirror, rng = mirror_of(keep_mode, discrete), np.random.default_rng(1)
    signs = np.array(mirror.obs_signs, np.float32)
    for trial in range(4):
        for env in (one, two):
            env.reset(seed=trial)
        state = one.game.state
        put = state._replace(puck=(state.player1[0] + 0.6, 0.15, -3.0, 1.0, 0.0))
        turned = RinkState(
            *(_turned(body) for body in (put.player1, put.player2)), (put.puck[0], -put.puck[1], put.puck[2], -put.puck[3], 0.0), put.held
        )
        one.game.place(put)
        two.game.place(turned)
        for _ in range(8):
            if discrete:
                vectors = np.eye(len(mirror.action_order), dtype=np.float32)[rng.integers(len(mirror.action_order), size=2)]
            else:
                vectors = rng.uniform(-1, 1, (2, len(mirror.action_order))).astype(np.float32)
            images = vectors[:, list(mirror.action_order)] * np.array(mirror.action_signs, np.float32)
            plain, image = ({f"player_{k + 1}": _action(v[k], discrete) for k in range(2)} for v in (vectors, images))
            (obs, reward, *_), (seen, paid, *_) = one.step(plain), two.step(image)
            for player in ("player_1", "player_2"):
                np.testing.assert_allclose(seen[player], obs[player] * signs, atol=2e-3)
                assert paid[player] == pytest.approx(reward[player], abs=1e-4)


def _turned(body: tuple[float, ...]) -> tuple[float, ...]:
    x, y, angle, vx, vy, spin = body
    return x, -y, -angle, vx, -vy, -spin


def _action(vector: np.ndarray, discrete: bool) -> object:
    return int(vector.argmax()) if discrete else vector
