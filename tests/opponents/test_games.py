"""Series of games: fixtures, repeatability, tallies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.duel import Duel
from tests.opponents.people import Counting
from worldmpc.config import EnvConfig
from worldmpc.envs import make_envs
from worldmpc.opponents.games import GameResult, Stopped, Tally, fixture, play_games, tally, wilson
from worldmpc.opponents.players import BotPlayer, RandomPlayer, StillPlayer
from worldmpc.types import Seat

BOX, HOCKEY = Seat((3,), 2), Seat((18,), 4)


def series(player: Any, opponent: Any, games: int, seed: int = 1, envs: int = 2, task: Any = Duel, **arguments: Any) -> list[GameResult]:
    with make_envs(task, EnvConfig(num_envs=envs), seed=77) as made:
        return play_games(made, player, opponent, games, seed, **arguments)


def test_seats_and_starters_take_turns() -> None:
    assert [fixture(number, True, True) for number in range(5)] == [(1, 1), (2, 1), (1, 2), (2, 2), (1, 1)]
    assert [fixture(number, False, True) for number in range(4)] == [(1, 1), (1, 1), (1, 2), (1, 2)]
    assert [fixture(number, True, False) for number in range(2)] == [(1, None), (2, None)]
    for count in (4, 8, 40):
        assert set(Counter(fixture(number, True, True) for number in range(count)).values()) == {count // 4}


@pytest.mark.parametrize("envs", [1, 2, 3, 5])
def test_games_are_played_as_their_fixtures_say(envs: int) -> None:
    asked: list[Any] = []

    class Noted(Duel):
        def reset(self, seed: int | None = None, options: Any = None) -> Any:
            asked.append((seed, options))
            return super().reset(seed, options)

    results = series(StillPlayer(BOX), Counting(-0.3), 7, envs=envs, task=Noted, options={"offset": 0.25})
    assert [(result.seat, result.starter) for result in results] == [fixture(number, True, False) for number in range(7)]
    assert [result.winner for result in results] == [1] * 7 and all(result.ret > 0 for result in results)
    assert all(options == {"offset": 0.25} for _, options in asked if options)
    assert len({seed for seed, _ in asked}) == len(asked) >= 7


def test_who_starts_is_asked_of_hockey_by_seat() -> None:
    begins: list[dict[str, Any]] = []
    with make_envs("hockey", EnvConfig(episode_length=2)) as envs:
        inner: Any = envs._env
        joint = inner.envs[0].unwrapped
        reset = joint.parallel.reset
        joint.parallel.reset = lambda seed=None, options=None: (
            begins.append({**(options or {}), "own": joint._own.player}) or reset(seed=seed, options=options)
        )
        results = play_games(envs, StillPlayer(HOCKEY), StillPlayer(HOCKEY), 8, 1)
    expected = [(1, 1), (2, 1), (1, 2), (2, 2)] * 2
    assert [(result.seat, result.starter) for result in results] == expected and all(result.length == 2 for result in results)
    assert [(one["own"], one["starter"]) for one in begins[:4]] == [("player_1", 1), ("player_2", 2), ("player_1", 2), ("player_2", 1)]


def test_a_series_is_repeatable_and_depends_on_its_seed() -> None:
    def once(seed: int, envs: Any = None) -> list[GameResult]:
        players = BotPlayer("strong", True), RandomPlayer(HOCKEY)
        return play_games(envs, *players, 5, seed, options={"mode": "TRAIN_DEFENSE"})

    with make_envs("hockey", EnvConfig(num_envs=2), seed=1) as envs, make_envs("hockey", EnvConfig(num_envs=2), seed=2) as others:
        first = once(4, envs)
        assert once(4, envs) == first == once(4, others) and once(5, envs) != first
        assert len({result.ret for result in first}) == 5


def test_players_who_trade_places_trade_results() -> None:
    one, two = (series(Counting(first), Counting(second), 6, seed=3, task=even) for first, second in ((0.3, -0.02), (-0.02, 0.3)))
    assert [(result.winner, result.ret, result.length) for result in two] == [
        (-result.winner, pytest.approx(-result.ret), result.length) for result in one
    ]
    assert {result.winner for result in one} == {1}


def even() -> Duel:
    """A game that both begin alike."""
    duel = Duel()
    begin = duel.reset

    def reset(seed: int | None = None, options: Any = None) -> Any:
        begin(seed, options)
        duel.pushes = np.zeros(2)
        return duel._views(), {agent: {} for agent in duel.agents}

    duel.reset = reset  # type: ignore[method-assign]
    return duel


def test_a_bot_against_itself_is_as_good_on_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hockey from the mirrored beginning, with the same phases: the same game, to the account of who sits there."""

    class Phased(BotPlayer):
        """Whose phases are known."""

        def init_carry(self, games: int, generator: torch.Generator) -> Any:
            return (torch.full((games,), 0.3, dtype=torch.float64),)

        def act(self, carry: Any, obs: torch.Tensor, generator: torch.Generator) -> Any:
            return super().act(carry, obs, torch.Generator().manual_seed(int(1e6 * carry[0][0])))

    found = []
    for seat in (1, 2):
        monkeypatch.setattr("worldmpc.opponents.games.fixture", lambda number, *_, seat=seat: (seat, seat))
        with make_envs("hockey", EnvConfig()) as envs:
            inner: Any = envs._env
            game = inner.envs[0].unwrapped.parallel.game
            place = game.rink.place

            def turned(state: Any, seat: int = seat, place: Any = place) -> None:
                """The puck of either player's start at the same place of its own view."""
                x, y, *rest = state.puck
                place(state._replace(puck=(-1.5 if seat == 1 else 1.5, 0.4 if seat == 1 else -0.4, *rest)))

            monkeypatch.setattr(game.rink, "place", turned)
            (result,) = play_games(envs, Phased("strong", True), Phased("weak", True), 1, 5)
        found.append(result)
    one, two = found
    assert one.winner == two.winner != 0 and one.length == two.length and one.ret == pytest.approx(two.ret, abs=0.1)


