"""The true simulator as a model: its steps are the environment's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import GuardedEnv, dmc, gym, make_env
from worldmpc.envs.simulator_state import SimulatorState
from worldmpc.envs.wrappers import adapt
from worldmpc.models.composed import ComposedModel, Dynamics, check_model
from worldmpc.models.simulator import SimulatorModel

SUITES = {"dmc": dmc, "gym": gym}
TASKS = ["gym/InvertedPendulum-v5", "gym/HalfCheetah-v5", "dmc/cartpole-swingup", "gym/Ant-v5", "dmc/reacher-easy"]


def maker(task: str, **config: Any) -> Callable[[], GuardedEnv]:
    """Return a function that makes an environment in the common form, with the simulator's state."""

    def make() -> GuardedEnv:
        suite, _, name = task.partition("/")
        made = SUITES[suite].make(name, unlimited="episode_length" in config)
        return adapt(dataclasses.replace(made, env=SimulatorState(made.env)), EnvConfig(**config), seed=1)

    return make


class Recording(NamedTuple):
    """Steps of several episodes, one after the other."""

    obs: Tensor  # [T, Z]
    action: Tensor  # [T, A]
    next_obs: Tensor  # [T, Z]
    reward: Tensor  # [T]
    terminated: Tensor  # [T]


def record(env: gymnasium.Env[Any, Any], episodes: int = 3, length: int = 25, push: float = 1.0) -> Recording:
    generator, rows = np.random.default_rng(0), []
    assert env.action_space.shape is not None
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode + 5)
        for _ in range(length):
            action = (push * generator.uniform(-1, 1, env.action_space.shape)).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, following, np.float32(reward), np.float32(terminated)))
            obs = following
            if terminated or truncated:
                break
    return Recording(*(torch.from_numpy(np.array(part)) for part in zip(*rows, strict=True)))


def close(found: Tensor, true: Tensor, tolerance: float) -> bool:
    return bool(((found - true).abs() / (1 + true.abs())).max() < tolerance)


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MuJoCo logs its warnings into the working directory."""
    with contextlib.chdir(tmp_path_factory.mktemp("mujoco")):
        yield


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(task: str) -> SimulatorModel:
    return SimulatorModel(maker(task))


@pytest.fixture(scope="module")
def played(task: str) -> Recording:
    return record(maker(task)())


def test_steps_are_the_environments(task: str, model: SimulatorModel, played: Recording) -> None:
    """Observation, simulator state, reward and termination, over several episodes."""
    step = model.step(model.encode(played.obs), played.action)
    assert step.z.dtype == step.reward.dtype == step.cont.dtype == torch.float32
    base = model.state_dim - model._simulator.state_dim
    assert close(model.observe(step.z)[:, :base], played.next_obs[:, :base], 1e-5)
    assert close(step.z, played.next_obs, 2e-4)  # the solver's warm start are accelerations, which rounding moves most
    assert close(step.reward, played.reward, 1e-5)
    assert torch.equal(step.cont, 1 - played.terminated)
    assert played.terminated.any() == (task == "gym/InvertedPendulum-v5")
    assert played.next_obs[:, base:].std(0).max() > 0.01 and len(played.reward.unique()) > 1


def test_sequences_are_followed(model: SimulatorModel, played: Recording) -> None:
    """Imagination that goes on from its own states stays with the episode."""
    length = int(torch.argmax(played.terminated)) or 8  # the first episode, without its end
    base = model.state_dim - model._simulator.state_dim
    z = played.obs[0]
    for index in range(length):
        z, reward, _ = model.step(z, played.action[index])
        assert close(z[:base], played.next_obs[index, :base], 2e-4)
        assert close(reward, played.reward[index], 2e-4)
    assert length > 3


def test_rows_are_independent(model: SimulatorModel, played: Recording) -> None:
    """Candidates come in any shape and order, and nothing of a row is left for the next."""
    z, action = played.obs[:12], played.action[:12]
    flat = model.step(z, action)
    deep = model.step(z.view(2, 3, 2, -1), action.view(2, 3, 2, -1))
    assert torch.equal(deep.z.flatten(0, 2), flat.z) and deep.reward.shape == deep.cont.shape == (2, 3, 2)
    assert torch.equal(deep.reward.flatten(), flat.reward)
    back = model.step(z.flip(0), action.flip(0))
    assert torch.equal(back.z.flip(0), flat.z) and torch.equal(back.reward.flip(0), flat.reward)
    candidates = model.step(z[:1].expand(12, -1), action)
    assert torch.equal(candidates.z[0], flat.z[0]) and len(candidates.z.unique(dim=0)) == 12
    assert model.step(z[0], action[0]).reward.shape == ()


@pytest.mark.parametrize("task", [*TASKS, "gym/Humanoid-v5", "dmc/finger-turn-easy", "dmc/walker-walk", "dmc/manipulator-insert-peg"])
def test_without_rounding_the_state_is_complete(task: str) -> None:
    """In float64 a restored step is the true one, bit for bit: also where bodies touch, and targets are drawn per episode."""
    suite, _, name = task.partition("/")
    env, copy = (SimulatorState(SUITES[suite].make(name).env, np.float64) for _ in range(2))
    copy.reset(seed=99)
    generator, space = np.random.default_rng(0), env.action_space
    assert isinstance(space, Box)
    for seed in (1, 2):
        obs, _ = env.reset(seed=seed)
        for _ in range(30):
            action = generator.uniform(space.low, space.high).astype(np.float32)
            copy.set_state(obs[-copy.state_dim :])
            obs, *outcome, _ = env.step(action)
            found, *again, _ = copy.step(action)
            assert obs.dtype == np.float64 and np.array_equal(obs, found) and outcome == again
            if outcome[1]:
                break


@pytest.mark.parametrize("task", ["gym/HalfCheetah-v5", "dmc/cartpole-swingup"])
def test_the_task_stays_as_it_is(task: str) -> None:
    """With and without the state: the same observations and rewards."""
    plain, wide = record(make_env(task)), record(maker(task)())
    base = plain.obs.shape[1]
    assert torch.equal(wide.obs[:, :base], plain.obs) and torch.equal(wide.next_obs[:, :base], plain.next_obs)
    assert torch.equal(wide.reward, plain.reward) and wide.obs.shape[1] > base


@pytest.mark.parametrize(("task", "repeat"), [("gym/InvertedPendulum-v5", 3), ("dmc/cartpole-swingup", 5)])
def test_action_repeat(task: str, repeat: int) -> None:
    played, model = record(maker(task, action_repeat=repeat)()), SimulatorModel(maker(task, action_repeat=repeat))
    step = model.step(played.obs, played.action)
    assert close(step.z, played.next_obs, 2e-4) and close(step.reward, played.reward, 1e-5)
    assert torch.equal(step.cont, 1 - played.terminated)
    if task.startswith("gym"):
        assert played.reward.max() == repeat and played.terminated.any() and set(played.reward[played.terminated > 0].tolist()) < {0, 1, 2}
    else:
        once = SimulatorModel(maker(task, action_repeat=1))
        z, total = played.obs[:3], torch.zeros(3)
        for _ in range(repeat):
            z, reward, _ = once.step(z, played.action[:3])
            total += reward
        assert close(total, played.reward[:3], 1e-5)


@pytest.mark.parametrize("task", ["gym/HalfCheetah-v5", "dmc/cartpole-swingup"])
def test_time_limits_do_not_end_imagination(task: str) -> None:
    """Neither a limit of worldmpc nor the suite's own (1000 steps): the last of many rows is like the first."""
    for config in ({"episode_length": 3, "action_repeat": 2}, {"action_repeat": 4}):
        played, model = record(maker(task, **config)(), episodes=1, length=2), SimulatorModel(maker(task, **config))
        first = model.step(played.obs, played.action)
        for _ in range(4):
            model.step(played.obs[:1].expand(70, -1), played.action[:1].expand(70, -1))  # 1120 simulator steps
        again = model.step(played.obs, played.action)
        assert close(first.z, played.next_obs, 2e-4) and torch.equal(first.z, again.z) and torch.equal(first.reward, again.reward)
        assert torch.equal(again.cont, torch.ones(2))


