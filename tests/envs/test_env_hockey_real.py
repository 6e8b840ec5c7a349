"""The original package's hockey behind our faces: on a stand-in that has its faults, and on the package where it is installed."""

from __future__ import annotations

import copy
import enum
import pickle
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from pettingzoo.test import parallel_api_test

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import canonical_task, list_tasks, make_env, make_envs
from worldmpc.envs.hockey import real
from worldmpc.envs.hockey.env import HockeyEnv, HockeyParallelEnv
from worldmpc.envs.hockey.game import Game, GameConfig, Mode
from worldmpc.envs.hockey.real import RealGame, RealHockeyEnv, RealHockeyParallelEnv


class StandInMode(enum.Enum):
    """The package's modes."""

    NORMAL = 0
    TRAIN_SHOOTING = 1
    TRAIN_DEFENSE = 2


class StandInEnv:
    """The built-in game with the package's face and its faults."""

    def __init__(self, keep_mode: bool = True, mode: StandInMode = StandInMode.NORMAL, verbose: bool = False) -> None:
        self.keep_mode, self.mode = keep_mode, mode
        self._game = Game(GameConfig(Mode[mode.name], keep_mode, keeps_counters=True))
        self.reset(True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies forget everything

    def reset(
        self, one_starting: bool | None = None, mode: Any = None, seed: int | None = None, options: Any = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if mode is not None:
            raise TypeError("hasattr(): attribute name must be string")
        self._game.reset(np.random.default_rng(seed), None if one_starting is None else 2 - one_starting)
        self.max_timesteps, self.done, self.winner = self._game.limit, False, 0
        return self._views()[0], self._infos()[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        one, two = np.split(np.clip(action, -1, 1).astype(np.float32), 2)
        step = self._game.step(one.tolist(), two.tolist())
        self.winner, self.done, self._rewards = step.winner, self.done or step.goal or step.timeout, step.rewards
        return self._views()[0], step.rewards[0], self.done, False, self._infos()[0]

    def obs_agent_two(self) -> np.ndarray:
        return self._views()[1]

    def get_info_agent_two(self) -> dict[str, Any]:
        return self._infos()[1]

    def get_reward_agent_two(self, info_two: dict[str, Any]) -> float:
        return self._rewards[1]

    def _views(self) -> list[np.ndarray]:
        return [view.astype(np.float64) for view in self._game.observe()]

    def _infos(self) -> list[dict[str, Any]]:
        return [{"winner": sign * self.winner, **hints} for sign, hints in zip((1, -1), self._game.hints(), strict=True)]

    player1 = property(lambda self: self._game.rink.players[0])
    player2 = property(lambda self: self._game.rink.players[1])
    puck = property(lambda self: self._game.rink.puck)
    player1_has_puck = property(lambda self: self._held(0), lambda self, value: self._hold(0, value))
    player2_has_puck = property(lambda self: self._held(1), lambda self, value: self._hold(1, value))

    def _held(self, player: int) -> int:
        return self._game.rink.held[player]

    def _hold(self, player: int, value: int) -> None:
        self._game.rink.held[player] = value


def module(**parts: Any) -> ModuleType:
    """A module ``hockey.hockey_env`` with these names in it."""
    made = ModuleType("hockey.hockey_env")
    vars(made).update(parts)
    return made


def install(monkeypatch: pytest.MonkeyPatch, made: ModuleType | None, version: str | None = None) -> None:
    """Let ``hockey.hockey_env`` be imported as this."""
    package = ModuleType("hockey")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "hockey", package)
    monkeypatch.delitem(sys.modules, "hockey.hockey_env", raising=False)
    if made is not None:
        monkeypatch.setitem(sys.modules, "hockey.hockey_env", made)
    monkeypatch.setattr(real, "_version", lambda: version)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, module(HockeyEnv=StandInEnv, Mode=StandInMode))


def random_actions(steps: int, size: int = 4) -> list[Any]:
    return np.random.default_rng(2).uniform(-1, 1, (steps, 2, size)).astype(np.float32).tolist()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("keep_mode", [True, False])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_game_is_that_of_the_package(mode: Mode, keep_mode: bool) -> None:
    one, other = RealGame(GameConfig(mode, keep_mode)), Game(GameConfig(mode, keep_mode))
    rng, actions = np.random.default_rng(1), iter(random_actions(1000, 4 if keep_mode else 3))
    for starter in (1, 2):
        one.reset(rng, starter)
        other.reset(np.random.default_rng(one._start.seed), starter)
        assert one.limit == other.limit
        while True:
            for view, expected in zip(one.observe(), other.observe(), strict=True):
                assert view.dtype == np.float32
                np.testing.assert_array_equal(view, expected)
            assert one.hints() == other.hints() and one.state == other.state
            first, second = next(actions)
            step = one.step(first, second)
            assert step == other.step(first, second)
            if step.goal or step.timeout:
                break


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("rules", [{}, {"keep_mode": False, "discrete": True}, {"mode": "TRAIN_DEFENSE", "render_mode": "rgb_array"}])
def test_gymnasium_and_pettingzoo_accept_it(rules: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded observations, and of the options that the test makes up
        check_env(RealHockeyEnv("strong", **rules), skip_render_check="render_mode" not in rules)
        parallel_api_test(RealHockeyParallelEnv(**rules), num_cycles=300)


@pytest.mark.usefixtures("stand_in")
def test_both_faces_have_the_conventions_of_the_built_in_ones() -> None:
    one, other = RealHockeyParallelEnv(), HockeyParallelEnv()
    (obs, infos), (other_obs, other_infos) = one.reset(seed=1), other.reset(seed=1)
    assert one.possible_agents == other.possible_agents and one.agents == other.agents and one.mirror == other.mirror
    assert one.observation_spaces == other.observation_spaces and one.action_spaces == other.action_spaces
    actions = dict.fromkeys(one.agents, np.zeros(4, np.float32))
    for got, expected in [((obs, infos), (other_obs, other_infos)), (one.step(actions), other.step(actions))]:
        for ours, theirs in zip(got, expected, strict=True):
            assert list(ours) == list(theirs)
        assert infos["player_2"].keys() == other_infos["player_2"].keys()
    single, other_single = RealHockeyEnv(), HockeyEnv()
    assert single.reset(seed=1)[1].keys() == other_single.reset(seed=1)[1].keys()
    assert single.step(np.zeros(4))[4].keys() == other_single.step(np.zeros(4))[4].keys()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("terminates", [False, True])
def test_time_truncates(terminates: bool) -> None:
    env = RealHockeyParallelEnv(mode="TRAIN_SHOOTING", timeout_terminates=terminates)
    env.reset(seed=1)
    still, length = np.zeros(4, np.float32), 0
    while env.agents:
        _, _, terminations, truncations, infos = env.step(dict.fromkeys(env.agents, still))
        length += 1
    assert length == 81 and infos["player_1"]["winner"] == infos["player_2"]["winner"] == 0
    assert set(terminations.values()) == {terminates} and set(truncations.values()) == {not terminates}
    endless = RealHockeyParallelEnv(mode="TRAIN_SHOOTING", timed=False)
    endless.reset(seed=1)
    for _ in range(100):
        endless.step(dict.fromkeys(endless.possible_agents, still))
    assert endless.agents


@pytest.mark.usefixtures("stand_in")
def test_a_goal_terminates_and_each_player_learns_who_won() -> None:
    env = RealHockeyParallelEnv(mode="TRAIN_DEFENSE")
    winners = set()
    for seed in range(30):
        env.reset(seed=seed)
        while env.agents:
            _, rewards, terminations, truncations, infos = env.step({player: np.zeros(4, np.float32) for player in env.agents})
        winner = infos["player_1"]["winner"]
        winners.add(winner)
        assert infos["player_2"]["winner"] == -winner
        assert terminations["player_1"] == bool(winner) and truncations["player_2"] == (winner == 0)
        assert rewards["player_1"] == pytest.approx(10 * winner, abs=2) and rewards["player_2"] == pytest.approx(-10 * winner, abs=2)
    assert winners == {1, 0, -1}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("keeps", [False, True])
def test_who_holds_the_puck_does_not_in_the_next_game(keeps: bool) -> None:
    game = RealGame(GameConfig(keeps_counters=keeps))
    game.reset(np.random.default_rng(1))
    game._env.player2_has_puck = 9
    game.reset(np.random.default_rng(1))
    assert [view[16:].tolist() for view in game.observe()] == ([[0, 9], [9, 0]] if keeps else [[0, 0], [0, 0]])


def played(env: Any, seed: int) -> np.ndarray:
    """Observations of 300 steps of games, begun with a seed, and the later ones without."""
    observations = [env.reset(seed=seed)[0]]
    for action, _ in random_actions(300):
        obs, _, terminated, truncated, _ = env.step(action)
        observations.append(env.reset()[0] if terminated or truncated else obs)
    return np.array(observations)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("opponent", ["weak", "strong"])
def test_a_seed_makes_games_repeatable(opponent: str) -> None:
    env = RealHockeyEnv(opponent)
    expected = played(env, 3)
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    assert not np.array_equal(played(env, 4), expected)
    np.testing.assert_array_equal(played(env, 3), expected)
    np.testing.assert_array_equal(played(RealHockeyEnv(opponent), 3), expected)
    assert np.random.get_state()[1].tolist() == state


@pytest.mark.usefixtures("stand_in")
def test_options_say_who_begins_and_in_which_mode() -> None:
    env = RealHockeyParallelEnv()
    for starter in (1, 2, 1):
        obs, _ = env.reset(seed=5, options={"starter": starter})
        assert (obs["player_1"][12] > 0) == (starter == 2)
    turns = [float(env.reset()[0]["player_1"][12]) > 0 for _ in range(4)]
    assert turns == [True, False, True, False]
    sides = [float(env.reset(seed=seed)[0]["player_1"][12]) > 0 for seed in range(12)]
    other = HockeyParallelEnv()
    assert sides == [float(other.reset(seed=seed)[0]["player_1"][12]) > 0 for seed in range(12)]
    env.reset(options={"mode": "train_defense"})
    assert env.game.limit == 80
    with pytest.raises(ValueError, match="starter: expected 1, 2 or None, got 3"):
        env.reset(options={"starter": 3})


@pytest.mark.usefixtures("stand_in")
def test_copies_and_pickles_play_on_alike() -> None:
    env = RealHockeyEnv("strong", mode="TRAIN_DEFENSE", keep_mode=False)
    env.reset(seed=5)
    for action, _ in random_actions(10, 3):
        env.step(action)
    others = [pickle.loads(pickle.dumps(env)), copy.deepcopy(env)]
    for action, _ in random_actions(30, 3):
        expected = env.step(action)
        for other in others:
            got = other.step(action)
            np.testing.assert_array_equal(got[0], expected[0])
            assert got[1:4] == expected[1:4]


@pytest.mark.usefixtures("stand_in")
def test_tasks_of_the_suite() -> None:
    names = [name.partition("/")[2] for name in list_tasks("hockey")]
    assert list_tasks("hockey-real") == [f"hockey-real/{name}" for name in names]
    assert canonical_task("hockey-real/VS_weak") == "hockey-real/vs-weak" and canonical_task("hockey-real") == "hockey-real/self-play"
    with make_envs("hockey-real/vs-strong-discrete", EnvConfig(num_envs=2), seed=3) as envs:
        assert envs.reset().shape == (2, 18) and envs.spec.discrete and envs.spec.action_dim == 8 and envs.spec.episode_length == 251
    env = make_env("hockey-real/vs-weak-defense", seed=3, render=True)
    env.reset()
    assert env.env_spec.episode_length == 81 and env.render().shape == (480, 600, 3)
    env = make_env("hockey-real/self-play-nokeep", seed=3)
    obs, _ = env.reset(options={"seat": 2})
    assert obs.shape == (32,) and env.env_spec.seats is not None
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 6)).astype(np.float32)
    env.reset(seed=7)
    for action in actions:
        obs = env.step(action)[0]
    np.testing.assert_array_equal(env.replay(7, actions), obs)
    with pytest.raises(ConfigError, match="did you mean hockey-real/vs-weak"):
        canonical_task("hockey-real/vs-week")


