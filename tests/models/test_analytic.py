"""Known equations are those of the environments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import make_env
from worldmpc.models.analytic import ANALYTIC, analytic_dynamics
from worldmpc.models.composed import Dynamics
from worldmpc.types import ModelStep

# Where states are drawn from, wide enough to meet every bound.
RANGES: dict[str, tuple[float, ...]] = {
    "gym/CartPole-v1": (2.5, 3.0, 0.25, 3.0),
    "gym/Pendulum-v1": (12.0, 8.0),
    "gym/MountainCar-v0": (0.95, 0.075),
    "gym/MountainCarContinuous-v0": (0.95, 0.075),
    "gym/Acrobot-v1": (3.14, 3.14, 12.5, 28.0),
    "toy/pointmass": (2.0, 2.0),
    "toy/balance": (1.1,),
    "toy/linear-quadratic": (2.0, 2.0),
}

CENTRE = {"gym/MountainCar-v0": (-0.3, 0.0), "gym/MountainCarContinuous-v0": (-0.3, 0.0)}
TERMINATES = {"gym/CartPole-v1", "gym/MountainCar-v0", "gym/MountainCarContinuous-v0", "gym/Acrobot-v1", "toy/balance"}
ROUNDED = {"gym/Pendulum-v1", "gym/MountainCarContinuous-v0", "toy/pointmass"}
STATES = {"toy/pointmass": "_position", "toy/balance": "_position", "toy/linear-quadratic": "_state"}


def random_states(task: str, number: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.uniform(-1, 1, (number, len(RANGES[task]))) * RANGES[task] + np.array(CENTRE.get(task, 0.0))


def random_actions(task: str, number: int) -> np.ndarray:
    dynamics, generator = ANALYTIC[task], np.random.default_rng(1)
    if dynamics.discrete:
        return np.eye(dynamics.action_dim)[generator.integers(dynamics.action_dim, size=number)]
    return generator.uniform(-1.2, 1.2, (number, dynamics.action_dim)).astype(np.float32).astype(np.float64)  # also beyond the bounds


def put(env: Any, task: str, state: np.ndarray) -> None:
    env.reset(seed=0)
    name = STATES.get(task, "state")
    setattr(env.unwrapped, name, float(state[0]) if task == "toy/balance" else state.copy())


def step_env(task: str, states: np.ndarray, actions: np.ndarray, repeat: int = 1) -> tuple[np.ndarray, ...]:
    """Step the environment from every state: exact next states, observations, rewards, terminations."""
    env = make_env(task, config=EnvConfig(action_repeat=repeat))
    following, rows = [], []
    for state, action in zip(states, actions, strict=True):
        put(env, task, state)
        rows.append(env.step(action)[:3])
        following.append(np.ravel(np.array(getattr(env.unwrapped, STATES.get(task, "state")), np.float64)))
    obs, reward, terminated = (np.array(part) for part in zip(*rows, strict=True))
    return np.array(following), obs, reward, terminated


def same(step: ModelStep, reward: np.ndarray, terminated: np.ndarray, tolerance: float) -> bool:
    return np.allclose(step.reward.numpy(), reward, atol=tolerance, rtol=tolerance) and np.array_equal(step.cont.numpy(), 1.0 - terminated)


@pytest.mark.parametrize("task", ANALYTIC)
def test_a_step_is_the_environments(task: str) -> None:
    dynamics = analytic_dynamics(task)
    states, actions = random_states(task, 400), random_actions(task, 400)
    following, obs, reward, terminated = step_env(task, states, actions)
    assert terminated.any() == (task in TERMINATES) and not terminated.all()
    step = dynamics.step(torch.from_numpy(states), torch.from_numpy(actions))
    assert step.z.dtype == step.reward.dtype == step.cont.dtype == torch.float64
    # Some environments reckon with their float32 action, or round their state, in float32.
    exact = 1e-6 if task in ROUNDED else 1e-12
    np.testing.assert_allclose(step.z.numpy(), following, atol=exact, rtol=exact)
    assert same(step, reward, terminated, exact)
    np.testing.assert_allclose(dynamics.observe(step.z).numpy(), obs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("task", ["gym/Pendulum-v1", "gym/MountainCar-v0", "gym/MountainCarContinuous-v0", "gym/Acrobot-v1"])
def test_bounds_are_met(task: str) -> None:
    """The states above reach what the equations clip, so that the test above has seen it."""
    following = step_env(task, random_states(task, 400), random_actions(task, 400))[0]
    speeds = {"gym/Pendulum-v1": {1: 8.0}, "gym/Acrobot-v1": {2: 4 * np.pi, 3: 9 * np.pi}}.get(task, {1: 0.07})
    for column, speed in speeds.items():
        assert (np.abs(following[:, column]) > speed - 1e-6).sum() > 3
    if "MountainCar" in task:
        wall = following[:, 0] < -1.2 + 1e-6
        assert (following[wall, 1] == 0).sum() > 3


@pytest.mark.parametrize("task", ANALYTIC)
def test_an_episode_is_followed_from_observations(task: str) -> None:
    """As agents do it: float32 observations in, the next ones out."""
    env, dynamics = make_env(task, seed=3), analytic_dynamics(task)
    actions = random_actions(task, 60).astype(np.float32)
    before, after, rewards, ends = [env.reset()[0]], [], [], []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        after.append(obs)
        rewards.append(reward)
        ends.append(terminated)
        before.append(env.reset()[0] if terminated or truncated else obs)
    obs = torch.from_numpy(np.array(before[:-1]))
    step = dynamics.step(dynamics.encode(obs), torch.from_numpy(actions))
    assert step.z.dtype == torch.float32 and dynamics.encode(obs).shape == (60, ANALYTIC[task].state_dim)
    np.testing.assert_allclose(dynamics.observe(dynamics.encode(obs)).numpy(), obs.numpy(), atol=1e-6)
    np.testing.assert_allclose(dynamics.observe(step.z).numpy(), np.array(after), atol=2e-5, rtol=1e-5)
    assert same(step, np.array(rewards), np.array(ends), 2e-5)


@pytest.mark.parametrize("task", ANALYTIC)
def test_any_leading_dimensions(task: str) -> None:
    dynamics = analytic_dynamics(task)
    z, action = torch.from_numpy(random_states(task, 12)), torch.from_numpy(random_actions(task, 12))
    flat = dynamics.step(z, action)
    deep = dynamics.step(z.view(2, 3, 2, -1), action.view(2, 3, 2, -1))
    assert torch.equal(deep.z.view_as(flat.z), flat.z) and deep.reward.shape == deep.cont.shape == (2, 3, 2)
    assert torch.equal(deep.reward.flatten(), flat.reward) and torch.equal(deep.cont.flatten(), flat.cont)
    single = dynamics.step(z[0], action[0])
    assert torch.allclose(single.z, flat.z[0], atol=1e-14) and single.reward.shape == single.cont.shape == ()
    obs = dynamics.observe(z.view(2, 3, 2, -1))
    assert torch.equal(dynamics.observe(dynamics.encode(obs)).round(decimals=10), obs.round(decimals=10))


@pytest.mark.parametrize("task", ANALYTIC)
def test_gradients_are_those_of_finite_differences(task: str) -> None:
    dynamics = analytic_dynamics(task)
    # Within all bounds, and one-hot actions relaxed.
    z = (0.3 * torch.from_numpy(random_states(task, 6))).requires_grad_()
    action = (0.4 * torch.from_numpy(random_actions(task, 6)).abs() + 0.1).requires_grad_()

    def two_steps(z: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        first = dynamics.step(z, action)
        second = dynamics.step(first.z, action)
        return dynamics.observe(second.z), *(reward for reward in (first.reward, second.reward) if reward.requires_grad)

    assert torch.autograd.gradcheck(two_steps, (z, action))
    if not ANALYTIC[task].discrete:
        return
    force = torch.autograd.grad(dynamics.step(z, action).z[..., -1].sum(), action)[0]
    assert (force[:, -1] * force[:, 0] < 0).all(), "the two ends of the choice push to opposite sides"


@pytest.mark.parametrize("task", ["gym/Pendulum-v1", "gym/CartPole-v1", "gym/MountainCarContinuous-v0"])
def test_repeated_actions(task: str) -> None:
    states, actions = random_states(task, 200), random_actions(task, 200)
    following, _, reward, terminated = step_env(task, states, actions, repeat=4)
    step = analytic_dynamics(task, action_repeat=4).step(torch.from_numpy(states), torch.from_numpy(actions))
    np.testing.assert_allclose(step.z.numpy(), following, atol=1e-6, rtol=1e-6)
    assert same(step, reward, terminated, 1e-5)
    if task == "gym/CartPole-v1":
        assert set(reward) == {1.0, 2.0, 3.0, 4.0}


def test_all_are_dynamics() -> None:
    assert set(ANALYTIC) == set(RANGES)
    for task in ANALYTIC:
        env, dynamics = make_env(task), analytic_dynamics(task)
        assert isinstance(dynamics, Dynamics)
        assert (dynamics.action_dim, dynamics.discrete) == (env.env_spec.action_dim, env.env_spec.discrete)
        assert dynamics.encode(torch.zeros(env.env_spec.obs_shape)).shape == (dynamics.state_dim,)
        repeated = analytic_dynamics(task, action_repeat=2)
        assert isinstance(repeated, Dynamics) and repeated.state_dim == dynamics.state_dim


def test_unknown_task() -> None:
    with pytest.raises(
        ConfigError, match=r"dynamics.name: no known equations for gym/Ant-v5; there are for gym/CartPole-v1, .*agent=mbmpc"
    ):
        analytic_dynamics("gym/Ant-v5")
