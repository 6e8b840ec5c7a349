"""The toy tasks' answers are what their documentation says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from worldmpc.config import EnvConfig
from worldmpc.envs import make_env, make_envs
from worldmpc.envs.toy import Balance, Counter, PointMass


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
    assert make_envs("toy/counter", EnvConfig(num_envs=2)).reset().tolist() == [[0, 0, 0], [0, 0, 1]]
