"""VecEnv: what is a transition, what is not, and how a run comes back to where it was."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import SUITES, EnvError, SuiteEnv, VecEnv, episode_seed, make_env, make_envs
from worldmpc.envs.toy import Counter, End, PointMass
from worldmpc.functional import tree_tensors

SCHEDULES: dict[str, tuple[End, ...]] = {"terminated": ("terminated",), "truncated": ("truncated",), "both": ("terminated", "truncated")}
LENGTHS = (3, 1, 4, 2)


def counter(index: int, ends: tuple[End, ...]) -> Counter:
    return Counter(env_id=index, lengths=LENGTHS[index:] + LENGTHS[:index], ends=ends)


def list_names() -> list[str]:
    return list(SCHEDULES)


def resolve(name: str) -> str:
    return name


def make(name: str, *, index: int, unlimited: bool, render: bool) -> SuiteEnv:
    return SuiteEnv(counter(index, SCHEDULES[name]), name, None)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "counting", f"{__name__}:make")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def foreign(kind: str, mode: AutoresetMode, ends: tuple[End, ...], num_envs: int) -> Any:
    functions = [lambda index=index: counter(index, ends) for index in range(num_envs)]
    return SyncVectorEnv(functions, autoreset_mode=mode) if kind == "sync" else AsyncVectorEnv(functions, autoreset_mode=mode)


def expected_transitions(index: int, ends: tuple[End, ...], episodes: int) -> list[tuple[float, ...]]:
    """Return (time, episode, next time, reward, terminated, truncated, success) by hand."""
    lengths = LENGTHS[index:] + LENGTHS[:index]
    rows: list[tuple[float, ...]] = []
    for episode in range(episodes):
        length, end = lengths[episode % 4], ends[episode % len(ends)]
        for time in range(length):
            last = time == length - 1
            success = last and episode % 2 == 1
            rows.append((time, episode, time + 1, time + 1, last and end == "terminated", last and end == "truncated", success))
    return rows


@pytest.mark.parametrize("ends", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("source", ["own", *AutoresetMode])
def test_valid_transitions_are_exactly_the_true_ones(source: Any, kind: str, ends: tuple[End, ...], counting: None) -> None:
    num_envs = 3
    if source == "own":
        name = next(key for key, value in SCHEDULES.items() if value == ends)
        envs = make_envs(f"counting/{name}", EnvConfig(num_envs=num_envs, workers=kind))  # type: ignore[arg-type]
    else:
        envs = make_envs(foreign(kind, source, ends, num_envs))
    found: list[list[tuple[float, ...]]] = [[] for _ in range(num_envs)]
    with envs:
        obs = envs.reset()
        assert obs.tolist() == [[0, 0, index] for index in range(num_envs)]
        for _ in range(60):
            step = envs.step(torch.zeros(num_envs, 1))
            assert torch.equal(envs.obs, step.obs)
            for index in range(num_envs):
                if not step.valid[index]:
                    assert source is AutoresetMode.NEXT_STEP
                    assert step.reward[index] == 0 and not step.terminated[index] and not step.truncated[index]
                    assert torch.isnan(step.success[index])
                    continue
                before, after = obs[index].tolist(), step.next_obs[index].tolist()
                assert after == [before[0] + 1, before[1], index]
                flags = bool(step.terminated[index]), bool(step.truncated[index]), bool(step.success[index])
                found[index].append((before[0], before[1], after[0], float(step.reward[index]), *flags))
                if source is not AutoresetMode.NEXT_STEP:
                    assert step.obs[index].tolist() == ([0, before[1] + 1, index] if any(flags[:2]) else after)
            obs = step.obs
    for index in range(num_envs):
        assert found[index] == expected_transitions(index, ends, 40)[: len(found[index])]
        assert len(found[index]) >= (60 if source is not AutoresetMode.NEXT_STEP else 40)


def test_next_step_mode_marks_one_invalid_step_per_episode() -> None:
    envs = make_envs(foreign("sync", AutoresetMode.NEXT_STEP, ("terminated",), 1))
    envs.reset()
    steps = [envs.step(torch.zeros(1, 1)) for _ in range(4 + 2 + 5)]
    assert [bool(step.valid) for step in steps] == [True] * 3 + [False] + [True] + [False] + [True] * 4 + [False]
    assert steps[3].next_obs.tolist() == steps[3].obs.tolist() == [[0, 1, 0]]


def test_success_is_nan_where_nothing_reports_it() -> None:
    envs = make_envs("toy/pointmass", EnvConfig(num_envs=2))
    envs.reset()
    assert torch.isnan(envs.step(torch.zeros(2, 2)).success).all()


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_results_keep_their_values_after_further_steps(workers: Any) -> None:
    with make_envs("toy/balance", EnvConfig(num_envs=2, workers=workers)) as envs:
        first = envs.reset()
        held = [first, *tree_tensors(envs.step(torch.ones(2, 1)))]
        copies = [tensor.clone() for tensor in held]
        for _ in range(30):
            envs.step(-torch.ones(2, 1))
        for tensor, copy in zip(held, copies, strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_dtypes_and_shapes() -> None:
    envs = make_envs("toy/pointmass", EnvConfig(num_envs=3))
    assert envs.reset().shape == (3, 2)
    step = envs.step(torch.zeros(3, 2, dtype=torch.float64))
    assert step.next_obs.dtype == step.obs.dtype == step.reward.dtype == step.success.dtype == torch.float32
    assert step.terminated.dtype == step.truncated.dtype == step.valid.dtype == torch.bool
    assert step.reward.shape == step.terminated.shape == step.truncated.shape == step.valid.shape == (3,)


def play(envs: VecEnv, steps: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [envs.step(torch.rand(envs.num_envs, envs.spec.action_dim, generator=generator) * 2 - 1) for _ in range(steps)]


def assert_same(first: list[Any], second: list[Any]) -> None:
    for left, right in zip(first, second, strict=True):
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_episodes_have_seeds_of_their_own() -> None:
    seeds = {episode_seed(seed, env, episode) for seed in range(5) for env in range(5) for episode in range(5)}
    assert len(seeds) == 125 and max(seeds) < 2**32
    envs = make_envs("toy/pointmass", EnvConfig(num_envs=2), seed=7)
    firsts = torch.stack([envs.reset() for _ in range(3)])
    assert len({tuple(row) for row in firsts.reshape(6, 2).tolist()}) == 6
    direct = PointMass().reset(seed=episode_seed(7, 1, 2))[0]
    assert firsts[2, 1].tolist() == direct.tolist()
    assert torch.equal(envs.reset(seed=7), firsts[0])
    assert not torch.equal(make_envs("toy/pointmass", EnvConfig(num_envs=2), seed=8).reset(), firsts[0])


@pytest.mark.parametrize(
    ("task", "num_envs", "workers", "steps"),
    [
        ("toy/balance", 3, "sync", 47),
        ("toy/pointmass", 2, "async", 73),
        ("dmc/cartpole-swingup", 2, "sync", 37),
        ("dmc/walker-walk", 1, "sync", 520),
        ("gym/Pendulum-v1", 2, "sync", 230),
        ("gym/HalfCheetah-v5", 1, "sync", 25),
    ],
)
def test_exact_resume_in_the_middle_of_episodes(task: str, num_envs: int, workers: Any, steps: int) -> None:
    config = EnvConfig(num_envs=num_envs, workers=workers)
    with make_envs(task, config, seed=5) as original, make_envs(task, config, seed=6) as resumed:
        original.reset()
        play(original, steps, 1)
        state = original.state_dict()
        resumed.reset()
        play(resumed, 7, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resumed.load_state_dict(state) is True
        assert torch.equal(resumed.obs, original.obs)
        assert_same(play(original, 60, 3), play(resumed, 60, 3))
        again = original.state_dict()
        for key, value in resumed.state_dict().items():
            assert torch.equal(value, again[key]), key


def test_state_is_plain_tensors_and_independent_of_the_environment() -> None:
    envs = make_envs("toy/pointmass", EnvConfig(num_envs=2))
    envs.reset()
    play(envs, 10, 0)
    state = envs.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "seed": torch.int64,
        "episode": torch.int64,
        "steps": torch.int64,
        "actions": torch.float32,
        "obs": torch.float32,
    }
    assert state["actions"].shape == (2, 10, 2)
    copies = {key: value.clone() for key, value in state.items()}
    play(envs, 60, 1)
    assert all(torch.equal(state[key], copies[key]) for key in state)


def test_state_before_the_first_reset_and_right_after_it() -> None:
    original, resumed = make_envs("toy/balance", seed=2), make_envs("toy/balance", seed=9)
    resumed.reset()
    assert resumed.load_state_dict(original.state_dict()) is True
    assert torch.equal(original.reset(), resumed.reset())
    other = make_envs("toy/balance", seed=9)
    assert other.load_state_dict(original.state_dict()) is True
    assert_same(play(original, 40, 0), play(other, 40, 0))


def test_resume_of_episodes_longer_than_the_first_buffer() -> None:
    original = make_envs(Endless, EnvConfig(num_envs=1))
    original.reset()
    play(original, 600, 0)
    resumed = make_envs(Endless, EnvConfig(num_envs=1))
    assert resumed.load_state_dict(original.state_dict()) is True
    assert_same(play(original, 5, 1), play(resumed, 5, 1))


@pytest.mark.parametrize("source", ["counter", "foreign", "random"])
def test_inexact_resume_warns_and_begins_afresh(source: str) -> None:
    def build() -> VecEnv:
        if source == "foreign":
            return make_envs(foreign("sync", AutoresetMode.DISABLED, ("truncated",), 2))
        return make_envs(Counter if source == "counter" else Unseeded, EnvConfig(num_envs=2))

    original, resumed = build(), build()
    original.reset()
    actions = torch.zeros(2, original.spec.action_dim)
    for _ in range(6):
        original.step(actions)
    resumed.reset()
    resumed.step(actions)
    with pytest.warns(UserWarning, match="not resumed exactly") as record:
        assert resumed.load_state_dict(original.state_dict()) is False
    assert len(record) == 1
    assert (resumed.state_dict()["steps"] == 0).all()
    assert (resumed.state_dict()["episode"] == original.state_dict()["episode"] + 1).all()
    if source != "random":
        assert (resumed.obs[:, 0] == 0).all()
    assert resumed.step(actions).valid.all()


def test_state_of_other_environments_is_refused() -> None:
    state = make_envs("toy/pointmass", EnvConfig(num_envs=2)).state_dict()
    with pytest.raises(ValueError, match="saved state"):
        make_envs("toy/pointmass", EnvConfig(num_envs=3)).load_state_dict(state)


class Endless(gymnasium.Env[Any, Any]):
    """Remembers all it was told, without a time limit; misbehaves on demand."""

    def __init__(self, fault: Callable[[int], float] | None = None, fault_in: str = "obs") -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Box(-2.0, 4.0, (1,), np.float64)
        self.fault, self.fault_in = fault, fault_in
        self.total, self.time = 0.0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.total, self.time = float(self.np_random.normal()), 0
        value = self.fault(0) if self.fault and self.fault_in == "reset" else 0.0
        return np.array([self.total, value]), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.total = 0.9 * self.total + float(action[0])
        value = self.fault(self.time) if self.fault else 0.0
        obs = np.array([self.total, value if self.fault_in == "obs" else 0.0])
        return obs, value if self.fault_in == "reward" else 0.0, False, False, {}


class Unseeded(Endless):
    """Not deterministic."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.total = float(np.random.default_rng().normal())
        return np.array([self.total, 0.0]), {}