def test_divergence_stays_in_its_row() -> None:
    played, model = record(maker("dmc/cartpole-swingup")(), episodes=1, length=4), SimulatorModel(maker("dmc/cartpole-swingup"))
    good, z = model.step(played.obs, played.action), played.obs.clone()
    z[1, -6:] = 1e9  # velocities and more, too fast to follow
    z[2, -1] = torch.nan
    step = model.step(z, played.action)
    assert step.z[1:3].isnan().all() and step.reward[1:3].isnan().all()
    assert torch.equal(step.z[::3], good.z[::3]) and torch.equal(step.reward[::3], good.reward[::3])
    assert torch.equal(model.step(played.obs, played.action).z, good.z)


def test_as_part_of_a_planning_model(model: SimulatorModel, played: Recording) -> None:
    planning = ComposedModel(model, value=lambda obs: obs[..., 0])
    assert isinstance(model, Dynamics)
    check_model(planning, (model.state_dim,), model.action_dim)
    step = planning.step(planning.encode(played.obs[:3]), played.action[:3])
    assert torch.equal(step.reward, model.step(played.obs[:3], played.action[:3]).reward)


def test_what_is_refused(model: SimulatorModel, played: Recording) -> None:
    with pytest.raises(ConfigError, match="set env.simulator_state=true"):
        model.encode(played.obs[:, :4])
    with pytest.raises(ConfigError, match="the simulator has no gradients; set planner.gradient_steps=0"):
        model.step(played.obs, played.action.clone().requires_grad_())
    with torch.no_grad():
        model.step(played.obs[:1], played.action[:1].clone().requires_grad_())


def test_environments_that_are_refused() -> None:
    for task in ("gym/Pendulum-v1", "toy/balance"):
        with pytest.raises(ConfigError, match=r"env.simulator_state: \w+ is not a MuJoCo environment"):
            SimulatorState(make_env(task).unwrapped)
    with pytest.raises(ConfigError, match="env.simulator_state: dynamics=simulator needs it"):
        SimulatorModel(lambda: make_env("gym/InvertedPendulum-v5"))
    with pytest.raises(ConfigError, match=r"draws \d+ numbers of its model anew in each episode \(hfield_data\)"):
        maker("dmc/quadruped-escape")()
    with pytest.raises(ConfigError, match="must be a Box with one axis"):
        SimulatorState(gymnasium.wrappers.ReshapeObservation(gymnasium.make("InvertedPendulum-v5"), (2, 2)))
