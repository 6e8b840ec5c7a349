"""Laser hockey equals recorded numbers of the original, and keeps the rules of Gymnasium and PettingZoo."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Discrete
from gymnasium.utils.env_checker import check_env
from pettingzoo.test import parallel_api_test

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import canonical_task, make_envs
from worldmpc.envs.hockey import TASKS
from worldmpc.envs.hockey.bots import ScriptedBot
from worldmpc.envs.hockey.env import HockeyEnv, HockeyParallelEnv
from worldmpc.envs.hockey.game import CHOICES, OTHER_SIGN, OTHER_VIEW, REFLECTED, REFLECTED_ACTION, Game, GameConfig, Mode
from worldmpc.envs.hockey.rink import HOLD, RinkState

with np.load(Path(__file__).parents[1] / "golden/hockey.npz") as _arrays:
    GOLDEN: dict[str, Any] = dict(_arrays)
STILL = [0.0] * 4


def begun(keep_mode: bool, init: np.ndarray) -> Game:
    """A game of player one's start, then moved to a recorded state."""
    game = Game(GameConfig(keep_mode=keep_mode))
    game.reset(np.random.default_rng(0), starter=1)
    one, two, puck = (tuple(init[part].tolist()) for part in (slice(6), slice(6, 12), slice(12, 16)))
    game.rink.move(RinkState(one, two, (*puck, 0.0), (int(init[16]), int(init[17])) if keep_mode else (0, 0)))
    return game


