"""From a name, a function or an object to environments; every way to get it wrong has a helpful answer."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Space

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import EnvError, canonical_task, list_tasks, make_env, make_envs
from worldmpc.envs import gym as gym_suite
from worldmpc.envs.toy import Balance, PointMass


class Shaped(gymnasium.Env[Any, Any]):
    """An environment of any spaces."""

    def __init__(self, observation: Space[Any] | None = None, action: Space[Any] | None = None) -> None:
        self.observation_space = observation or Box(-1, 1, (2,))
        self.action_space = action or Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("dmc/walker-walk", "dmc/walker-walk"),
        ("dmc/walker_walk", "dmc/walker-walk"),
        ("walker-walk", "dmc/walker-walk"),
        ("cup-catch", "dmc/cup-catch"),
        ("dmc/ball_in_cup-catch", "dmc/cup-catch"),
        ("ball-in-cup-catch", "dmc/cup-catch"),
        ("finger-turn_hard", "dmc/finger-turn-hard"),
        ("dmc/cartpole-swingup_sparse", "dmc/cartpole-swingup-sparse"),
        ("pointmass-easy", "dmc/point-mass-easy"),
        ("dmc/point_mass-hard", "dmc/point-mass-hard"),
        ("humanoid_CMU-run", "dmc/humanoid-cmu-run"),
        ("dog-run", "dmc/dog-run"),
        ("gym/Pendulum-v1", "gym/Pendulum-v1"),
        ("gym/ALE/Pong-v5", "gym/ALE/Pong-v5"),
        ("toy/balance", "toy/balance"),
    ],
)
def test_canonical_names(given: str, canonical: str) -> None:
    assert canonical_task(given) == canonical


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("dmc/cartpole-swingp", "task: unknown task 'dmc/cartpole-swingp'; did you mean dmc/cartpole-swingup"),
        ("walkr-walk", "did you mean dmc/walker-walk"),
        ("dmc/ball_in_cup-cach", "did you mean dmc/cup-catch"),
        ("Pendulum-v1", "did you mean gym/Pendulum-v1?"),
        ("pointmass", "did you mean toy/pointmass?"),
        ("gym/Pendulm-v1", "did you mean gym/Pendulum-v1"),
        ("gym/Nonsense-v0", "unknown task 'gym/Nonsense-v0'; `worldmpc tasks gym` lists all"),
        ("toy/balnce", "did you mean toy/balance?"),
        ("dcm/walker-walk", "unknown suite 'dcm' in 'dcm/walker-walk'; did you mean dmc/walker-walk?"),
        ("atari/pong", "unknown suite 'atari' in 'atari/pong'; one of dmc, gym, toy"),
        ("gym/no_such_module:Thing-v0", "gym/no_such_module:Thing-v0 needs the module no_such_module, which is not installed"),
        ("gym/:", "task: expected gym/<EnvId> or gym/<module>:<EnvId>, got 'gym/:'"),
        ("gym/", "task: expected gym/<EnvId> or gym/<module>:<EnvId>, got 'gym/'"),
        ("gym/a:b:C-v0", "task: expected gym/<EnvId> or gym/<module>:<EnvId>, got 'gym/a:b:C-v0'"),
        ("gym/FrozenLake-v1", "gym/FrozenLake-v1: observation space Discrete(16) is not supported, only Box"),
    ],
)
def test_unknown_and_unusable_tasks_name_the_way_out(task: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_envs(task)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ConfigError, match="dmc needs the package dm_control; pip install dm-control"):
        make_envs("dmc/walker-walk")

    def no_box2d(*args: Any, **kwargs: Any) -> None:
        raise gymnasium.error.DependencyNotInstalled('Box2D is not installed,\nrun `pip install "gymnasium[box2d]"`')

    monkeypatch.setattr(gym_suite.gymnasium, "make", no_box2d)
    with pytest.raises(ConfigError) as caught:
        make_envs("gym/LunarLanderContinuous-v3")
    assert str(caught.value) == (
        "task: gym/LunarLanderContinuous-v3 needs a package that is not installed: "
        'Box2D is not installed, run `pip install "gymnasium[box2d]"`'
    )


@pytest.mark.parametrize(
    ("observation", "action", "expected"),
    [
        (Dict({"a": Box(-1, 1, (2,))}), None, "observation space Dict.* is not supported, only Box; gymnasium.wrappers.Flatten"),
        (Discrete(4), None, r"observation space Discrete\(4\) is not supported"),
        (Box(0, 255, (64, 64, 3), np.uint8), None, "images are not supported yet"),
        (Box(-1, 1, (3, 4)), None, "only a Box with one axis"),
        (Box(-1, 1, ()), None, "only a Box with one axis"),
        (None, MultiDiscrete([2, 2]), "action space MultiDiscrete.* is not supported"),
        (None, Box(-1, 1, (2, 2)), "only Discrete and a float Box with one axis"),
        (None, Box(0, 3, (2,), np.int64), "only Discrete and a float Box with one axis"),
        (None, Box(-np.inf, np.inf, (2,)), "unbounded"),
        (None, Box(np.array([-1, -1], np.float32), np.array([1, np.inf], np.float32)), "unbounded"),
        (None, Box(-1e10, 1e10, (2,)), "unbounded"),
        (None, Box(-1.0, np.finfo(np.float32).max, (2,)), "unbounded"),
    ],
)
def test_unsupported_spaces_are_refused(observation: Any, action: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^Shaped: .*{expected}"):
        make_envs(Shaped(observation, action))


def test_environment_objects_and_functions() -> None:
    made = []

    def factory() -> PointMass:
        made.append(PointMass())
        return made[-1]

    envs = make_envs(factory, EnvConfig(num_envs=3))
    assert len(made) == 3 and len({id(env) for env in made}) == 3
    assert envs.reset().shape == (3, 2)
    single = make_envs(Balance())
    assert single.spec.name == "Balance" and single.spec.can_terminate and single.spec.episode_length is None
    assert single.reset().shape == (1, 1)
    with pytest.raises(ConfigError, match="function that makes it"):
        make_envs(Balance(), EnvConfig(num_envs=2))
    with pytest.raises(ConfigError, match="expected the function to return a gymnasium.Env, got int"):
        make_envs(lambda: 3)  # type: ignore[arg-type, return-value]


def test_integer_and_double_observations_become_float32() -> None:
    envs = make_envs(Shaped(Box(0, 9, (3,), np.int64)))
    obs = envs.reset()
    assert obs.dtype == torch.float32 and torch.equal(obs, obs.round())
    wide = make_env(Shaped(Box(-np.inf, 1e300, (3,), np.float64))).observation_space
    assert wide == Box(-np.inf, np.inf, (3,), np.float32)


def test_make_env_is_a_plain_gymnasium_environment() -> None:
    env = make_env("toy/pointmass", seed=4)
    assert env.action_space == Box(-1, 1, (2,), np.float32)
    first, info = env.reset()
    assert first.dtype == np.float32 and info == {}
    assert np.array_equal(first, env.reset(seed=4)[0])
    assert not np.array_equal(first, env.reset()[0])
    assert len(env.step(np.zeros(2))) == 5


def test_list_tasks() -> None:
    tasks = list_tasks()
    assert {"dmc/cup-catch", "gym/Pendulum-v1", "toy/counter"} <= set(tasks)
    assert list_tasks("toy") == [
        *("toy/pointmass", "toy/balance", "toy/linear-quadratic", "toy/identity", "toy/identity-discrete", "toy/counter"),
    ]
    assert len(list_tasks("dmc")) == 51
    assert all(canonical_task(task) == task for task in tasks)
    with pytest.raises(ConfigError, match="one of dmc, gym, toy"):
        list_tasks("atari")


def test_gym_time_limits_and_termination() -> None:
    pendulum = make_envs("gym/Pendulum-v1").spec
    assert (pendulum.episode_length, pendulum.can_terminate, pendulum.action_repeat) == (200, False, 1)
    assert make_envs("gym/Hopper-v5").spec.can_terminate
    assert make_envs("gym/MountainCarContinuous-v0").spec.can_terminate
    assert make_envs("gym/Pendulum-v1", EnvConfig(action_repeat=3)).spec.episode_length == 67
    longer = make_envs("gym/Pendulum-v1", EnvConfig(episode_length=250, action_repeat=2))
    assert longer.spec.episode_length == 250
    longer.reset()
    ends = [bool(longer.step(torch.zeros(1, 1)).truncated) for _ in range(250)]
    assert ends == [False] * 249 + [True]


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "Pusher-v5", "HumanoidStandup-v5", "Pendulum-v1"])
def test_environments_said_never_to_terminate_do_not(name: str) -> None:
    envs = make_envs(f"gym/{name}", EnvConfig(action_repeat=5))
    assert not envs.spec.can_terminate
    envs.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        action = torch.rand(1, envs.spec.action_dim, generator=generator) * 2 - 1
        assert not envs.step(action.sign()).terminated.any()


def test_module_ids_are_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tasks.py").write_text(
        "import gymnasium\nfrom worldmpc.envs.toy import Balance\n"
        "gymnasium.register('OwnBalance-v0', entry_point=Balance, max_episode_steps=30)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    envs = make_envs("gym/own_tasks:OwnBalance-v0")
    assert envs.spec.name == "gym/own_tasks:OwnBalance-v0" and envs.spec.episode_length == 30 and envs.spec.can_terminate
    undrawn = make_envs("gym/own_tasks:OwnBalance-v0", render=True)
    undrawn.reset()
    with pytest.raises(EnvError, match="gives no frames; make it with render_mode='rgb_array'"):
        undrawn.render()
    gymnasium.registry.pop("OwnBalance-v0")


def test_module_that_cannot_be_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_typo.py").write_text("def oops(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^task: gym/own_typo:A-v0: importing own_typo raised SyntaxError: .*own_typo.py, line 1"):
        make_envs("gym/own_typo:A-v0")


class Picky(PointMass):
    """Refuses to be made for frames, or to be made at all."""

    def __init__(self, render_mode: str | None = None, refuse: bool = False) -> None:
        assert render_mode is None, "no frames\nhere"
        if refuse:
            raise OSError("no robot\nconnected")
        super().__init__()


def test_environment_that_refuses_frames_is_made_without() -> None:
    gymnasium.register("Picky-v0", entry_point=Picky, max_episode_steps=10)
    envs = make_envs("gym/Picky-v0", render=True)
    envs.reset()
    with pytest.raises(EnvError, match=r"^gym/Picky-v0: .*") as caught:
        envs.render()
    assert "\n" not in str(caught.value)
    assert envs.step(torch.zeros(1, 2)).valid.all()
    gymnasium.registry.pop("Picky-v0")


@pytest.mark.parametrize("workers", ["sync", "async"])
@pytest.mark.parametrize("where", ["everywhere", "second"])
def test_constructor_that_raises_is_one_line(workers: Any, where: str, capfd: pytest.CaptureFixture[str]) -> None:
    gymnasium.register("Picky-v0", entry_point=Picky, kwargs={"refuse": True})
    made: list[int] = []
    parent = os.getpid()

    def second() -> PointMass:
        made.append(0)
        return Picky(refuse=len(made) > 1 or os.getpid() != parent)

    task = "gym/Picky-v0" if where == "everywhere" else second
    with pytest.raises(EnvError) as caught:
        make_envs(task, EnvConfig(num_envs=2, workers=workers))
    gymnasium.registry.pop("Picky-v0")
    name, index = ("gym/Picky-v0", 0) if where == "everywhere" else ("second", 1 if workers == "sync" else 0)
    assert str(caught.value) == f"{name}: environment {index} could not be made: OSError: no robot connected"
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(EnvError, match="environment 0 could not be made: OSError: no robot connected"):
        make_env(lambda: Picky(refuse=True))


def test_factory_without_frames_says_how_to_make_them() -> None:
    envs = make_envs(PointMass, render=True)
    envs.reset()
    with pytest.raises(EnvError, match="^PointMass: this environment gives no frames; make it with render_mode='rgb_array'$"):
        envs.render()


def test_nothing_heavy_is_imported_or_set_before_it_is_needed() -> None:
    code = (
        "import os, sys, worldmpc.envs as envs\n"
        "envs.list_tasks('dmc'); envs.canonical_task('walker-walk'); envs.make_envs('toy/balance').reset()\n"
        "assert not {'dm_control', 'mujoco'} & set(sys.modules), sorted(sys.modules)\n"
        "assert 'MUJOCO_GL' not in os.environ\n"
    )
    environment = {key: value for key, value in __import__("os").environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
