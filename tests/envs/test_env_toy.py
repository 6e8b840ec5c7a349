"""The toy tasks' answers are what their documentation says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from worldmpc.config import EnvConfig
from worldmpc.envs import make_env, make_envs
from worldmpc.envs.toy import Balance, Counter, Identity, LinearQuadratic, PointMass


def episode_return(env: Any, policy: Any, seed: int) -> tuple[float, np.ndarray]:
    obs, _ = env.reset(seed=seed)
    first, total = obs, 0.0
    while True:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total += reward
        if terminated or truncated:
            return total, first


def test_pointmass_optimum_is_reached_and_not_exceeded() -> None:
    env = make_env("toy/pointmass")
    generator = np.random.default_rng(0)
    totals = []
    for seed in range(40):
        total, first = episode_return(env, lambda obs: -obs / PointMass.SPEED, seed)
        best = PointMass.optimal_return(first)
        assert total == pytest.approx(best, abs=1e-4)
        totals.append(best)
        weaker, _ = episode_return(env, lambda obs: generator.uniform(0.5, 1.0) * np.clip(-obs / PointMass.SPEED, -1, 1), seed)
        assert weaker < best
    positions = generator.uniform(-1, 1, (20_000, 2))
    mean = np.mean([PointMass.optimal_return(position) for position in positions])
    assert mean == pytest.approx(PointMass.OPTIMAL_RETURN, abs=0.05)


def test_pointmass_random_return() -> None:
    env = PointMass()
    generator = np.random.default_rng(0)
    totals = [episode_return(env, lambda obs: generator.uniform(-1, 1, 2), seed)[0] for seed in range(400)]
    assert np.mean(totals) == pytest.approx(PointMass.RANDOM_RETURN, abs=4 * np.std(totals) / 20)


def test_balance_optimum_and_random_return() -> None:
    env = Balance()
    generator = np.random.default_rng(0)
    assert {episode_return(env, lambda obs: np.clip(-11 * obs, -1, 1), seed)[0] for seed in range(40)} == {Balance.OPTIMAL_RETURN}
    totals = [episode_return(env, lambda obs: generator.uniform(-1, 1, 1), seed)[0] for seed in range(1500)]
    assert np.mean(totals) == pytest.approx(Balance.RANDOM_RETURN, abs=4 * np.std(totals) / 1500**0.5)


def test_balance_terminates_outside_the_band() -> None:
    env = Balance()
    env.reset(seed=0)
    for _ in range(100):
        obs, _, terminated, truncated, _ = env.step(np.ones(1))
        assert terminated == (abs(obs[0]) > 1) and not truncated
        if terminated:
            return
    raise AssertionError("a constant push must leave the band")


class Controller:
    """Applies gains [T, 1, 2] in turn."""

    def __init__(self, gains: np.ndarray) -> None:
        self.gains, self.forces = list(gains), []

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.forces.append(-(self.gains.pop(0) @ obs))
        return self.forces[-1]


def test_linear_quadratic_optimum_is_reached_and_not_exceeded() -> None:
    env, gains = make_env("toy/linear-quadratic"), LinearQuadratic.riccati()[0]
    generator = np.random.default_rng(0)
    for seed in range(20):
        total, first = episode_return(env, Controller(gains), seed)
        best = LinearQuadratic.optimal_return(first)
        assert total == pytest.approx(best, abs=1e-5)
        for other in (0.8 * gains, 1.2 * gains, gains + 0.05 * generator.standard_normal(gains.shape), np.flip(gains, 0)):
            assert episode_return(env, Controller(other), seed)[0] < total


def test_linear_quadratic_optimum_needs_no_bounds() -> None:
    """Forces are linear in the start, so those of the corners of its box are the largest."""
    gains = LinearQuadratic.riccati()[0]
    largest = 0.0
    for corner in ((0.3, 0.3), (0.3, -0.3)):
        state = np.array(corner)
        for gain in gains:
            force = -gain @ state
            largest = max(largest, abs(float(force[0])))
            state = LinearQuadratic.A @ state + LinearQuadratic.B @ force
    assert largest == pytest.approx(0.982, abs=5e-4)


def test_linear_quadratic_returns_in_closed_form() -> None:
    """The second moments of the state give the mean returns; a sample of episodes agrees."""
    cls = LinearQuadratic
    moments, random = np.eye(2) * cls.START**2 / 3, 0.0
    assert -float(np.trace(cls.riccati()[1] @ moments)) == pytest.approx(cls.OPTIMAL_RETURN, abs=1e-4)
    for _ in range(cls.LENGTH):
        random -= float(np.trace(cls.Q @ moments)) + float(cls.R[0, 0]) / 3
        moments = cls.A @ moments @ cls.A.T + cls.B @ cls.B.T / 3
    assert random == pytest.approx(cls.RANDOM_RETURN, abs=0.005)
    generator = np.random.default_rng(0)
    totals = [episode_return(cls(), lambda obs: generator.uniform(-1, 1, 1), seed)[0] for seed in range(500)]
    assert np.mean(totals) == pytest.approx(random, abs=4 * np.std(totals) / 500**0.5)
    assert sorted(np.linalg.eigvals(cls.A)) == pytest.approx([0.929, 1.071], abs=1e-3)


@pytest.mark.parametrize("discrete", [False, True])
def test_identity_answers(discrete: bool) -> None:
    env, generator = Identity(discrete=discrete), np.random.default_rng(0)
    echo = (lambda obs: int(obs.argmax())) if discrete else (lambda obs: obs)
    guess = (lambda obs: int(generator.integers(3))) if discrete else (lambda obs: generator.uniform(-1, 1, 1))
    assert {episode_return(env, echo, seed)[0] for seed in range(20)} == {Identity.OPTIMAL_RETURN}
    totals = [episode_return(env, guess, seed)[0] for seed in range(500)]
    assert np.mean(totals) == pytest.approx(Identity.RANDOM_RETURN, abs=4 * np.std(totals) / 500**0.5)


@pytest.mark.parametrize("task", ["toy/identity", "toy/identity-discrete"])
def test_identity_in_the_common_form(task: str) -> None:
    env = make_env(task)
    assert episode_return(env, lambda obs: obs, 0)[0] == Identity.OPTIMAL_RETURN
    shown = [env.reset(seed=1)[0], *(env.step(env.action_space.sample())[0] for _ in range(19))]
    assert len(np.unique(shown, axis=0)) == (3 if env.env_spec.discrete else 20)
    again = [env.reset(seed=1)[0], *(env.step(env.action_space.sample())[0] for _ in range(19))]
    assert np.array_equal(shown, again)
    assert env.env_spec.episode_length == 20 and not env.env_spec.can_terminate


def test_counter_follows_its_schedule() -> None:
    env = Counter(env_id=7, lengths=(2, 1), ends=("terminated", "truncated", "truncated"))
    seen = []
    for _ in range(4):
        env.reset()
        while True:
            obs, reward, terminated, truncated, info = env.step(np.zeros(1))
            assert obs[0] == reward and obs[2] == 7
            if terminated or truncated:
                seen.append((int(obs[0]), int(obs[1]), terminated, info["success"]))
                break
    assert seen == [(2, 0, True, False), (1, 1, False, True), (2, 2, False, False), (1, 3, True, True)]
    with pytest.raises(RuntimeError, match="after the end"):
        env.step(np.zeros(1))


def test_specs_and_time_limit_override() -> None:
    assert make_envs("toy/pointmass").spec.can_terminate is False
    assert make_envs("toy/balance").spec.can_terminate is True
    assert make_envs("toy/pointmass").spec.episode_length == 50
    assert make_envs("toy/pointmass", EnvConfig(episode_length=80)).spec.episode_length == 80
    assert make_envs("toy/linear-quadratic").spec.episode_length == 30
    assert make_envs("toy/linear_quadratic", EnvConfig(episode_length=7)).spec.episode_length == 7
    assert make_envs("toy/identity", EnvConfig(episode_length=40)).spec.episode_length == 40
    assert make_envs("toy/counter", EnvConfig(num_envs=2)).reset().tolist() == [[0, 0, 0], [0, 0, 1]]
