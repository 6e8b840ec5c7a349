"""Games between those that somebody names: tournaments that go on where they stopped, and an agent against opponents."""

from __future__ import annotations

import collections

import pytest

from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, EnvConfig, make_config
from worldmpc.envs import make_envs
from worldmpc.opponents import games
from worldmpc.opponents.match import player_spec
from worldmpc.opponents.ratings import History
from worldmpc.training import playing
from worldmpc.training.playing import Entrant, Tournament, enter, entrants_of, play_against
from worldmpc.types import EnvSpec, Seat

TASK = "hockey/self-play-shooting"


@pytest.fixture(scope="module")
def spec():
    with make_envs(TASK) as envs:
        return envs.spec


@pytest.fixture
def players(spec):
    return enter(entrants_of(["strong", "idle=still", "random"]), spec)


def play(tournament, pairs=None):
    for pair in pairs or tournament.pairs:
        for _ in tournament.play(pair):
            pass
    return tournament.all_games()


def test_everybody_plays_everybody_from_both_seats_with_both_starters(players, tmp_path):
    found = play(Tournament(TASK, players, 8, 1, History(tmp_path / "h.jsonl")))
    pairs = [("idle", "strong"), ("idle", "random"), ("random", "strong")]
    assert collections.Counter(game.players for game in found) == dict.fromkeys(pairs, 8)
    for pair in pairs:
        fixtures = [(game.result.seat, game.result.starter) for game in found if game.players == pair]
        assert collections.Counter(fixtures) == {(seat, starter): 2 for seat in (1, 2) for starter in (1, 2)}
    assert all(1 <= game.result.length <= 81 for game in found)
    lost = [game for game in found if game.players == ("idle", "strong")]
    assert sum(game.result.winner for game in lost) < 0  # to stand still loses more than it wins


def test_a_tournament_goes_on_where_it_stopped(players, tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "SERIES", 4)
    whole = play(Tournament(TASK, players, 6, 1, History(tmp_path / "whole.jsonl")))
    history = History(tmp_path / "h.jsonl")
    first = Tournament(TASK, players, 6, 1, history)
    play(first, first.pairs[:2])
    lines = history.path.read_bytes().splitlines(keepends=True)
    history.path.write_bytes(b"".join(lines[:9]) + lines[9][:30])  # killed in the middle of the second pair
    assert play(Tournament(TASK, players, 6, 1, history)) == whole
    assert history.path.read_bytes().splitlines(keepends=True)[:12] == lines
    again = Tournament(TASK, players, 6, 1, history)
    monkeypatch.setattr(playing, "play_games", None)  # nothing is played any more
    assert play(again) == whole


def test_more_players_and_games_leave_what_was_played(players, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "SERIES", 4)
    history = History(tmp_path / "h.jsonl")
    before = play(Tournament(TASK, players[:2], 4, 1, history))
    more = [players[2], players[1], players[0]]
    found = play(Tournament(TASK, more, 8, 1, history))
    assert len(found) == 24 and [game for game in found if game in before] == before
    assert len(play(Tournament(TASK, players[:2], 4, 1, history))) == 4  # fewer games than there are


def test_a_history_of_something_else_is_refused(players, spec, tmp_path):
    history = History(tmp_path / "h.jsonl")
    play(Tournament(TASK, players, 1, 1, history))
    other = [Entrant(one.label, one.source, "other", one.player) for one in players]
    changes = {
        "another seed": (TASK, players, 1, 2, history),
        "another task": ("hockey/self-play", players, 1, 1, history),
        "other players of these names": (TASK, other, 1, 1, history),
        "another mode": (TASK, players, 1, 1, history, "prior"),
    }
    for words, arguments in changes.items():
        with pytest.raises(ConfigError, match=f"^out: .*h.jsonl has games of idle and strong with {words}; choose another folder"):
            Tournament(*arguments)


def test_who_cannot_take_part_is_refused(spec):
    alone = EnvSpec("toy/alone", (2,), 1, 10)
    unlike = EnvSpec("toy/unlike", (5,), 3, 10, seats=(Seat((2,), 1), Seat((3,), 2)))
    with pytest.raises(ConfigError, match="^task: toy/alone has one player; tournaments are for games of two"):
        enter({"a": "still", "b": "random"}, alone)
    with pytest.raises(ConfigError, match="^task: the players of toy/unlike see or do different things"):
        enter({"a": "still", "b": "random"}, unlike)
    with pytest.raises(ConfigError, match=r"^players: expected at least two different ones, .* got weak$"):
        enter({"weak": "weak"}, spec)


def test_players_are_named_with_and_without_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "x=y/b"):
        (tmp_path / name).mkdir(parents=True)
    assert entrants_of(["weak", "mine=SAC:runs/a", "x=y/b", "TDMPC2:runs/a/"]) == {
        "weak": "weak",
        "mine": "SAC:runs/a",
        "x=y/b": "x=y/b",  # a path that is there
        "runs/a": "TDMPC2:runs/a/",
    }
    for names, message in (
        (["weak", "weak"], "^players: weak is there twice; give different labels"),
        (["a=weak", "a=strong"], "^players: a is there twice"),
        (["weak", "=strong"], "^players: expected name or label=name, .* got '=strong'"),
        (["weak", "a="], "^players: expected name or label=name"),
        (["weak", "self_play"], "^players: self_play stands for snapshots in training; name a run or a checkpoint"),
        (["weak", "a=runs/b"], "'runs/b' is no known opponent"),
        (["weak", "SAC:runs/b"], "runs/b: no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            entrants_of(names)


def test_an_agent_plays_whom_it_is_asked_to(spec):
    agent = make_agent(make_config("debug", task=TASK, agent="sac", opponents=["random"]), player_spec(spec))
    with make_envs(TASK, EnvConfig(num_envs=4)) as envs:
        result = play_against(agent, envs, 4)
        assert list(result.games) == ["random"] and len(result.returns) == 4
        assert play_against(agent, envs, 4).games == result.games
        assert play_against(agent, envs, 4, index=1).games != result.games
        result = play_against(agent, envs, 4, ["still", "weak"])
        assert {name: games.tally(series).games for name, series in result.games.items()} == {"still": 4, "weak": 4}
        for names, message in (
            (["still", "still"], "^opponents: still is named twice"),
            ([], "^opponents: expected at least one"),
            (["self_play"], "^opponents: self_play stands for snapshots in training"),
            (["stil"], "did you mean still?"),
        ):
            with pytest.raises(ConfigError, match=message):
                play_against(agent, envs, 1, names)
        with pytest.raises(ConfigError, match="^mode: agent=sac as configured acts in explore or eval, not in 'prior'"):
            play_against(agent, envs, 1, mode="prior")