def crash(time: int) -> float:
    if time == 3:
        raise ZeroDivisionError("the simulator\nfell over")
    return 0.0


def not_a_number(time: int) -> float:
    return float("nan") if time == 3 else 0.0


def crash_at_once(time: int) -> float:
    raise KeyError("no such body")


CASES = [
    (not_a_number, "obs", "Endless: environment 0 returned a non-finite observation (nan at entry 1 of 2)"),
    (not_a_number, "reward", "Endless: environment 0 returned a non-finite reward (nan)"),
    (crash, "obs", "Endless: environment 0 raised ZeroDivisionError in step: the simulator fell over"),
    (crash_at_once, "reset", "Endless: environment 0 raised KeyError in reset: 'no such body'"),
]


@pytest.mark.parametrize("workers", ["sync", "async"])
@pytest.mark.parametrize(("fault", "where", "message"), CASES, ids=["nan-obs", "nan-reward", "step", "reset"])
def test_bad_environments_are_one_clear_error(fault: Callable[[int], float], where: str, message: str, workers: Any) -> None:
    envs = make_envs(lambda: Endless(fault, where), EnvConfig(num_envs=2, workers=workers))
    processes = list(envs._env.processes) if workers == "async" else []  # type: ignore[attr-defined]
    with warnings.catch_warnings(), pytest.raises(EnvError) as caught:
        warnings.simplefilter("error")
        envs.reset()
        for _ in range(3):
            envs.step(torch.zeros(2, 1))
    assert str(caught.value) == message
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(EnvError, match="closed"):
        envs.reset()
    envs.close()


