"""Rescaling, action repeat, time limits."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from worldmpc.config import EnvConfig
from worldmpc.envs import EnvError, make_env, make_envs
from worldmpc.envs.toy import PointMass


class Recorder(gymnasium.Env[Any, Any]):
    """Remembers actions; reward 1, 10, 100, ... up to a million, then anew; ends after ``length`` steps."""

    def __init__(self, low: Any = -1.0, high: Any = 1.0, *, length: int = 0, terminates: bool = True, dtype: Any = np.float64) -> None:
        self.action_space = Box(np.asarray(low, dtype) * np.ones(2, dtype), np.asarray(high, dtype) * np.ones(2, dtype), dtype=dtype)
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float64)
        self.length, self.terminates = length, terminates
        self.actions: list[Any] = []
        self.time = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.time = 0
        return np.zeros(1), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.time += 1
        last = self.time == self.length
        return np.full(1, self.time), 10.0 ** ((self.time - 1) % 7), last and self.terminates, last and not self.terminates, {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_are_clipped_and_mapped_to_the_bounds(dtype: Any) -> None:
    inner = Recorder([-2.0, 0.0], [4.0, 0.7], dtype=dtype)
    env = make_env(inner)
    env.reset()
    for action in ([-1, -1], [0, 0], [1, 1], [-5, 5], [0.5, -0.5]):
        env.step(np.array(action, np.float32))
    expected = [[-2, 0], [1, 0.35], [4, 0.7], [-2, 0.7], [2.5, 0.175]]
    np.testing.assert_allclose(np.stack(inner.actions), expected, rtol=1e-6)
    assert all(action.dtype == dtype for action in inner.actions)


def test_unit_bounds_pass_actions_unchanged() -> None:
    inner = Recorder()
    env = make_env(inner)
    env.reset()
    action = np.array([0.1, -0.3], np.float32)
    env.step(action)
    assert inner.actions[0].tolist() == action.astype(np.float64).tolist()
    env.step(np.array([3.0, -1.5], np.float32))
    assert inner.actions[1].tolist() == [1.0, -1.0]


def test_every_corner_stays_within_awkward_bounds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        low = generator.normal(size=2) * 10.0 ** generator.integers(-3, 3)
        inner = Recorder(low, low + generator.random(2), dtype=np.float32)
        env = make_env(inner)
        env.reset()
        env.step(np.array([-1, 1], np.float32))
        env.step(np.array([1, -1], np.float32))


@pytest.mark.parametrize("terminates", [True, False])
def test_action_repeat_sums_rewards_and_stops_at_the_end(terminates: bool) -> None:
    inner = Recorder(length=5, terminates=terminates)
    env = make_env(inner, config=EnvConfig(action_repeat=3))
    env.reset()
    assert env.step(np.zeros(2))[:4] == (np.array([3.0]), 111.0, False, False)
    obs, reward, terminated, truncated, _ = env.step(np.zeros(2))
    assert (obs[0], reward, terminated, truncated) == (5.0, 11000.0, terminates, not terminates)
    assert len(inner.actions) == 5
    assert env.env_spec.action_repeat == 3


def test_success_within_a_repeated_action_counts() -> None:
    class Passing(Recorder):
        reports = iter(({}, {"success": 1.0}, {"success": 0.0}, {"is_success": False}, {}, {}, {}, {}, {}))

        def step(self, action: Any) -> Any:
            return (*super().step(action)[:4], next(self.reports))

    env = make_env(Passing(), config=EnvConfig(action_repeat=3))
    env.reset()
    assert [env.step(np.zeros(2))[4] for _ in range(3)] == [{"success": 1.0}, {"success": 0.0}, {}]


@pytest.mark.parametrize("own", [None, 7, 20])
@pytest.mark.parametrize("wanted", [None, 3, 8])
@pytest.mark.parametrize("repeat", [1, 2])
def test_the_shorter_time_limit_truncates(own: int | None, wanted: int | None, repeat: int) -> None:
    env: Any = Recorder() if own is None else TimeLimit(Recorder(), own)
    envs = make_envs(env, EnvConfig(episode_length=wanted, action_repeat=repeat))
    limits = [limit for limit in (None if own is None else -(-own // repeat), wanted) if limit is not None]
    expected = min(limits, default=None)
    assert envs.spec.episode_length == expected
    envs.reset()
    steps = [envs.step(torch.zeros(1, 2)) for _ in range(25)]
    ends = [index + 1 for index, step in enumerate(steps) if step.truncated]
    assert ends == ([] if expected is None else list(range(expected, 26, expected)))
    assert not any(step.terminated for step in steps)
    if own == 7 and wanted is None and repeat == 2:
        assert steps[3].reward == 10.0**6  # the last decision has one simulator step left


def test_termination_at_the_time_limit_keeps_both_flags() -> None:
    envs = make_envs(TimeLimit(Recorder(length=4), 4))
    envs.reset()
    step = [envs.step(torch.zeros(1, 2)) for _ in range(4)][-1]
    assert step.terminated and step.truncated


class Choices(gymnasium.Env[Any, Any]):
    """Remembers choices out of 5, 6 and 7."""

    def __init__(self) -> None:
        self.action_space = Discrete(3, start=5)
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float64)
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(1), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.actions.append(action)
        return np.full(1, float(action)), 1.0, False, False, {}


def test_discrete_actions_are_one_hot_vectors() -> None:
    inner = Choices()
    env = make_env(inner)
    assert env.env_spec.discrete and env.env_spec.action_dim == 3
    env.reset()
    for action in ([1, 0, 0], [0, 0, 1], [0, 1, 0], [0.2, 0.3, 0.1]):
        env.step(np.array(action, np.float32))
    assert inner.actions == [5, 7, 6, 6]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_discrete_actions_of_foreign_vector_environments(mode: AutoresetMode) -> None:
    made = [Choices(), Choices()]
    vector = SyncVectorEnv([lambda: made[0], lambda: made[1]], autoreset_mode=mode)
    with make_envs(vector) as envs:
        assert envs.spec.discrete and envs.spec.action_dim == 3
        envs.reset()
        step = envs.step(torch.eye(3)[[2, 0]])
    assert step.next_obs.tolist() == [[7.0], [5.0]] and [env.actions for env in made] == [[7], [5]]


def test_box_actions_are_not_called_discrete() -> None:
    assert not make_env(Recorder()).env_spec.discrete


@pytest.mark.parametrize("wrong", [np.array([5.0]), 5.0, np.zeros((1, 3)), np.zeros(2)], ids=["one", "number", "row", "two"])
@pytest.mark.parametrize("when", ["reset", "step"])
def test_observations_of_another_shape_are_refused(wrong, when):
    """They would be repeated to the right shape, or taken as they are."""

    class Odd(PointMass):
        def __init__(self):
            super().__init__()
            self.observation_space = Box(-np.inf, np.inf, (3,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return (wrong if when == "reset" else np.zeros(3)), {}

        def step(self, action):
            return wrong, 0.0, False, False, {}

    envs = make_envs(Odd)
    with pytest.raises(EnvError, match=rf"environment 0 raised ValueError in {when}: an observation of shape .* instead of \[3\]"):
        envs.reset()
        envs.step(torch.zeros(1, 2))


def test_a_reset_in_the_old_style_is_refused():
    """An observation of two entries can be unpacked as if it were one and an info."""

    class Old(PointMass):
        def __init__(self):
            super().__init__()
            self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.array([3.0, 7.0])

    with pytest.raises(EnvError, match="reset returns observation and info"):
        make_envs(Old).reset()
