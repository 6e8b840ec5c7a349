"""Ratings: what games do to them, what they are worth, and the history that they come from."""

from __future__ import annotations

import itertools
import json
import random
import sys

import pytest

from worldmpc.config import ConfigError
from worldmpc.opponents.games import GameResult
from worldmpc.opponents.ratings import MU, SIGMA, History, PlayedGame, Rating, Ratings, rate_history


def game(one="a", two="b", winner=1, number=0, **facts):
    return PlayedGame((one, two), GameResult(winner, 2.5 * winner, 100 + number, 1 + number % 2, 1), 7, number, facts)


def series(strengths, games, seed=0):
    """Games of everybody against everybody, won as strengths say; every third one is a draw."""
    draw = random.Random(seed)
    pairs = itertools.combinations(strengths, 2)
    return [
        game(one, two, 0 if number % 3 == 0 else 1 if draw.random() < 1 / (1 + 10 ** (strengths[two] - strengths[one])) else -1, number)
        for one, two in pairs
        for number in range(games)
    ]


def test_games_move_ratings_and_make_them_surer():
    ratings = Ratings(tau=0.0)
    assert ratings["new"] == Rating(MU, SIGMA) and ratings["new"].shown == pytest.approx(0.0) and ratings.players == []
    ratings.record("a", "b", 1)
    a, b = ratings["a"], ratings["b"]
    assert a.mu - MU == pytest.approx(MU - b.mu) and a.mu > MU and a.sigma == b.sigma < SIGMA
    ratings.record("b", "a", 0)  # a draw is better than expected for the weaker one
    assert ratings["a"].mu < a.mu and ratings["b"].mu > b.mu and ratings["a"].sigma < a.sigma
    assert ratings.players == ["a", "b"] and ratings["a"].shown == pytest.approx(ratings["a"].mu - 3 * ratings["a"].sigma)


def test_an_upset_moves_more_than_what_was_expected():
    ratings = Ratings()
    for _ in range(10):
        ratings.record("a", "b", 1)
    before = ratings["a"].mu
    ratings.record("a", "b", 1)
    expected = ratings["a"].mu - before
    before = ratings["a"].mu
    ratings.record("b", "a", 1)
    assert before - ratings["a"].mu > 2 * expected > 0


def test_players_who_may_change_stay_less_sure():
    sigmas = []
    for tau in (0.0, 1.0):
        ratings = Ratings(tau)
        for number in range(60):
            ratings.record("a", "b", number % 2 * 2 - 1)
        sigmas.append(ratings["a"].sigma)
    assert sigmas[1] > 1.2 * sigmas[0]


def test_what_cannot_have_happened_is_refused():
    with pytest.raises(ValueError, match="a against itself"):
        Ratings().record("a", "a", 1)
    with pytest.raises(ValueError, match="expected 1, 0 or -1 for who has won, got 0.5"):
        Ratings().record("a", "b", 0.5)


def test_a_saved_state_goes_on_with_the_same_numbers():
    games = series({"a": 0.0, "b": 0.5, "c": 1.0}, 8)
    whole, part = Ratings(), Ratings()
    for one in games:
        whole.record(*one.players, one.result.winner)
    for one in games[:10]:
        part.record(*one.players, one.result.winner)
    loaded = Ratings()
    loaded.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for one in games[10:]:
        loaded.record(*one.players, one.result.winner)
    assert loaded.state_dict() == whole.state_dict() and len(loaded.players) == 3
    with pytest.raises(ValueError, match="saved with tau 0.0833333, here it is 0"):
        Ratings(tau=0.0).load_state_dict(whole.state_dict())


def test_ratings_of_a_history_find_the_order_of_strengths():
    strengths = {"d": 0.0, "b": 0.5, "c": 1.0, "a": 1.5}
    found = rate_history(series(strengths, 30))
    assert list(found) == ["a", "c", "b", "d"] and found["a"].mu - found["d"].mu > 3 * found["a"].sigma


def test_ratings_of_a_history_do_not_depend_on_the_order_of_its_games():
    games = series({"a": 0.0, "b": 0.3, "c": 0.6}, 10)
    shuffled = list(games)
    random.Random(1).shuffle(shuffled)
    assert shuffled != games and rate_history(shuffled) == rate_history(games)
    means = {orders: [rate_history(games, seed, orders)["c"].mu for seed in range(8)] for orders in (1, 20)}
    spread = {orders: max(values) - min(values) for orders, values in means.items()}
    assert spread[20] < spread[1] / 2  # what one order more or less says is noise


def test_ratings_need_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "openskill.models", None)
    with pytest.raises(ConfigError, match=r"^ratings need openskill; install with: pip install 'worldmpc\[hockey\]'$"):
        Ratings()


def test_a_history_gives_back_its_games(tmp_path):
    history = History(tmp_path / "deep" / "history.jsonl")
    assert history.read() == []
    games = [game(number=number, winner=number % 3 - 1, task="hockey", ids=["x", "y"]) for number in range(5)]
    history.add(games[:2])
    history.add(games[2:])
    assert History(history.path).read() == games
    line = json.loads(history.path.read_text().splitlines()[1])
    assert line == {
        **{"players": ["a", "b"], "winner": 0, "seat": 2, "starter": 1, "length": 101, "return": 0.0, "seed": 7, "number": 1},
        **{"task": "hockey", "ids": ["x", "y"]},
    }


def test_a_line_that_its_writer_did_not_finish_is_passed_over_and_taken_away(tmp_path):
    history = History(tmp_path / "history.jsonl")
    games = [game(number=number) for number in range(3)]
    history.add(games)
    content = history.path.read_bytes()
    history.path.write_bytes(content[:-20])
    assert history.read() == games[:2]
    history.add(games[2:])
    assert history.path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[1, 2]", "TypeError"),
        ('{"players": ["a"]}', "not enough values"),
        ('{"players": ["a", "b"], "winner": 1}', "KeyError: 'seat'"),
        ('{"players": ["a", "b"], "winner": 5, "seat": 1, "starter": 1}', "out of range"),
        ("", "JSONDecodeError"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, reason):
    history = History(tmp_path / "history.jsonl")
    history.add([game(number=0), game(number=1)])
    lines = history.path.read_text().splitlines()
    history.path.write_text("\n".join([lines[0], line, lines[1], ""]))
    with pytest.raises(ConfigError, match=r"history\.jsonl, line 2: no game .*; take the line out") as caught:
        history.read()
    assert reason in str(caught.value)