def test_no_more_games_than_asked() -> None:
    assert series(StillPlayer(BOX), StillPlayer(BOX), 0) == []
    assert len(series(StillPlayer(BOX), StillPlayer(BOX), 1, envs=3)) == 1
    player = Counting()
    series(player, StillPlayer(BOX), 4, envs=3)  # two of them stop while the first goes on
    assert sum(len(steps) for steps, _ in player.asked) == 4 * 6


def test_a_series_may_be_stopped() -> None:
    calls = iter([False, False, True])
    with make_envs(Duel, EnvConfig()) as envs:
        envs.options = before = lambda env: {"offset": 1.0}
        with pytest.raises(Stopped):
            play_games(envs, StillPlayer(BOX), StillPlayer(BOX), 1, 1, stop=lambda: next(calls))
        assert envs.options is before
        assert play_games(envs, StillPlayer(BOX), StillPlayer(BOX), 1, 1)[0].length == 6


def test_frames_are_those_of_the_first_game(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[np.ndarray] = []
    with make_envs(Duel, EnvConfig(num_envs=2)) as envs:
        monkeypatch.setattr(type(envs), "render", lambda self: tuple(np.full((2, 2, 3), int(self.obs[env, 2])) for env in range(2)))
        play_games(envs, StillPlayer(BOX), StillPlayer(BOX), 4, 1, frames=frames)
    assert [frame[0, 0, 0] for frame in frames] == [0, 1, 2, 3, 4, 5]


def test_games_need_two() -> None:
    with make_envs("toy/balance") as envs, pytest.raises(ValueError, match="toy/balance: has one player"):
        play_games(envs, StillPlayer(BOX), StillPlayer(BOX), 1, 1)


def test_players_see_their_own_view_and_the_others_action() -> None:
    one, two = Counting(0.01), Counting(-0.02)
    series(one, two, 2)
    for (steps, mine), (_, theirs), (_, their_action), (_, my_action) in zip(one.asked, two.asked, one.watched, two.watched, strict=True):
        assert torch.equal(mine[:, [1, 0, 2]], theirs)
        assert their_action[:, 0].tolist() == pytest.approx([-0.02 + 0.01 * step for step in steps])
        assert my_action[:, 0].tolist() == pytest.approx([0.01 + 0.01 * step for step in steps])


def test_tallies_and_their_intervals() -> None:
    results = [GameResult(winner, 0.0, 1, 1, None) for winner in (1, 1, 0, -1, 0, 1)]
    counted = tally(results)
    assert counted == Tally(3, 2, 1) and counted.games == 6 and counted.score == pytest.approx(4 / 6)
    assert np.isnan(tally([]).score)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4) and wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
