"""The DeepMind Control Suite: names, facts, determinism, time limits, frames."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from worldmpc.config import EnvConfig
from worldmpc.envs import make_env, make_envs, rendering_backend
from worldmpc.envs.dmc import TASKS


def test_the_written_list_is_the_suites() -> None:
    from dm_control import suite

    assert sorted(TASKS.values()) == sorted(suite.ALL_TASKS)


@pytest.mark.parametrize(
    ("task", "obs", "actions"),
    [
        ("cartpole-swingup", 5, 1),
        ("walker-walk", 24, 6),
        ("reacher-easy", 6, 2),
        ("cup-catch", 8, 2),
        ("finger-turn-hard", 12, 2),
        ("cheetah-run", 17, 6),
        ("quadruped-escape", 101, 12),
    ],
)
def test_facts_of_tasks(task: str, obs: int, actions: int) -> None:
    envs = make_envs(task)
    spec = envs.spec
    assert (spec.name, spec.obs_shape, spec.action_dim) == (f"dmc/{task}", (obs,), actions)
    assert (spec.episode_length, spec.action_repeat, spec.can_terminate) == (500, 2, False)
    assert envs.reset().shape == (1, obs)
    for _ in range(3):
        assert envs.step(torch.rand(1, actions) * 2 - 1).valid.all()


def play(env: Any, seed: int, actions: np.ndarray) -> np.ndarray:
    obs, _ = env.reset(seed=seed)
    rows = [obs]
    for action in actions:
        obs, reward, *_ = env.step(action)
        rows.append(np.append(obs, reward)[:-1])
    return np.stack(rows)


@pytest.mark.parametrize("task", ["cartpole-swingup", "walker-walk", "reacher-easy", "cup-catch", "fish-swim", "lqr-lqr-2-1"])
def test_an_episode_follows_from_its_seed_whatever_came_before(task: str) -> None:
    fresh, used = make_env(task, seed=1), make_env(task, seed=2)
    actions = np.random.default_rng(0).uniform(-1, 1, (40, *fresh.action_space.shape)).astype(np.float32)
    play(used, 11, actions[::-1])
    expected = play(fresh, 3, actions)
    assert np.array_equal(expected, play(used, 3, actions))
    assert np.array_equal(expected, play(used, 3, actions))
    assert not np.array_equal(expected[0], play(used, 4, actions[:0])[0])


def test_observations_and_rewards_are_the_suites() -> None:
    from dm_control import suite

    raw = suite.load("cartpole", "swingup", task_kwargs={"random": 5})
    env = make_env("cartpole-swingup")
    obs, _ = env.reset(seed=5)
    step = raw.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 1)).astype(np.float32):
        expected = np.concatenate([step.observation["position"], step.observation["velocity"]])
        np.testing.assert_array_equal(obs, expected.astype(np.float32))
        first, step = raw.step(action), raw.step(action)
        obs, reward, *_ = env.step(action)
        assert reward == first.reward + step.reward


def test_episodes_end_by_time_limit_alone() -> None:
    envs = make_envs("cartpole-swingup")
    envs.reset()
    steps = [envs.step(torch.zeros(1, 1)) for _ in range(501)]
    assert [bool(step.truncated) for step in steps] == [False] * 499 + [True, False]
    assert not any(step.terminated for step in steps)
    assert not torch.equal(steps[499].obs, steps[499].next_obs)


@pytest.mark.parametrize(("length", "repeat"), [(30, 2), (30, 1), (1010, 1)])
def test_time_limit_override(length: int, repeat: int) -> None:
    envs = make_envs("reacher-easy", EnvConfig(episode_length=length, action_repeat=repeat))
    assert (envs.spec.episode_length, envs.spec.action_repeat) == (length, repeat)
    envs.reset()
    ends = [bool(envs.step(torch.zeros(1, 2)).truncated) for _ in range(length + 1)]
    assert ends == [False] * (length - 1) + [True, False]


def test_odd_repeat_rounds_the_time_limit_up() -> None:
    assert make_envs("reacher-easy", EnvConfig(action_repeat=3)).spec.episode_length == 334


def test_lqr_alone_has_no_time_limit_and_terminates(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env("dmc/lqr-lqr_2_1", seed=1)
    assert env.env_spec.episode_length is None and env.env_spec.can_terminate
    assert (env.unwrapped.action_space.low == -1).all() and (env.unwrapped.action_space.high == 1).all()
    task = env.unwrapped._env.task
    monkeypatch.setattr(task, "_TERMINAL_TOL", 1e9)
    env.reset(seed=0)
    _, _, terminated, truncated, _ = env.step(np.zeros(1))
    assert terminated and not truncated


def test_lqr_is_the_same_system_in_every_environment() -> None:
    models = [make_env("dmc/lqr-lqr-2-1", seed=seed).unwrapped._env.physics.model.jnt_stiffness.copy() for seed in (1, 2)]
    assert np.array_equal(*models) and (models[0] > 0).any()


def test_training_is_quiet_and_frames_work_afterwards() -> None:
    code = (
        "import torch, worldmpc.envs as envs\n"
        "train = envs.make_envs('walker-walk'); train.reset(); train.step(torch.zeros(1, 6))\n"
        "import sys; print('quiet so far', file=sys.stderr)\n"
        "if envs.rendering_backend():\n"
        "    drawn = envs.make_envs('cartpole-swingup', render=True); drawn.reset()\n"
        "    frame = drawn.render()[0]; assert frame.shape == (320, 480, 3) and frame.std() > 5, frame.std()\n"
        "    drawn.close()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("quiet so far"), done.stderr


def test_rendering_backend_is_a_value_of_mujoco_gl_or_none() -> None:
    assert rendering_backend() in ("egl", "osmesa", "glfw", None)


@pytest.mark.parametrize("render", [False, True])
def test_a_backend_that_does_not_exist_is_one_line(render: bool) -> None:
    code = (
        "import worldmpc.envs as envs\nfrom worldmpc.config import ConfigError\n"
        f"try: envs.make_envs('cartpole-swingup', render={render})\n"
        "except ConfigError as error: assert str(error).startswith(\"MUJOCO_GL: cannot use 'bogus'\") and '\\n' not in str(error), error\n"
        "else: raise SystemExit('made')\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "bogus", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_failed_render_says_what_to_set() -> None:
    code = (
        "import worldmpc.envs as envs\n"
        "drawn = envs.make_envs('cartpole-swingup', render=True); drawn.reset()\n"
        "try: drawn.render()\n"
        "except envs.EnvError as error: assert 'MUJOCO_GL is disabled' in str(error), error\n"
        "else: raise SystemExit('rendered')\n"
        "drawn.step(__import__('torch').zeros(1, 1))\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "disabled", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