def test_foreign_vector_environment_errors_are_one_clear_error() -> None:
    envs = make_envs(SyncVectorEnv([lambda: Endless(crash)]))
    envs.reset()
    envs.step(torch.zeros(1, 1))
    envs.step(torch.zeros(1, 1))
    with pytest.raises(EnvError, match="SyncVectorEnv: .*ZeroDivisionError in step: the simulator fell over"):
        envs.step(torch.zeros(1, 1))


def test_a_killed_worker_is_an_error_and_the_rest_is_closed() -> None:
    envs = make_envs("toy/balance", EnvConfig(num_envs=2, workers="async", num_workers=2))
    envs.reset()
    processes = list(envs._env.processes)  # type: ignore[attr-defined]
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join()
    with pytest.raises(EnvError, match="worker process died"):
        for _ in range(3):
            envs.step(torch.zeros(2, 1))
    assert not any(process.is_alive() for process in processes)


def test_workers_ignore_ctrl_c() -> None:
    with make_envs("toy/balance", EnvConfig(num_envs=2, workers="async")) as envs:
        envs.reset()
        for process in envs._env.processes:  # type: ignore[attr-defined]
            os.kill(process.pid, signal.SIGINT)
        assert envs.step(torch.zeros(2, 1)).valid.all()


def test_bad_actions_are_errors_of_the_agent() -> None:
    envs = make_envs("toy/pointmass", EnvConfig(num_envs=2))
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(torch.zeros(2, 2))
    envs.reset()
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\)"):
        envs.step(torch.zeros(2, 3))
    with pytest.raises(EnvError, match="the agent produced a non-finite action for environment 1"):
        envs.step(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]))