@pytest.mark.parametrize("name", GOLDEN["names"].tolist())
def test_recorded_games(name: str) -> None:
    one = {key.partition("/")[2]: value for key, value in GOLDEN.items() if key.startswith(f"{name}/")}
    keep_mode, atol = bool(one["keep"]), 1e-2 if name == "random_keep" else 1e-3
    game = begun(keep_mode, one["init"])
    for t, action in enumerate(np.clip(one["actions"], -1, 1).tolist()):
        step = game.step(action[:4], action[4:])
        obs, other = game.observe()
        np.testing.assert_allclose(obs, one["obs"][t + 1], rtol=0, atol=atol)
        if keep_mode:
            assert obs[16:].tolist() == one["obs"][t + 1, 16:].tolist()
        if "obs2" in one:
            np.testing.assert_allclose(other, one["obs2"][t + 1], rtol=0, atol=atol)
        assert step.winner == one["winner"][t] and (step.goal or step.timeout) == one["done"][t]
        np.testing.assert_allclose(step.rewards, [one["reward"][t], one["reward2"][t]], rtol=0, atol=1e-4)
        hints = [list(player.values()) for player in game.hints()]
        np.testing.assert_allclose(hints, [one["info"][t], one["info2"][t]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mode", "starter"), [(Mode.NORMAL, 1), (Mode.NORMAL, 2), (Mode.TRAIN_SHOOTING, 1), (Mode.TRAIN_DEFENSE, 1)])
def test_recorded_resets(mode: Mode, starter: int) -> None:
    for seed, expected in enumerate(GOLDEN[f"reset/{mode.name}/{('one', 'two')[starter - 1]}"]):
        game = Game(GameConfig(mode))
        game.reset(np.random.default_rng(seed), starter)
        np.testing.assert_allclose(game.observe()[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recorded_shots_at_a_still_player(seed: int) -> None:
    game = Game(GameConfig(Mode.TRAIN_DEFENSE))
    game.reset(np.random.default_rng(seed))
    expected, winner = GOLDEN[f"defense_seed{seed}/obs"], 0
    for obs in expected[1:]:
        winner = game.step(STILL, STILL).winner
        np.testing.assert_allclose(game.observe()[0], obs, rtol=0, atol=1e-3)
    assert winner == GOLDEN[f"defense_seed{seed}/winner"]


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_recorded_bots(kind: str) -> None:
    bot = ScriptedBot(kind, np.random.default_rng(0))
    for obs, phase, action in zip(GOLDEN["opponent/obs"], GOLDEN[f"opponent/phase_{kind}"], GOLDEN[f"opponent/{kind}"], strict=True):
        np.testing.assert_allclose(bot.aim(obs, phase), action, rtol=0, atol=1e-9)


def test_bodies_weigh_what_they_weighed() -> None:
    game = begun(True, np.zeros(18))
    bodies = [*game.rink.players, game.rink.puck]
    np.testing.assert_allclose([body.mass for body in bodies], GOLDEN["masses"], rtol=1e-6)
    np.testing.assert_allclose([body.inertia for body in bodies], GOLDEN["inertias"], rtol=1e-6)


def play(mirror: bool, swap: bool, steps: int = 40) -> np.ndarray:
    """Player one's view after some random steps, of the game, or of its mirror image, or of the game with the players swapped."""
    rng = np.random.default_rng(3)
    game = Game()
    game.reset(np.random.default_rng(7), 1)
    obs, other = game.observe()
    start = (other if swap else obs) * (REFLECTED if mirror else 1)
    game = begun(True, start)
    sign = REFLECTED_ACTION if mirror else 1
    for actions in rng.uniform(-1, 1, (steps, 2, 4)):
        one, two = (actions * sign)[:: -1 if swap else 1].tolist()
        game.step(one, two)
    return game.observe()[1 if swap else 0]


def test_the_game_is_the_same_from_the_other_side_and_in_the_mirror() -> None:
    expected = play(mirror=False, swap=False)
    np.testing.assert_allclose(play(mirror=True, swap=False) * REFLECTED, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(play(mirror=False, swap=True), expected, rtol=0, atol=1e-2)
    np.testing.assert_array_equal(OTHER_SIGN * (OTHER_SIGN * expected[OTHER_VIEW])[OTHER_VIEW], expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opponent": "strong", "mode": "TRAIN_DEFENSE"},
        {"keep_mode": False},
        {"discrete": True},
        {"mode": 1, "discrete": True, "keep_mode": False},
    ],
)
def test_gymnasium_accepts_it(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded observations
        check_env(HockeyEnv(**options, render_mode="rgb_array"))


@pytest.mark.parametrize("options", [{}, {"keep_mode": False, "discrete": True}])
def test_pettingzoo_accepts_it(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the options that the test makes up
        env = HockeyParallelEnv(**options)
        parallel_api_test(env, num_cycles=600)
    assert env.possible_agents == ["player_1", "player_2"]


@pytest.mark.parametrize(("mode", "length"), [("NORMAL", 251), ("TRAIN_SHOOTING", 81)])
@pytest.mark.parametrize("terminates", [False, True])
def test_time_ends_a_game_as_a_draw(mode: str, length: int, terminates: bool) -> None:
    env = HockeyEnv(lambda obs: np.zeros(4), mode=mode, timeout_terminates=terminates)
    env.reset(seed=1)
    state = env.game.rink.state
    env.game.rink.move(state._replace(puck=(-2.0, 2.5, 0.0, 0.0, 0.0)))
    steps = [env.step(np.zeros(4)) for _ in range(length)]
    assert [bool(step[2] or step[3]) for step in steps] == [False] * (length - 1) + [True]
    _, _, terminated, truncated, info = steps[-1]
    assert (terminated, truncated) == (terminates, not terminates) and info["winner"] == 0 and info["success"] == 0


def test_players_begin_in_turn_and_a_seed_says_who_does() -> None:
    env = HockeyEnv()
    sides = [float(env.reset(seed=seed)[0][12]) for seed in range(12)]
    assert {side > 0 for side in sides} == {True, False}
    assert sides == [float(HockeyEnv().reset(seed=seed)[0][12]) for seed in range(12)]
    turns = [float(env.reset()[0][12]) > 0 for _ in range(4)]
    assert turns[0] != turns[1] and turns[:2] == turns[2:]
    assert env.reset(options={"starter": 1})[0][12] < 0 < env.reset(options={"starter": 2})[0][12]
    assert env.reset(options={"mode": "train_defense"})[0][12] > 0 and env.game.limit == 80
    env.reset()  # a mode that was asked for is of one game
    assert env.game.limit == 250


def test_player_one_begins_where_players_do_not_take_turns() -> None:
    env = HockeyEnv(alternates=False)
    assert all(env.reset(seed=seed)[0][12] < 0 for seed in range(8))
    assert env.reset(options={"starter": 2})[0][12] > 0 > env.reset()[0][12]


@pytest.mark.parametrize("keeps", [False, True])
def test_who_holds_the_puck_does_not_in_the_next_game(keeps: bool) -> None:
    game = Game(GameConfig(keeps_counters=keeps))
    game.reset(np.random.default_rng(1))
    game.rink.held[0] = 9
    game.reset(np.random.default_rng(1))
    assert game.rink.held == [9 if keeps else 0, 0]


def test_a_caught_puck_is_held_fourteen_steps_and_then_shot() -> None:
    game = begun(True, np.zeros(18))
    game.place(RinkState((-2.0, 0, 0, 0, 0, 0), (3.0, 2.0, 0, 0, 0, 0), (-1.0, 0.0, -10.0, 0.0, 0.0), (0, 0)))
    held, speed = [], []
    for _ in range(40):
        game.step(STILL, STILL)
        held.append(game.rink.held[0])
        speed.append(float(game.observe()[0][14]))
    caught = held.index(HOLD)
    assert held[caught : caught + 15] == [*range(15, 1, -1), 0]
    assert speed[caught + 14] == pytest.approx(60, abs=1) and max(map(abs, speed[caught + 1 : caught + 14])) < 15


def test_copies_and_pickles_play_on_alike() -> None:
    env = HockeyEnv("strong", mode="TRAIN_SHOOTING", keep_mode=False)
    env.reset(seed=5)
    for _ in range(10):
        env.step(np.array([0.5, -0.2, 0.1]))
    others = [pickle.loads(pickle.dumps(env)), copy.deepcopy(env)]
    for _ in range(30):
        expected = env.step(np.array([0.3, 0.4, 0.0]))
        for other in others:
            np.testing.assert_allclose(other.step(np.array([0.3, 0.4, 0.0]))[0], expected[0], rtol=0, atol=1e-3)


def test_choices_are_the_actions_that_they_name() -> None:
    one, other = HockeyEnv(lambda obs: np.zeros(4), discrete=True), HockeyEnv(lambda obs: np.zeros(4))
    for choice, action in enumerate(CHOICES):
        one.reset(seed=2)
        other.reset(seed=2)
        np.testing.assert_array_equal(one.step(choice)[0], other.step(action)[0])
    assert HockeyEnv(discrete=True).action_space == Discrete(8)
    assert HockeyEnv(discrete=True, keep_mode=False).action_space == Discrete(7)


def test_frames() -> None:
    env = HockeyEnv(render_mode="rgb_array")
    env.reset(seed=1, options={"starter": 1})
    frame = env.render()
    assert frame.shape == (480, 600, 3) and frame.dtype == np.uint8
    assert (
        frame[240, 120].tolist() == [235, 98, 53] and frame[240, 480].tolist() == [93, 158, 199] and frame[240, 300].tolist() == [204] * 3
    )
    assert HockeyEnv().render() is None
    env.close()


def test_tasks_of_the_suite() -> None:
    assert canonical_task("hockey/VS_weak") == "hockey/vs-weak"
    with make_envs("hockey/vs-strong", EnvConfig(num_envs=2), seed=3) as envs:
        obs = envs.reset()
        assert obs.shape == (2, 18) and envs.spec.episode_length == 251 and envs.spec.can_terminate
    with make_envs("hockey/vs-weak-shooting-discrete", EnvConfig(episode_length=100), seed=3) as envs:
        assert envs.spec.discrete and envs.spec.action_dim == 8 and envs.spec.episode_length == 100
    assert len(TASKS) == 36


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HockeyEnv("medium"), "hockey opponent: expected one of weak, strong or a function, got 'medium'"),
        (lambda: HockeyEnv(mode="fast"), "hockey mode: expected one of NORMAL, TRAIN_SHOOTING, TRAIN_DEFENSE, got 'fast'"),
        (lambda: HockeyEnv(render_mode="ascii"), "hockey render_mode: expected one of human, rgb_array, got 'ascii'"),
        (lambda: canonical_task("hockey/vs-week"), "did you mean hockey/vs-weak"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_no_such_player_or_action() -> None:
    env = HockeyEnv()
    with pytest.raises(ValueError, match="starter: expected 1, 2 or None, got 3"):
        env.reset(options={"starter": 3})
    with pytest.warns(UserWarning, match="option 'one_starting' is not read"):
        env.reset(options={"one_starting": True})
    with pytest.raises(ValueError, match=r"hockey action: expected 4 numbers, got \[nan"):
        env.step(np.full(4, np.nan))
    with pytest.raises(ValueError, match="hockey action: expected 4 numbers"):
        env.step(np.zeros(3))
    env = HockeyEnv(discrete=True, keep_mode=False)
    env.reset(seed=1)
    for choice in (-1, 7):
        with pytest.raises(ValueError, match=r"hockey action: expected a choice of Discrete\(7\), got"):
            env.step(choice)
