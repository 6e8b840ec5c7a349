"""Who plays next: mixtures, phases, prioritised choice, snapshots; and that a saved pool goes on alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.opponents.people import Counting, Learner, copied
from worldmpc.config import ConfigError
from worldmpc.opponents.pool import LEAST_WEIGHT, RATE, SELF_PLAY, Entry, Phase, Pool, Schedule


def pool_of(*phases: Phase, seed: int = 1, **arguments: Any) -> Pool:
    names = {entry.name for phase in phases for entry in phase.entries} - {SELF_PLAY}
    players = {name: Counting() for name in sorted(names)}
    return Pool(phases, players, torch.Generator().manual_seed(seed), copied, **arguments)


def entries(**weights: float) -> tuple[Entry, ...]:
    return tuple(Entry(name, weight) for name, weight in weights.items())


def choices(pool: Pool, count: int) -> Counter[str]:
    return Counter(pool.next_game(0).opponent for _ in range(count))


def test_a_mixture_is_drawn_by_its_weights() -> None:
    found = choices(pool_of(Phase("all", entries(a=0.2, b=0.5, c=0.3, d=0.0))), 4000)
    assert found["d"] == 0
    for name, weight in (("a", 0.2), ("b", 0.5), ("c", 0.3)):
        assert found[name] / 4000 == pytest.approx(weight, abs=4 * (0.25 / 4000) ** 0.5)


def test_running_scores_and_records() -> None:
    pool = pool_of(Phase("all", entries(a=1.0)))
    for winner in (1, 1, 0, -1):
        pool.report(0, "a", winner)
    score = 0.5
    for point in (1.0, 1.0, 0.5, 0.0):
        score += RATE * (point - score)
    assert pool.scores["a"] == pytest.approx(score) and pool.games["a"] == [2, 1, 1]


def test_prioritised_choice_is_by_weight_times_openness() -> None:
    pool = pool_of(Phase("all", entries(a=1.0, b=2.0, c=1.0, d=1.0), choose="pfsp"))
    pool.scores = {"a": 0.9, "b": 0.3, "c": 1.0}
    expected = {"a": 0.9 * 0.1, "b": 2 * 0.3 * 0.7, "c": LEAST_WEIGHT, "d": 0.5 * 0.5}
    found, total = choices(pool, 6000), sum(expected.values())
    for name, weight in expected.items():
        assert found[name] / 6000 == pytest.approx(weight / total, abs=0.025), name
    assert found["c"] > 0


def test_snapshots_share_the_weight_of_self_play() -> None:
    pool = pool_of(Phase("all", entries(a=0.5, self_play=0.5)), snapshot_every=10)
    for decisions in (0, 10, 20):
        pool.follow(Learner(), decisions)
    found = choices(pool, 4000)
    assert found["a"] / 4000 == pytest.approx(0.5, abs=0.04)
    assert all(found[f"snapshot-{decisions:09d}"] / 4000 == pytest.approx(0.5 / 3, abs=0.03) for decisions in (0, 10, 20))
    pool = pool_of(Phase("all", entries(a=0.5, self_play=0.5), choose="pfsp"), snapshot_every=10)
    for decisions in (0, 10):
        pool.follow(Learner(), decisions)
    pool.scores = {"snapshot-000000000": 0.9}
    found, total = choices(pool, 4000), 0.5 * 0.25 + 0.25 * 0.25 + 0.25 * 0.09
    assert found["snapshot-000000000"] / 4000 == pytest.approx(0.25 * 0.09 / total, abs=0.03)
    assert found["a"] / 4000 == pytest.approx(0.5 * 0.25 / total, abs=0.04)


def test_phases_change_at_their_games() -> None:
    bonus = Schedule(10.0, 1.0, hold=1, anneal=2)
    phases = (
        Phase("one", entries(a=1.0), 3, win_bonus=bonus, shaping={"near": Schedule(4.0, 0.0, 0, 2)}),
        Phase("two", entries(b=1.0), 1, modes=(({"mode": "X"}, 1.0),), clear_replay=True),
        Phase("three", entries(c=1.0), 5),
    )
    pool = pool_of(*phases)
    assert pool.phase.name == "one" and not pool.games_in_phase and pool.win_bonus == (10.0, 0.92)
    seen = []
    for _ in range(12):
        game = pool.next_game(0)
        seen.append((game.opponent, pool.phase.name, pool.games_in_phase, pool.win_bonus[0], pool.clears_replay))
        pool.clears_replay = False
        options = dict(game.options or {})
        options.pop("seat")
        expected = {0: {"shaping": {"near": 4.0}}, 1: {"shaping": {"near": 2.0}}, 2: {"shaping": {"near": 0.0}}, 3: {"mode": "X"}}
        assert options == expected.get(len(seen) - 1, {})
    assert seen == [
        ("a", "one", 0, 10.0, False),
        ("a", "one", 1, 10.0, False),
        ("a", "one", 2, 5.5, False),
        ("b", "two", 0, 0.0, True),
        *(("c", "three", number, 0.0, False) for number in range(8)),  # the last one goes on
    ]


def test_schedules() -> None:
    schedule = Schedule(10.0, 2.0, hold=3, anneal=4)
    assert [schedule.at(games) for games in (0, 2, 3, 5, 7, 100)] == [10, 10, 10, 6, 2, 2]
    assert Schedule(10.0, 2.0).at(0) == 2.0 and Schedule(10.0, 2.0, hold=1).at(0) == 10.0


def test_modes_are_drawn_for_every_game() -> None:
    modes = (({"mode": "A"}, 0.25), ({"mode": "B"}, 0.75))
    pool = pool_of(Phase("all", entries(a=1.0), modes=modes))
    found = Counter((pool.next_game(0).options or {})["mode"] for _ in range(2000))
    assert found["A"] / 2000 == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("envs", [1, 2, 3, 4])
def test_both_seats_are_taken_alike(envs: int) -> None:
    """Also where all games are as long as each other, so that environments always take turns."""
    pool = pool_of(Phase("all", entries(a=1.0)))
    seats = [(pool.next_game(game % envs).options or {})["seat"] for game in range(24)]
    assert Counter(seats) == {1: 12, 2: 12}
    pool.changes_seats = False
    assert (pool.next_game(0).options or {})["seat"] == 1


def test_snapshots_come_in_time_and_the_oldest_give_way() -> None:
    pool = pool_of(Phase("all", entries(self_play=1.0)), snapshot_every=100, snapshots=2)
    learner = Learner()
    with pytest.raises(ConfigError, match="self_play needs a snapshot of the learner first"):
        pool.next_game(0)
    for decisions in range(0, 460, 30):
        learner.be(float(decisions))
        pool.follow(learner, decisions)
    assert list(pool.players) == [f"snapshot-{decisions:09d}" for decisions in (0, 120, 210, 300, 420)]
    assert pool.snapshots == ["snapshot-000000300", "snapshot-000000420"]
    held = {name: player.agent.value for name, player in pool.players.items() if hasattr(player, "agent")}
    assert held == {"snapshot-000000300": 300.0, "snapshot-000000420": 420.0}  # the memory of others is free
    assert set(choices(pool, 100)) == set(pool.snapshots)


def test_a_snapshot_that_gave_way_finishes_its_games() -> None:
    pool = pool_of(Phase("all", entries(self_play=1.0)), snapshot_every=1, snapshots=1)
    pool.follow(Learner(0.5), 0)
    first = pool.next_game(0).opponent
    pool.follow(Learner(0.6), 1)
    second = pool.next_game(1).opponent
    assert (first, second) == ("snapshot-000000000", "snapshot-000000001")
    restored = pool_of(Phase("all", entries(self_play=1.0)), snapshot_every=1, snapshots=1)
    restored.load_state_dict(pool.state_dict(), Learner())
    for one in (pool, restored):
        assert one.players[first].agent.value == 0.5 and one.players[second].agent.value == pytest.approx(0.6)  # type: ignore[attr-defined]
        assert one.next_game(0).opponent == second and not hasattr(one.players[first], "agent")
        with pytest.raises(RuntimeError, match="given up"):
            one.players[first].init_carry(1, torch.Generator())
        assert list(one.players) == [first, second]  # numbers in the replay stay


def test_nothing_is_copied_where_nobody_plays_itself() -> None:
    pool = pool_of(Phase("all", entries(a=1.0)))
    pool.follow(Learner(), 0)
    assert list(pool.players) == ["a"]


def test_a_saved_pool_goes_on_alike() -> None:
    phases = (
        Phase("one", entries(a=1.0, self_play=2.0), 7, choose="pfsp", modes=(({}, 0.5), ({"mode": "B"}, 0.5))),
        Phase("two", entries(a=0.5, b=0.5, self_play=0.3), win_bonus=Schedule(5.0, 1.0, 0, 10), clear_replay=True),
    )
    pool = pool_of(*phases, snapshot_every=5, snapshots=2)

    def play(one: Pool, first: int, games: int) -> list[Any]:
        found = []
        for number in range(first, first + games):
            one.follow(Learner(float(number)), number)
            game = one.next_game(number % 3)
            one.report(number % 3, game.opponent, float(1 - number % 3))
            found.append((game, one.win_bonus, one.clears_replay, dict(one.scores), list(one.players), list(one.snapshots)))
        return found

    play(pool, 0, 13)
    state = pool.state_dict()
    restored = pool_of(*phases, seed=9, snapshot_every=5, snapshots=2)
    play(restored, 0, 4)  # what it was before is gone
    restored.load_state_dict(state, Learner())
    assert play(restored, 13, 40) == play(pool, 13, 40)
    values = [{name: player.agent.value for name, player in one.players.items() if hasattr(player, "agent")} for one in (pool, restored)]
    assert values[0] == values[1] and len(values[0]) >= 2


def test_a_state_of_others_is_refused() -> None:
    state = pool_of(Phase("all", entries(a=1.0, b=1.0))).state_dict()
    with pytest.raises(ValueError, match="saved with the opponents a, b, here are a"):
        pool_of(Phase("all", entries(a=1.0))).load_state_dict(state, None)
    playing = pool_of(Phase("all", entries(self_play=1.0)))
    playing.follow(Learner(), 0)
    with pytest.raises(ValueError, match="snapshots need the agent"):
        pool_of(Phase("all", entries(self_play=1.0))).load_state_dict(playing.state_dict(), None)


def test_an_opponent_may_be_called_as_snapshots_are() -> None:
    make = lambda: pool_of(Phase("all", (Entry("snapshot-old"), Entry(SELF_PLAY))), snapshot_every=10)  # noqa: E731
    pool = make()
    for decisions in (0, 5, 10):
        pool.follow(Learner(), decisions)
    assert list(pool.players) == ["snapshot-old", "snapshot-000000000", "snapshot-000000010"]
    other = make()
    other.load_state_dict(pool.state_dict(), Learner())
    assert list(other.players) == list(pool.players)


def test_pools_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="nobody was loaded for b"):
        Pool((Phase("all", entries(a=1.0, b=1.0)),), {"a": Counting()}, torch.Generator(), copied)
    with pytest.raises(ConfigError, match="expected at least one phase, and an opponent in each"):
        Pool((), {}, torch.Generator(), copied)
    with pytest.raises(ConfigError, match="expected at least one phase, and an opponent in each"):
        Pool((Phase("all", ()),), {}, torch.Generator(), copied)
