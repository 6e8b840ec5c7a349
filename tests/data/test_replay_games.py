"""Who has won, and how many steps are left, for every step of a replay: against a loop over the games."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trees import differences
from worldmpc.config import make_config
from worldmpc.data import Replay
from worldmpc.data.replay import joint_records, make_replay
from worldmpc.types import EnvSpec, Seat, Transition

LABELS: dict[str, tuple[int, ...]] = {"winner": (), "left": ()}


class Games:
    """Streams of games, and what should be known of every step: serial number -> (winner, left), NaN before the end."""

    def __init__(self, replay: Replay, seed: int, longest: int, invalid: float = 0.0) -> None:
        self.replay, self.generator, self.longest, self.invalid = replay, torch.Generator().manual_seed(seed), longest, invalid
        envs = replay.num_envs
        self.truth: dict[float, tuple[float, float]] = {}
        self.running: list[list[float]] = [[] for _ in range(envs)]
        self.serial = 0.0
        self.rest = [self.length() for _ in range(envs)]

    def length(self) -> int:
        return 1 + int(torch.randint(self.longest, (), generator=self.generator))

    def step(self) -> None:
        envs = self.replay.num_envs
        valid = torch.rand(envs, generator=self.generator) >= self.invalid
        numbers, over, winner = torch.zeros(envs), torch.zeros(envs, dtype=torch.bool), torch.full((envs,), math.nan)
        for env in range(envs):
            self.serial += 1
            numbers[env] = self.serial
            if not valid[env]:
                continue
            self.running[env].append(self.serial)
            self.truth[self.serial] = math.nan, math.nan
            self.rest[env] -= 1
            if self.rest[env] == 0:
                over[env], winner[env] = True, float(torch.randint(3, (), generator=self.generator)) - 1
                for left, serial in enumerate(reversed(self.running[env])):
                    self.truth[serial] = winner[env].item(), left
                self.running[env], self.rest[env] = [], self.length()
        draw = over & (winner == 0)
        self.replay.add(
            Transition(
                numbers[:, None], torch.zeros(envs, 1), numbers, over & ~draw, draw, numbers[:, None] + 0.5, valid, {"winner": winner}
            )
        )

    def cut(self) -> None:
        self.replay.cut()
        self.running = [[] for _ in self.running]

    def check(self) -> None:
        stored = self.replay.transitions(0.9)
        for number, *labels in zip(stored.reward.tolist(), stored.extras["winner"].tolist(), stored.extras["left"].tolist(), strict=True):
            assert labels == pytest.approx(list(self.truth[number]), nan_ok=True), number
        count = self.replay.num_windows()
        if count:
            batch = self.replay.sample((torch.arange(count, dtype=torch.float64) + 0.5) / count)
            padding = batch.mask == 0
            for name in ("winner", "left"):
                assert (batch.extras[name][padding] == 0).all(), name
                for number, label in zip(batch.reward[~padding].tolist(), batch.extras[name][~padding].tolist(), strict=True):
                    assert label == pytest.approx(self.truth[number][name == "left"], nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(4, 12), st.sampled_from((1, 3, 8, 30)), st.sampled_from((0.0, 0.3)))
def test_labels_equal_those_of_a_loop_also_round_the_ring(seed: int, envs: int, share: int, longest: int, invalid: float) -> None:
    """Games that are longer than the ring among them."""
    replay = Replay(envs * share, envs, (1,), 1, 3, extras=LABELS)
    games = Games(replay, seed, longest, invalid)
    for _ in range(4 * share):
        games.step()
        games.check()


@pytest.mark.parametrize("length", [4, 5, 6, 7, 13])
def test_a_game_as_long_as_the_ring_leaves_the_row_behind_it_alone(length: int) -> None:
    replay = Replay(5, 1, (1,), 1, 3, extras=LABELS)
    games = Games(replay, 0, 1)
    games.rest = [length]
    for _ in range(length):
        games.step()
    games.check()
    assert sorted(replay.transitions(1.0).extras["left"].tolist()) == list(range(min(length, 5)))


def test_games_that_were_cut_are_nobodys() -> None:
    replay = Replay(60, 2, (1,), 1, 3, extras=LABELS)
    games = Games(replay, 3, 9)
    for number in range(24):
        games.step()
        if number % 5 == 4:
            games.cut()
        games.check()
    winners = replay.transitions(1.0).extras["winner"]
    assert winners.isnan().sum() > 5 and (winners == 1).any()


def test_labels_are_saved_and_restored_and_go_on() -> None:
    replay, other = (Replay(30, 2, (1,), 1, 3, extras=LABELS) for _ in range(2))
    games = Games(replay, 4, 7)
    for _ in range(40):
        games.step()
    other.load_state_dict(replay.state_dict())
    for _ in range(20):
        games.replay = replay
        state, rest, running, serial = games.generator.get_state(), list(games.rest), [list(own) for own in games.running], games.serial
        games.step()
        games.generator.set_state(state)
        games.rest, games.running, games.serial, games.replay = rest, running, serial, other
        games.step()
        games.check()
    assert differences(replay.state_dict(), other.state_dict()) == []


def test_a_cleared_replay_knows_of_new_games_alone() -> None:
    replay = Replay(40, 2, (1,), 1, 3, extras=LABELS)
    games = Games(replay, 6, 6)
    for _ in range(13):
        games.step()
    replay.clear()
    assert len(replay) == 0 and replay.num_windows() == 0
    games.running = [[] for _ in games.running]
    for _ in range(60):
        games.step()
        games.check()


def test_who_won_may_be_left_out() -> None:
    replay = Replay(10, 1, (1,), 1, 2, extras=LABELS)
    one = torch.ones(1)
    replay.add(Transition(one[:, None], one[:, None], one, one > 0, one < 0, one[:, None], one > 0))
    labels = replay.transitions(1.0).extras
    assert labels["winner"].isnan().all() and labels["left"].tolist() == [0]


def test_replays_of_games_keep_what_the_other_did() -> None:
    plain = EnvSpec("duel_v0", (3,), 2, 6)
    game = EnvSpec("duel_v0", (3,), 2, 6, other=Seat((5,), 4))
    assert joint_records(plain) == {}
    expected: dict[str, Any] = {"other_obs": (5,), "other_action": (4,), "opponent": (), "winner": (), "left": ()}
    assert joint_records(game) == expected
    made = make_replay(make_config("debug", task="hockey"), game, 1, 3, device=torch.device("cpu"), extras={"more": (2,)})
    assert made.extras == {**expected, "more": (2,)}
