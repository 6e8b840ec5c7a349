"""Games of two as one environment: whose view, whose action, who has won, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.utils.env_checker import check_env

from tests.duel import Duel
from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import EnvError, canonical_task, make_env, make_envs
from worldmpc.envs.hockey.game import OTHER_SIGN, OTHER_VIEW, mirror_of
from worldmpc.envs.two_player import JointEnv
from worldmpc.types import Mirror, Seat


@pytest.mark.parametrize("seat", [1, 2])
def test_the_players_part_comes_first_in_either_seat(seat: int) -> None:
    duel = Duel()
    env = JointEnv(duel)
    obs, info = env.reset(seed=3, options={"seat": seat})
    own, other = duel.pushes if seat == 1 else duel.pushes[::-1]
    assert info == {} and obs.dtype == np.float32 and obs.tolist() == pytest.approx([own, other, 0, other, own, 0])
    obs, reward, *_ = env.step(np.array([0.5, 0.1, -0.25, 0.2], np.float32))
    left, right = ([0.5, 0.1], [-0.25, 0.2]) if seat == 1 else ([-0.25, 0.2], [0.5, 0.1])
    assert {name: action.tolist() for name, action in duel.taken[-1].items()} == {
        "left": pytest.approx(left),
        "right": pytest.approx(right),
    }
    assert reward == pytest.approx(0.75)
    assert obs.tolist() == pytest.approx([own + 0.5, other - 0.25, 1, other - 0.25, own + 0.5, 1])


def test_the_seat_is_that_of_the_environment_where_nobody_asks() -> None:
    duel = Duel()
    env = JointEnv(duel, seat=2)
    assert env.reset(seed=0, options={"seat": 1})[0][0] == pytest.approx(duel.pushes[0])
    assert env.reset(seed=0)[0][0] == pytest.approx(duel.pushes[1])
    assert duel.begun == [(0, None), (0, None)]


def test_other_options_are_the_games_own() -> None:
    duel = Duel()
    obs, _ = JointEnv(duel).reset(seed=0, options={"offset": 10.0, "seat": 2, "shaping": {"effort": 1.0}})
    assert obs[0] > 9 and duel.begun == [(0, {"offset": 10.0})]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 3.0), (-2.5, 0.5)])
def test_actions_are_taken_to_the_bounds(low: float, high: float) -> None:
    duel = Duel(low=low, high=high)
    env = JointEnv(duel)
    env.reset(seed=0)
    for given in (np.array([-1, 1, 0, 5], np.float32), np.array([0.3, -0.7, -1e9, 0.123], np.float32)):
        env.step(given)
        clipped = np.clip(given, -1, 1)
        expected = low + (high - low) * (clipped + 1) / 2
        found = np.concatenate([duel.taken[-1]["left"], duel.taken[-1]["right"]])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert found.dtype == np.float32 and (found >= np.float32(low)).all() and (found <= np.float32(high)).all()
        if (low, high) == (-1, 1):  # what is recorded as done is what was done
            assert found.tolist() == clipped.tolist()


def test_choices_are_numbers_from_where_they_start() -> None:
    duel = Duel(choices=3)
    env = JointEnv(duel)
    assert env.seats == (Seat((3,), 3, True), Seat((3,), 3, True)) and env.action_space.shape == (6,)
    env.reset(seed=0)
    env.step(np.array([0, 0, 1, 1, 0, 0], np.float32))
    assert duel.taken == [{"left": 1, "right": -1}]


@pytest.mark.parametrize("seat", [1, 2])
@pytest.mark.parametrize("tells", [True, False])
def test_who_has_won_is_told_by_the_game_or_by_the_larger_return(tells: bool, seat: int) -> None:
    env = JointEnv(Duel(tells=tells))
    for own, expected in ((0.9, 1.0), (-0.9, -1.0)):
        env.reset(seed=0, options={"seat": seat})
        for _ in range(10):
            _, _, terminated, truncated, info = env.step(np.array([own, 0, 0, 0], np.float32))
            if terminated:
                break
            assert info["success"] == (0.0 if tells else expected)  # of returns: who leads
        assert terminated and not truncated and info["success"] == expected
    env.reset(seed=0, options={"seat": seat})
    for _ in range(6):
        _, _, terminated, truncated, info = env.step(np.zeros(4, np.float32))
    assert truncated and not terminated and info["success"] == 0


def test_a_game_that_is_cut_short_is_won_by_who_leads() -> None:
    with make_envs(lambda: Duel(tells=False), EnvConfig(episode_length=2)) as envs:
        envs.reset()
        envs.step(torch.tensor([[0.1, 0, 0, 0]]))
        step = envs.step(torch.zeros(1, 4))
    assert step.truncated.item() and step.success.item() == 1


@pytest.mark.parametrize("seat", [1, 2])
def test_hints_are_weighed_into_the_players_reward_alone(seat: int) -> None:
    env = JointEnv(Duel(tells=False))
    env.reset(seed=0, options={"seat": seat, "shaping": {"effort": 2.0, "late": -0.5}})
    for time in (1, 2):
        _, reward, _, _, info = env.step(np.array([0.1, 0, 0.2, 0], np.float32))
        assert reward == pytest.approx(0.1 - 0.2 + 2.0 * 0.1 - 0.5 * time)
        assert info["success"] == -1  # shaping says nothing of who leads
    env.reset(seed=0, options={"seat": seat})
    assert env.step(np.array([0.1, 0, 0.2, 0], np.float32))[1] == pytest.approx(-0.1)


def test_hockeys_hints() -> None:
    weights = {"reward_closeness_to_puck": 20.0, "reward_touch_puck": 15.0, "reward_puck_direction": 2.0}
    plain, shaped = (make_env("hockey") for _ in range(2))
    differed = 0
    for seat in (1, 2):
        plain.reset(seed=5, options={"seat": seat})
        shaped.reset(seed=5, options={"seat": seat, "shaping": weights})
        game: Any = plain.unwrapped
        game = game.parallel.game
        rng = np.random.default_rng(seat)
        for _ in range(100):
            action = rng.uniform(-1, 1, 8).astype(np.float32)
            _, reward, terminated, _, _ = plain.step(action)
            hints = game.hints()[seat - 1]
            extra = sum(weight * hints[name] for name, weight in weights.items())
            assert shaped.step(action)[1] == pytest.approx(reward + extra, abs=1e-9)
            differed += extra != 0
            if terminated:
                break
    assert differed > 20


def test_a_hint_that_is_not_there_is_named() -> None:
    with make_envs(Duel) as envs:
        envs.options = lambda env: {"shaping": {"effrt": 1.0}}
        envs.reset()
        with pytest.raises(EnvError, match="duel_v0: .* shaping: the players' info has no 'effrt'; it has effort, late, winner"):
            envs.step(torch.zeros(1, 4))


def test_players_who_differ_keep_their_seats() -> None:
    env = JointEnv(Duel(wide=2))
    assert not env.equal and env.seats == (Seat((3,), 2), Seat((5,), 2)) and env.observation_space.shape == (8,)
    assert env.reset(seed=0)[0].tolist()[-2:] == [7.0, 7.0]
    with pytest.raises(ConfigError, match="duel_v0: the players see or do different things; the seat stays 1"):
        env.reset(options={"seat": 2})
    right = JointEnv(Duel(wide=2), seat=2)
    assert right.seats == (Seat((5,), 2), Seat((3,), 2)) and right.reset(seed=0)[0].tolist()[3:5] == [7.0, 7.0]
    with pytest.raises(ConfigError, match="seat: expected 1 or 2, got 3"):
        env.reset(options={"seat": 3})


class Three(Duel):
    def __init__(self) -> None:
        super().__init__()
        self.possible_agents = ["left", "middle", "right"]


class Other(Duel):
    """With other spaces."""

    def __init__(self, obs: Any = None, action: Any = None) -> None:
        super().__init__()
        self.obs, self.action = obs, action

    def observation_space(self, agent: str) -> Any:
        return self.obs or super().observation_space(agent)

    def action_space(self, agent: str) -> Any:
        return self.action or super().action_space(agent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Three, r"duel_v0: expected two players, got 3 \(left, middle, right\)"),
        (lambda: Other(obs=Box(0, 255, (8, 8, 3), np.uint8)), "observations of left are not supported .*only a Box with one axis"),
        (lambda: Other(obs=Dict({"a": Discrete(2)})), "observations of left are not supported"),
        (lambda: Other(obs=Box(0, 1, (0,))), "observations of left are not supported"),
        (lambda: Other(action=Box(-np.inf, np.inf, (2,), np.float32)), "actions of left are not supported .*bounded float Box"),
        (lambda: Other(action=Box(-1e12, 1e12, (2,), np.float32)), "actions of left are not supported"),
        (lambda: Other(action=Box(0, 5, (2,), np.int64)), "actions of left are not supported"),
        (lambda: Other(action=Box(-1, 1, (2, 2), np.float32)), "actions of left are not supported"),
        (lambda: Other(action=Box(-1, 1, (0,), np.float32)), "actions of left are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_reason(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_envs(make)
    assert "\n" not in str(caught.value)


def test_players_who_take_turns_are_refused() -> None:
    from pettingzoo.utils import parallel_to_aec

    with pytest.raises(ConfigError, match="duel_v0: players take turns; make it a parallel environment, with pettingzoo.utils.aec_to_par"):
        make_envs(lambda: parallel_to_aec(Duel()))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("task", ["hockey/self-play", "hockey/self-play-nokeep-discrete", Duel])
def test_gymnasium_finds_nothing_wrong(task: Any) -> None:
    env = JointEnv(Duel(tells=False)) if task is Duel else make_env(task).unwrapped
    check_env(env, skip_render_check=True)


def test_a_function_that_returns_a_game_is_a_task() -> None:
    mirror = Mirror((1, 1, 1), (1, 1), (0, 1))
    with make_envs(lambda: Duel(mirror=mirror), EnvConfig(num_envs=2, action_repeat=2)) as envs:
        spec = envs.spec
        assert (spec.name, spec.obs_shape, spec.action_dim, spec.discrete) == ("duel_v0", (6,), 4, False)
        assert spec.seats == (Seat((3,), 2),) * 2 and spec.mirror == mirror
        envs.reset()
        assert envs.step(torch.zeros(2, 4)).next_obs[:, 2].tolist() == [1, 1]  # a step of a game is one, whoever repeats


def test_specs_of_hockey() -> None:
    for task, obs, actions, discrete in (
        ("hockey", 18, 4, False),
        ("hockey/self-play-nokeep", 16, 3, False),
        ("hockey/self-play-discrete", 18, 8, True),
        ("hockey/self-play-defense-nokeep-discrete", 16, 7, True),
    ):
        spec = make_env(task).env_spec
        assert spec.name == canonical_task(task) and spec.seats == (Seat((obs,), actions, discrete),) * 2
        assert spec.obs_shape == (2 * obs,) and spec.action_dim == 2 * actions and not spec.discrete
        assert spec.mirror == mirror_of(obs == 18, discrete) and spec.episode_length == (81 if "defense" in task else 251)


@pytest.mark.parametrize("task", ["hockey", "hockey/self-play-nokeep"])
def test_both_views_of_hockey_are_each_others_rotation(task: str) -> None:
    with make_envs(task, EnvConfig(num_envs=2)) as envs:
        envs.options = lambda env: {"seat": 1 + env}
        obs = envs.reset()
        size = obs.shape[1] // 2
        for number in range(40):
            own, other = obs[:, :size].numpy(), obs[:, size:].numpy()
            np.testing.assert_array_equal(other, OTHER_SIGN[:size] * own[:, OTHER_VIEW[:size]], err_msg=str(number))
            obs = envs.step(torch.rand(2, envs.spec.action_dim) * 2 - 1).obs


def test_an_environment_of_another_package() -> None:
    pytest.importorskip("mpe2")
    with make_envs("pettingzoo/mpe2:simple_push_v3", EnvConfig(num_envs=2), seed=4) as envs:
        assert envs.spec.seats == (Seat((8,), 5, True), Seat((19,), 5, True)) and envs.spec.episode_length == 25
        envs.reset()
        steps = [envs.step(torch.rand(2, 10)) for _ in range(30)]
        assert [bool(step.truncated.all()) for step in steps] == [number == 24 for number in range(30)]
        assert set(steps[24].success.tolist()) <= {-1.0, 0.0, 1.0}
        state = envs.state_dict()
        again = make_envs("pettingzoo/mpe2:simple_push_v3", EnvConfig(num_envs=2), seed=4)
        assert again.load_state_dict(state)
        action = torch.rand(2, 10)
        assert torch.equal(again.step(action).next_obs, envs.step(action).next_obs)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("pettingzoo/mpe2", "expected pettingzoo/<package>:<module>"),
        ("pettingzoo/:simple_push_v3", "expected pettingzoo/<package>:<module>"),
        ("pettingzoo/nosuchpackage:chess", "pettingzoo/nosuchpackage:chess cannot be imported"),
        ("pettingzoo/worldmpc:types", "worldmpc.types makes no parallel environment"),
    ],
)
def test_names_of_what_cannot_be_made(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_envs(task)


def test_a_third_player_of_another_package_is_refused() -> None:
    pytest.importorskip("mpe2")
    with pytest.raises(ConfigError, match="expected two players, got 3"):
        make_envs("pettingzoo/mpe2:simple_spread_v3")


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_games_of_hockey_are_played_again_to_the_same_numbers(workers: Any) -> None:
    config = EnvConfig(num_envs=2, workers=workers, num_workers=2 if workers == "async" else None)
    modes = ("NORMAL", "TRAIN_SHOOTING", "TRAIN_DEFENSE")
    for seed in (1, 2):
        with make_envs("hockey", config, seed=seed) as envs, make_envs("hockey", config, seed=99) as fresh:
            begun = [0, 0]

            def options(env: int, begun: list[int] = begun) -> dict[str, Any]:
                begun[env] += 1
                return {"seat": 1 + begun[env] % 2, "mode": modes[(env + begun[env]) % 3]}

            envs.options = options
            envs.reset()
            generator = torch.Generator().manual_seed(seed)
            for number in range(600):
                envs.step(torch.rand(2, 8, generator=generator) * 3 - 1.5)
                if number % 97 == 96:  # somewhere in a game, in both
                    assert fresh.load_state_dict(envs.state_dict())
                    assert torch.equal(fresh.obs, envs.obs)
            assert min(begun) >= 5
            assert fresh.load_state_dict(envs.state_dict())
            for _ in range(30):
                action = torch.rand(2, 8, generator=generator) * 2 - 1
                one, two = envs.step(action), fresh.step(action)
                assert torch.equal(one.next_obs, two.next_obs) and torch.equal(one.reward, two.reward)
                if (one.terminated | one.truncated).any():
                    break
