"""Games as the learner sees them: who plays, what is recorded, how games end, and that a saved match goes on alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.duel import Duel
from tests.opponents.people import Counting, Learner, copied
from tests.trees import differences
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, EnvConfig, make_config
from worldmpc.envs import EnvError, VecEnv, make_envs
from worldmpc.envs.hockey.game import OTHER_SIGN, OTHER_VIEW
from worldmpc.models.cloning import Clone
from worldmpc.opponents.match import Match, player_spec
from worldmpc.opponents.players import BotPlayer, ClonePlayer, RandomPlayer, StillPlayer
from worldmpc.opponents.pool import SELF_PLAY, Entry, Phase, Pool
from worldmpc.training.two_player import copy_agent
from worldmpc.types import EnvStep, Seat


def pool_of(players: dict[str, Any], copy: Any = copied, names: tuple[str, ...] = (), **arguments: Any) -> Pool:
    phases = (Phase("all", tuple(Entry(name) for name in (*players, *names))),)
    return Pool(phases, players, torch.Generator().manual_seed(1), copy, **arguments)


def match_of(players: dict[str, Any], task: Any = Duel, seed: int = 1, **env: Any) -> Match:
    return Match(make_envs(task, EnvConfig(**env), seed=seed), pool_of(players), seed)


def duel_of(match: Match, env: int = 0) -> Any:
    """The game behind an environment."""
    inner: Any = match.joint._env
    return inner.envs[env].unwrapped.parallel


def test_one_player_of_a_game() -> None:
    with make_envs("hockey", EnvConfig(action_repeat=2)) as envs:
        spec = player_spec(envs.spec)
    assert (spec.obs_shape, spec.action_dim, spec.discrete, spec.episode_length, spec.action_repeat) == ((18,), 4, False, 126, 2)
    assert spec.other == Seat((18,), 4) and spec.seats is None and spec.mirror is not None
    with make_envs("toy/balance") as envs, pytest.raises(ConfigError, match="toy/balance: has one player"):
        player_spec(envs.spec)


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_both_views_are_each_others_rotation_and_actions_those_that_were_done(workers: Any) -> None:
    """Whatever the seat: a second game, by hand, with the recorded actions, is the same."""
    players = {"weak": BotPlayer("weak", True), "random": RandomPlayer(Seat((18,), 4))}
    with match_of(players, "hockey", num_envs=2, workers=workers) as match, make_envs("hockey", EnvConfig(num_envs=2)) as again:
        asked: list[Any] = []
        choose = match.joint.options
        match.joint.options = lambda env: asked.append(choose(env)) or asked[-1]
        obs = match.reset()
        again.options = lambda env: asked[env]
        again.reset(1)
        for _ in range(40):
            own = torch.rand(2, 4) * 3 - 1.5
            other_before = match.other_obs
            step = match.step(own)
            view = OTHER_SIGN * obs.numpy()[:, OTHER_VIEW]
            np.testing.assert_array_equal(step.extras["other_obs"].numpy(), view)
            assert torch.equal(step.extras["other_obs"], other_before)
            joint = again.step(torch.cat((own, step.extras["other_action"]), 1))
            assert torch.equal(joint.next_obs[:, :18], step.next_obs) and torch.equal(joint.next_obs[:, 18:], match.other_obs)
            assert torch.equal(joint.reward, step.reward)
            obs = step.obs
        assert {one["seat"] for one in asked} == {1, 2}


def test_the_player_of_either_seat_is_paid_for_its_own_deeds() -> None:
    with match_of({"a": Counting(-0.01)}, num_envs=2) as match:
        match.reset()
        assert sorted(match._seats) == [1, 2]
        step = match.step(torch.full((2, 2), 0.1))
        assert step.reward.tolist() == pytest.approx([0.11, 0.11])
        assert step.extras["other_action"].flatten().tolist() == pytest.approx([-0.01] * 4)


def play(match: Match, value: float, steps: int) -> list[EnvStep]:
    return [match.step(torch.full((match.num_envs, 2), value)) for _ in range(steps)]


def test_winners_and_successes() -> None:
    for value, winner in ((0.3, 1), (-0.3, -1), (0.0, 0)):
        with match_of({"still": StillPlayer(Seat((3,), 2))}, seed=3) as match:
            match.reset()
            steps = play(match, value, 1)
            while not match.finished:
                steps += play(match, value, 1)
            assert bool(steps[-1].truncated) == (winner == 0) != bool(steps[-1].terminated) and len(steps) > 2
            assert all(step.success.isnan() and step.extras["winner"].isnan() for step in steps[:-1])
            assert steps[-1].extras["winner"].item() == winner and steps[-1].success.item() == (1 + winner) / 2
            assert match.finished == [{"opponent": "still", "winner": winner, "seat": 1}]
            assert match.pool.games == {"still": [winner == 1, winner == 0, winner == -1]}  # type: ignore[attr-defined]
            play(match, 0.0, 1)
            assert match.finished == []


def test_a_game_that_the_configuration_cuts_short_is_a_draw_where_the_game_says_nobody_won() -> None:
    with match_of({"still": StillPlayer(Seat((3,), 2))}, episode_length=2, num_envs=2) as match:
        match.reset()
        step = play(match, 0.1, 2)[-1]
        assert step.truncated.all() and step.extras["winner"].tolist() == [0, 0]


def test_one_opponent_per_game_with_a_fresh_memory() -> None:
    players = {"a": Counting(0.03), "b": Counting(0.1), "c": Counting(-0.1)}
    with match_of(players, lambda: Duel(length=3), num_envs=4) as match:
        match.reset()
        names = list(players)
        games: list[set[str]] = []
        for _ in range(20):
            before = match.opponents
            for time in range(3):
                assert match.opponents == before
                step = match.step(torch.zeros(4, 2))
                assert match.played == before
                assert [names[int(number)] for number in step.extras["opponent"]] == before
                expected = [players[name].value + 0.01 * time for name in before]
                assert step.extras["other_action"][:, 0].tolist() == pytest.approx(expected)
            assert step.truncated.all() and [game["opponent"] for game in match.finished] == before
            games.append(set(before))
        assert set.union(*games) == set(names) and min(map(len, games)) < max(map(len, games))
    for player in players.values():  # asked once for all of its games together, with their views
        assert all(len(set(steps)) == 1 for steps, _ in player.asked)
        assert all(
            torch.equal(shown, seen) and not done.any() for (_, shown), (seen, done) in zip(player.asked, player.watched, strict=True)
        )


def test_opponents_see_what_the_player_did() -> None:
    player = Counting()
    with match_of({"a": player}, num_envs=2) as match:
        match.reset()
        own = torch.tensor([[0.1, 0.2], [0.3, -0.4]])
        match.step(own)
        assert torch.equal(player.watched[0][1], own) and torch.equal(player.asked[0][1], player.watched[0][0])


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_opponents_decide_in_every_step_of_a_repeated_action(workers: Any) -> None:
    player = Counting(0.1)
    with match_of({"a": player}, lambda: Duel(length=5), num_envs=2, action_repeat=2, workers=workers) as match:
        assert match.spec.episode_length is None and match.spec.action_repeat == 2
        first = match.reset()
        step = match.step(torch.full((2, 2), 0.2))
        assert [steps for steps, _ in player.asked] == [[0, 0], [1, 1]]
        assert step.reward.tolist() == pytest.approx([0.2 - 0.1 + 0.2 - 0.11] * 2)
        assert step.extras["other_action"].flatten().tolist() == pytest.approx([0.105] * 4)
        assert torch.equal(step.extras["other_obs"][:, :2], first[:, [1, 0]]) and step.next_obs[:, 2].tolist() == [2, 2]
        assert torch.equal(step.extras["other_views"], torch.stack([view for _, view in player.asked], 1))
        assert torch.equal(step.obs, step.next_obs) and torch.equal(match.obs, step.obs)
        play(match, 0.2, 1)
        step = play(match, 0.2, 1)[0]  # the fifth step is the last
        assert step.truncated.all() and step.next_obs[:, 2].tolist() == [5, 5] and step.obs[:, 2].tolist() == [0, 0]
        assert step.reward.tolist() == pytest.approx([0.2 - 0.14] * 2) and step.extras["other_action"][:, 0].tolist() == pytest.approx(
            [0.14] * 2
        )
        assert len(match.finished) == 2 and step.valid.all()
        play(match, 0.0, 1)
        assert player.asked[-2][0] == [0, 0] and player.asked[-1][0] == [1, 1]


def test_a_game_that_ends_inside_a_repeat_waits_for_the_others() -> None:
    player = Counting()
    with match_of({"a": player}, lambda: Duel(length=9), num_envs=2, action_repeat=3, seed=2) as match:
        match.reset()
        before = match.obs
        step = match.step(torch.tensor([[0.9, 0.0], [0.01, 0.0]]))  # 2 steps, and 3
        assert step.terminated.tolist() == [True, False] and step.extras["winner"][0] == 1 and step.extras["winner"][1].isnan()
        assert [steps for steps, _ in player.asked] == [[0, 0], [1, 1], [2]]
        assert step.next_obs[:, 2].tolist() == [2, 3] and step.obs[:, 2].tolist() == [0, 3] and match.obs[:, 2].tolist() == [0, 3]
        assert step.next_obs[:, 0].tolist() == pytest.approx((before[:, 0] + torch.tensor([1.8, 0.03])).tolist())
        assert step.reward.tolist() == pytest.approx([1.8 - 0.01, 0.03 - 0.03]) and step.extras["other_action"][
            :, 0
        ].tolist() == pytest.approx([0.005, 0.01])
        assert step.success.tolist()[0] == 1 and step.success[1].isnan() and len(match.finished) == 1
        assert step.extras["other_views"][:, :, 2].tolist() == [[0, 1, 1], [0, 1, 2]] and step.extras["steps"].tolist() == [2, 3]
        match.step(torch.zeros(2, 2))
        assert player.asked[3][0] == [0, 3]


def test_learners_of_other_players_and_of_no_steps() -> None:
    match = match_of({"a": Counting()})
    with match, pytest.raises(RuntimeError, match="reset the environments"):
        match.step(torch.zeros(1, 2))
    with match_of({"a": Counting()}) as match:
        match.reset()
        with pytest.raises(ValueError, match=r"expected shape \(1, 2\), got \(1, 4\)"):
            match.step(torch.zeros(1, 4))
        with pytest.raises(RuntimeError, match="no step is under way"):
            match.step_wait()
        with pytest.raises(EnvError, match="non-finite action"):
            match.step(torch.full((1, 2), torch.nan))


def test_different_players_keep_their_seats() -> None:
    match = Match(make_envs(lambda: Duel(wide=1), EnvConfig(num_envs=2)), pool_of({"a": Counting()}))
    match.pool.changes_seats = False  # type: ignore[attr-defined]
    with match:
        assert match.spec.other == Seat((4,), 2)
        match.reset()
        step = match.step(torch.zeros(2, 2))
        assert step.next_obs.shape == (2, 3) and step.extras["other_obs"].shape == (2, 4) and match._seats == [1, 1]


def test_agents_repeat_their_actions_as_they_were_made_to() -> None:
    learner = Learner(0.1)
    learner.spec = player_spec(make_envs(Duel, EnvConfig(action_repeat=2)).spec)
    pool = pool_of({}, names=(SELF_PLAY,))
    with Match(make_envs(Duel, EnvConfig(action_repeat=2, num_envs=2)), pool) as match:
        match.follow(learner, 0)
        match.reset()
        play(match, 0.0, 2)
        player = pool.players["snapshot-000000000"]
        assert player.state_dict() == {"turns": 2}


MIXED = {
    "weak": lambda: BotPlayer("weak", True),
    "strong": lambda: BotPlayer("strong", True),
    "random": lambda: RandomPlayer(Seat((18,), 4)),
}


def hockey(seed: int, **env: Any) -> Match:
    players = {name: make() for name, make in MIXED.items()} | {"decoy": ClonePlayer(Clone(18, 4, (8,)))}
    envs: VecEnv = make_envs("hockey/self-play-defense", EnvConfig(num_envs=6, **env), seed=seed)
    pool = pool_of(players, copy_agent, (SELF_PLAY, SELF_PLAY), snapshot_every=120, snapshots=1)
    return Match(envs, pool, seed)


@pytest.mark.parametrize("env", [{}, {"action_repeat": 3, "episode_length": 10}, {"workers": "async", "num_workers": 2}], ids=str)
def test_a_saved_match_goes_on_as_if_nothing_had_happened(env: dict[str, Any]) -> None:
    config = make_config(
        "debug", task="hockey", agent="td3", **{f"env.{name}": value for name, value in env.items() if name == "action_repeat"}
    )
    with hockey(1, **env) as match, hockey(7, **env) as fresh:
        agent = make_agent(config, match.spec)
        generator = torch.Generator().manual_seed(0)

        def step(decisions: int, *matches: Match) -> list[EnvStep]:
            action = torch.rand(6, 4, generator=generator) * 2 - 1
            for one in matches:
                one.follow(agent, decisions)
            if decisions % 50 == 0:  # the learner learns
                with torch.no_grad():
                    next(agent.model.parameters()).add_(0.01)
            return [one.step(action) for one in matches]

        match.follow(agent, 0)
        match.reset()
        for decisions in range(0, 400, 4):
            step(decisions, match)
        state = match.state_dict()
        pool: Any = match.pool
        assert pool.begun > 8 and len(pool.players) == 4 + 4
        fresh.follow(agent, 0)
        fresh.reset()
        step(0, fresh)  # what it was before is gone
        assert fresh.load_state_dict(state, agent)
        met = set()
        for decisions in range(400, 920, 4):
            one, two = step(decisions, match, fresh)
            met |= set(match.played)
            assert match.played == fresh.played and match.finished == fresh.finished and match.opponents == fresh.opponents
            assert differences({**one._asdict()}, {**two._asdict()}) == []
        assert differences(match.state_dict(), fresh.state_dict()) == []
        assert {"weak", "strong", "random", "decoy"} <= met and any(name.startswith("snapshot") for name in met)


def test_games_that_cannot_be_played_again_begin_anew_with_other_opponents() -> None:
    players = {"a": Counting(0.1), "b": Counting(0.2)}
    with match_of(players, num_envs=3) as match:
        match.reset()
        play(match, 0.0, 2)
        state = match.state_dict()
        state["joint"]["actions"] = state["joint"]["actions"] + 0.1
        with pytest.warns(UserWarning, match="not resumed exactly"):
            assert not match.load_state_dict(state)
        assert match.obs[:, 2].tolist() == [0, 0, 0]
        step = match.step(torch.zeros(3, 2))
        assert step.extras["other_action"][:, 0].tolist() == pytest.approx([players[name].value for name in match.played])