def test_huge_but_finite_numbers_pass() -> None:
    envs = make_envs(lambda: Endless(lambda time: 3e38))
    envs.reset()
    assert envs.step(torch.zeros(1, 1)).next_obs[0, 1] == torch.tensor(3e38)


def test_close_twice_and_context_manager() -> None:
    with make_envs("toy/balance", EnvConfig(num_envs=2, workers="async")) as envs:
        envs.reset()
        processes = list(envs._env.processes)  # type: ignore[attr-defined]
    envs.close()
    assert not any(process.is_alive() for process in processes)


def test_foreign_vector_environment_configuration() -> None:
    vector = foreign("sync", AutoresetMode.SAME_STEP, ("truncated",), 3)
    assert make_envs(vector).num_envs == 3
    with pytest.raises(ConfigError, match="env.num_envs"):
        make_envs(vector, EnvConfig(num_envs=2))
    with pytest.raises(ConfigError, match="cannot be changed"):
        make_envs(vector, EnvConfig(episode_length=5))
    vector.metadata.pop("autoreset_mode")
    with pytest.raises(ConfigError, match="autoreset_mode"):
        make_envs(vector)


def test_foreign_vector_environment_gets_actions_in_its_own_bounds() -> None:
    seen: list[float] = []

    class Recorder(Endless):
        def step(self, action: Any) -> Any:
            seen.append(float(action[0]))
            return super().step(action)

    envs = make_envs(SyncVectorEnv([Recorder]))
    envs.reset()
    for value in (-1.0, 0.0, 1.0, 7.0):
        envs.step(torch.full((1, 1), value))
    assert seen == [-2.0, 1.0, 4.0, 4.0]