class WithoutCounters(StandInEnv):
    """An environment that knows nothing of held pucks."""

    player1_has_puck = property()


class Broken(StandInEnv):
    """An environment that cannot be made."""

    def __init__(self, keep_mode: bool = True, mode: Any = None) -> None:
        raise RuntimeError("no\ndisplay")


class WithoutStarter(StandInEnv):
    """An environment that cannot be told who begins."""

    def reset(self, mode: Any = None, seed: int | None = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(
    ("made", "version", "message"),
    [
        (None, None, "cannot be imported .*No module named 'hockey.hockey_env'"),
        (module(HockeyEnv=StandInEnv, Mode=StandInMode), "2.5.1", "is version 2.5.1, older than 2.6"),
        (module(HockeyEnv=StandInEnv), "2.6", "is of an unknown version, without Mode"),
        (module(HockeyEnv=object, Mode=StandInMode), "2.6", "is of an unknown version, without HockeyEnv.reset, HockeyEnv.step"),
        (module(HockeyEnv=WithoutCounters, Mode=StandInMode), "2.6", "is of an unknown version, without HockeyEnv.player1_has_puck"),
        (module(HockeyEnv=Broken, Mode=StandInMode), None, "cannot be used .RuntimeError: no display"),
        (module(HockeyEnv=WithoutStarter, Mode=StandInMode), None, "is of an unknown version, without one_starting in HockeyEnv.reset"),
    ],
)
def test_a_package_that_cannot_be_used_is_refused(
    made: ModuleType | None, version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, made, version)
    with pytest.raises(
        ConfigError, match=rf"^hockey-real: the package hockey \(martius-lab/hockey-env\) {message}.*; install it with: pip"
    ) as caught:
        make_env("hockey-real/vs-weak")
    assert "\n" not in str(caught.value)


class NoHockey:
    """Finds that there is no package ``hockey``."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "hockey":
            raise ModuleNotFoundError("No module named 'hockey'", name="hockey")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hockey", "hockey.hockey_env"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoHockey(), *sys.meta_path])
    expected = r"hockey \(martius-lab/hockey-env\) is not installed; install it with: pip install --no-deps git\+https://github.com/martius-lab/hockey-env"
    with pytest.raises(ConfigError, match=expected):
        make_env("hockey-real/vs-weak")


def test_the_package_itself_plays_as_the_built_in_game() -> None:
    pytest.importorskip("hockey.hockey_env")
    for mode in Mode:
        one, other = RealGame(GameConfig(mode)), Game(GameConfig(mode))
        one.reset(np.random.default_rng(1), 1)
        other.reset(np.random.default_rng(one._start.seed), 1)
        for first, second in random_actions(40):
            for view, expected in zip(one.observe(), other.observe(), strict=True):
                np.testing.assert_allclose(view, expected, rtol=0, atol=1e-2)
            step, expected = one.step(first, second), other.step(first, second)
            np.testing.assert_allclose(step.rewards, expected.rewards, rtol=0, atol=1e-2)
            assert step[1:] == expected[1:]
            if step.goal or step.timeout:
                break
    env = RealHockeyEnv("strong")
    np.testing.assert_array_equal(played(env, 3), played(env, 3))