def test_gymnasium_own_vector_environment_runs() -> None:
    vector = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    envs = make_envs(vector)
    assert envs.reset().shape == (2, 3)
    first = make_envs(gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync"))
    assert torch.equal(first.reset(), envs.obs)
    valid = torch.stack([envs.step(torch.zeros(2, 1)).valid for _ in range(205)])
    assert (~valid).sum(0).tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_time_limits_within_a_vector_environment_are_found(mode: Any) -> None:
    for limits, expected in (((40, 40), 40), ((40, 50), None)):
        functions = [lambda limit=limit: gymnasium.make("Pendulum-v1", max_episode_steps=limit) for limit in limits]
        with make_envs((SyncVectorEnv if mode == "sync" else AsyncVectorEnv)(functions)) as envs:
            assert envs.spec.episode_length == expected
    with make_envs(SyncVectorEnv([lambda: Endless()])) as envs:
        assert envs.spec.episode_length is None


def test_impossible_configurations_are_refused_as_keys_are() -> None:
    for values, message in (
        ({"discount": 1.5}, r"env.discount: expected in \[0, 1\), or null, got 1.5"),
        ({"action_repeat": 0}, "env.action_repeat: expected at least 1 or null, got 0"),
        ({"num_envs": "2"}, "env.num_envs: expected int, got '2'"),
        ({"workers": "threads"}, "env.workers: expected one of sync, async, got 'threads'"),
    ):
        for make in (lambda config: make_envs("toy/balance", config), lambda config: make_env("toy/balance", config=config)):
            with pytest.raises(ConfigError, match=f"^{message}$"):
                make(EnvConfig(**values))  # type: ignore[arg-type]


def test_render_needs_to_be_asked_for() -> None:
    envs = make_envs("toy/pointmass", EnvConfig(num_envs=2))
    envs.reset()
    with pytest.raises(EnvError, match="render=True"):
        envs.render()
    drawn = make_envs("toy/pointmass", EnvConfig(num_envs=2), render=True)
    drawn.reset()
    before = drawn.render()
    drawn.step(torch.ones(2, 2))
    assert len(before) == 2 and before[0].shape == (160, 160, 3) and before[0].dtype == np.uint8
    assert (before[0] != drawn.render()[0]).any()


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_a_failed_render_does_not_harm_the_environments(workers: Any) -> None:
    with make_envs("toy/counter", EnvConfig(num_envs=2, workers=workers), render=True) as envs:
        envs.reset()
        with pytest.raises(EnvError, match="toy/counter: environment 0 raised NotImplementedError in render"):
            envs.render()
        assert envs.step(torch.zeros(2, 1)).valid.all()
