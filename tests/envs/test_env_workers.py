"""Worker processes give what one process gives, whatever happens to them, and a step can be finished later than it is begun."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from worldmpc.config import ConfigError, EnvConfig, make_config
from worldmpc.envs import SUITES, EnvError, SuiteEnv, VecEnv, make_envs
from worldmpc.envs import workers as workers_module
from worldmpc.types import EnvStep

NUM_ENVS = 5


class Walk(gymnasium.Env[Any, Any]):
    """A random walk [position, time, environment number, process]; ends in all ways, reports success in odd environments, may fail."""

    def __init__(self, index: int = 0, fault: Callable[[int, int], None] | None = None) -> None:
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = Box(-2.0, 1.0, (2,), np.float32)
        self.metadata = {"render_modes": ["rgb_array"]}
        self.render_mode = "rgb_array"
        self.index, self.fault = index, fault
        self.position, self.time, self.length = 0.0, 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.position, self.time = float(self.np_random.normal()), 0
        self.length = int(self.np_random.integers(1, 12))
        if self.fault:
            self.fault(self.index, -1)
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.position += 0.1 * float(action.sum()) + float(self.np_random.normal())
        if self.fault:
            self.fault(self.index, self.time)
        terminated, truncated = abs(self.position) > 3, self.time >= self.length
        info = {"is_success": self.position > 0, "other": object()} if self.index % 2 else {}
        return self.obs(), 1e-3 * self.position, terminated, truncated, info

    def render(self) -> Any:
        return np.full((2, 3, 3), self.index * 10 + self.time, np.uint8)

    def obs(self) -> np.ndarray:
        return np.array([self.position, self.time, self.index, os.getpid()], np.float32)


FAULT: Callable[[int, int], None] | None = None
MAKE_FAULT: Callable[[int], None] | None = None


def list_names() -> list[str]:
    return ["walk"]


def resolve(name: str) -> str:
    return name


def make(name: str, *, index: int, unlimited: bool, render: bool) -> SuiteEnv:
    if MAKE_FAULT:
        MAKE_FAULT(index)
    return SuiteEnv(Walk(index, FAULT), "suite/walk", None)


@pytest.fixture(autouse=True)
def _suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "suite", f"{__name__}:make")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a setter of what all environments made from then on do in reset (time -1) and step."""
    return lambda function: monkeypatch.setattr(sys.modules[__name__], "FAULT", function)


def config(workers: int | None, num_envs: int = NUM_ENVS) -> EnvConfig:
    """Return the configuration of a number of workers, None for ``sync``."""
    return EnvConfig(num_envs=num_envs) if workers is None else EnvConfig(num_envs=num_envs, workers="async", num_workers=workers)


def processes(envs: VecEnv) -> list[Any]:
    return list(getattr(envs._env, "processes", ()))


def actions(steps: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(steps, NUM_ENVS, 2, generator=torch.Generator().manual_seed(seed)) * 2.2 - 1.1


def comparable(step: EnvStep) -> list[torch.Tensor]:
    """Return all tensors of a step, without the number of the process."""
    return [*(obs[:, :3] for obs in (step.next_obs, step.obs)), step.reward, step.terminated, step.truncated, step.valid, step.success]


def assert_same(first: list[EnvStep], second: list[EnvStep]) -> None:
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        for a, b in zip(comparable(left), comparable(right), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def reference() -> Iterator[tuple[torch.Tensor, list[EnvStep], dict[str, torch.Tensor]]]:
    """First observation, steps and state of environments in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(SUITES, "suite", f"{__name__}:make")
        monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
        with make_envs("suite/walk", config(None), seed=3) as envs:
            first = envs.reset()
            yield first, [envs.step(action) for action in actions(80)], envs.state_dict()


@pytest.mark.parametrize("workers", [1, 2, 3, NUM_ENVS])
def test_any_number_of_workers_gives_the_same_bits(workers: int, reference: Any) -> None:
    first, expected, state = reference
    assert any(step.terminated.any() for step in expected) and any(step.truncated.any() for step in expected)
    assert all(step.success.isnan().tolist() == [True, False, True, False, True] for step in expected)
    with make_envs("suite/walk", config(workers), seed=3) as envs:
        assert torch.equal(envs.reset()[:, :3], first[:, :3])
        found = [envs.step(action) for action in actions(80)]
        assert_same(expected, found)
        for name, value in envs.state_dict().items():
            assert torch.equal(value[:, :3] if name == "obs" else value, state[name][:, :3] if name == "obs" else state[name]), name
        assert torch.equal(envs.reset(seed=3)[:, :3], first[:, :3])
        assert_same(expected[:20], [envs.step(action) for action in actions(80)[:20]])
        homes = found[0].next_obs[:, 3].tolist()
    assert len(set(homes)) == workers and os.getpid() not in homes
    assert sorted(homes, key=homes.index) == homes  # each worker has a contiguous part
    sizes = [homes.count(home) for home in set(homes)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("saved_by", [None, 3])
def test_a_state_resumes_with_any_number_of_workers(saved_by: int | None, workers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "obs", lambda self: np.array([self.position, self.time, self.index, 0], np.float32))
    with make_envs("suite/walk", config(saved_by), seed=3) as original, make_envs("suite/walk", config(workers), seed=4) as resumed:
        original.reset()
        for action in actions(13):
            original.step(action)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resumed.load_state_dict(original.state_dict()) is True
        assert_same([original.step(action) for action in actions(30, 1)], [resumed.step(action) for action in actions(30, 1)])


def test_an_episode_that_cannot_be_played_again_in_a_worker_says_why() -> None:
    with make_envs("suite/walk", config(2), seed=3) as envs:
        envs.reset()
        state = envs.state_dict()
        state["steps"], state["actions"] = torch.tensor([0, 0, 0, 40, 0]), torch.zeros(NUM_ENVS, 40, 2)
        with pytest.warns(UserWarning, match=r"not resumed exactly.*\(environment [0-4]: .*\)"):
            assert envs.load_state_dict(state) is False
        assert envs.step(actions(1)[0]).valid.all()


def foreign(kind: Any) -> VecEnv:
    return make_envs(kind([lambda index=index: Walk(index) for index in range(NUM_ENVS)]))


@pytest.mark.parametrize("build", [lambda: make_envs("suite/walk", config(None)), lambda: make_envs("suite/walk", config(2))] + [
    lambda kind=kind: foreign(kind) for kind in (SyncVectorEnv, AsyncVectorEnv)
], ids=["sync", "workers", "foreign-sync", "foreign-async"])  # fmt: skip
def test_a_step_in_two_halves_is_a_step(build: Callable[[], VecEnv]) -> None:
    with build() as whole, build() as halved:
        whole.reset()
        halved.reset()
        expected, found = [whole.step(action) for action in actions(30)], []
        for action in actions(30):
            before, given = halved.obs, action.clone()
            halved.step_async(given)
            given.fill_(0.77)
            assert halved.obs is before
            found.append(halved.step_wait())
        assert_same(expected, found)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@pytest.mark.parametrize("workers", [None, 2])
def test_workers_step_while_the_caller_does_something_else(workers: int | None, fault: Any, tmp_path: Path) -> None:
    fault(lambda index, time: (tmp_path / f"{index} at {time}").touch())
    with make_envs("suite/walk", config(workers)) as envs:
        envs.reset()
        envs.step_async(torch.zeros(NUM_ENVS, 2))
        if workers is None:
            assert not list(tmp_path.glob("* at 1"))
        else:
            assert wait_until(lambda: len(list(tmp_path.glob("* at 1"))) >= NUM_ENVS), "no step before step_wait"
        envs.step_wait()
        assert {path.name[0] for path in tmp_path.glob("* at 1")} == set("01234")


@pytest.mark.parametrize("workers", [None, 2])
def test_misuse_of_the_two_halves_is_refused_and_does_no_harm(workers: int | None) -> None:
    with make_envs("suite/walk", config(workers), seed=3) as envs, make_envs("suite/walk", config(workers), seed=3) as plain:
        action = actions(2)
        with pytest.raises(RuntimeError, match="^suite/walk: no step is under way; step_async begins one$"):
            envs.step_wait()
        with pytest.raises(RuntimeError, match="reset the environments"):
            envs.step_async(action[0])
        envs.reset()
        state = envs.state_dict()
        with pytest.raises(ValueError, match="expected shape"):
            envs.step_async(action[0, 1:])
        envs.step_async(action[0])
        for verb, call in {
            "the next one": lambda: envs.step_async(action[1]),
            "reset": envs.reset,
            "state_dict": envs.state_dict,
            "load_state_dict": lambda: envs.load_state_dict(state),
            "render": envs.render,
        }.items():
            with pytest.raises(RuntimeError, match=f"^suite/walk: a step is under way; finish it with step_wait before {verb}$"):
                call()
        with pytest.raises(RuntimeError, match="a step is under way"):
            envs.step(action[1])
        found = [envs.step_wait(), envs.step(action[1])]
        plain.reset()
        assert_same([plain.step(one) for one in action], found)
        with pytest.raises(RuntimeError, match="no step is under way"):
            envs.step_wait()
        envs.step_async(action[0])
    assert torch.equal(envs.state_dict()["obs"], found[1].obs)  # of the last complete step
    for call in (envs.step_wait, lambda: envs.step_async(action[0]), envs.render, envs.reset):
        with pytest.raises(EnvError, match="^suite/walk: the environments are closed$"):
            call()


@pytest.mark.parametrize("workers", [None, 1, 2, NUM_ENVS])
def test_the_first_environment_that_fails_is_named(workers: int | None, fault: Any) -> None:
    def fail(index: int, time: int) -> None:
        if time == 1 and index in (2, 4):
            raise OSError(f"number\n{index}")

    fault(fail)
    envs = make_envs("suite/walk", config(workers))
    running = processes(envs)
    envs.reset()
    envs.step_async(torch.zeros(NUM_ENVS, 2))
    with warnings.catch_warnings(), pytest.raises(EnvError) as caught:
        warnings.simplefilter("error")
        envs.step_wait()
    assert str(caught.value) == "suite/walk: environment 2 raised OSError in step: number 2"
    assert len(running) == (workers or 0) and not any(process.is_alive() for process in running)


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("when", ["step", "reset"])
def test_after_a_failure_the_state_is_that_before_the_step(workers: int | None, when: str, fault: Any) -> None:
    def fail(index: int, time: int) -> None:
        episodes[index] = episodes.get(index, 0) + (time == -1)
        if episodes[index] == 3 and time == (-1 if when == "reset" else 1):
            raise OSError("no more")

    episodes: dict[int, int] = {}
    fault(fail)
    with make_envs("suite/walk", config(workers), seed=3) as envs:
        envs.reset()
        before: dict[str, torch.Tensor] = {}
        with pytest.raises(EnvError, match=f"environment . raised OSError in {when}: no more"):
            for action in actions(80):
                before = envs.state_dict()
                envs.step(action)
        assert before["episode"].max() == (1 if when == "reset" else 2) and before["steps"].max() > 0
        for name, value in envs.state_dict().items():
            assert torch.equal(before[name], value), name


def test_a_worker_killed_in_the_middle_of_a_step(fault: Any) -> None:
    def die(index: int, time: int) -> None:
        if index == 3 and time == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    fault(die)
    envs = make_envs("suite/walk", config(2))
    running = processes(envs)
    envs.reset()
    envs.step_async(torch.zeros(NUM_ENVS, 2))
    with pytest.raises(EnvError) as caught:
        envs.step_wait()
    assert str(caught.value) == "suite/walk: a worker process died in step (killed, or crashed in native code)"
    assert not any(process.is_alive() for process in running)
    with pytest.raises(EnvError, match="closed"):
        envs.reset()


@pytest.mark.parametrize("verb", ["reset", "render"])
def test_a_worker_killed_in_between(verb: str) -> None:
    envs = make_envs("suite/walk", config(2), render=True)
    running = processes(envs)
    envs.reset()
    os.kill(running[0].pid, signal.SIGKILL)
    running[0].join()
    with pytest.raises(EnvError, match=f"^suite/walk: a worker process died in {verb} "):
        getattr(envs, verb)()
    assert not any(process.is_alive() for process in running)


@contextmanager
def make_fault(function: Callable[[int], None]) -> Iterator[None]:
    """Have the making of environments in workers fail."""
    owner = os.getpid()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules[__name__], "MAKE_FAULT", lambda index: function(index) if os.getpid() != owner else None)
        yield


def test_failures_of_making_in_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(index: int) -> None:
        if index >= 3:
            raise OSError(f"no robot\n{index}")

    def misfit(index: int) -> None:
        if index == 1:
            raise ConfigError("task: not\nhere")

    before = set(multiprocessing.active_children())
    with make_fault(refuse), pytest.raises(EnvError) as failed:
        make_envs("suite/walk", config(2))
    assert str(failed.value) == "suite/walk: environment 3 could not be made: OSError: no robot 3"
    with make_fault(misfit), pytest.raises(ConfigError) as unusable:
        make_envs("suite/walk", config(2))
    assert str(unusable.value) == "task: not here"
    with make_fault(lambda index: os._exit(3)), pytest.raises(EnvError, match="^suite/walk: a worker process died while it made"):
        make_envs("suite/walk", config(2))
    assert set(multiprocessing.active_children()) == before
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_environments_that_differ_are_refused(workers: int | None) -> None:
    class Other(Walk):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            if len(made) > 2:
                self.action_space = Box(-1.0, 1.0, (3,), np.float32)

    made: list[Walk] = []
    owner = os.getpid()

    def build() -> Walk:
        made.extend([Walk()] * 2 if os.getpid() != owner and workers == 3 else [])
        return Other()

    with pytest.raises(ConfigError) as caught:
        make_envs(build, config(workers, 3))
    index = {None: 2, 1: 1, 3: 0}[workers]  # with workers one more is made in this process
    assert str(caught.value) == (
        f"Other: environment {index} has observations (4,) and actions (3,), environment 0 has observations (4,) and actions (2,); "
        "environments stepped together must agree"
    )


def test_discrete_actions_in_a_worker_alone() -> None:
    owner = os.getpid()

    def build() -> Walk:
        env = Walk()
        if os.getpid() != owner:
            env.action_space = Discrete(2)
        return env

    expected = r"^Walk: environment [01] has observations \(4,\) and 2 choices, environment 0 has .* actions \(2,\); .* must agree"
    with pytest.raises(ConfigError, match=expected):
        make_envs(build, config(2))


@pytest.mark.parametrize("under_way", [False, True])
def test_close_ends_workers_that_hang(under_way: bool, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "CLOSE_TIMEOUT", 0.2)
    fault(lambda index, time_: time.sleep(60) if time_ == 1 and index == 0 else None)
    envs = make_envs("suite/walk", config(2))
    running = processes(envs)
    envs.reset()
    if under_way:
        envs.step_async(torch.zeros(NUM_ENVS, 2))
    start = time.monotonic()
    envs.close()
    envs.close()
    assert time.monotonic() - start < 20
    assert [process.exitcode for process in running] == [-signal.SIGKILL if under_way else 0, 0]


def test_nothing_is_left_behind() -> None:
    def cycle() -> tuple[int, list[str]]:
        with make_envs("suite/walk", config(3)) as envs:
            envs.reset()
            envs.step(torch.zeros(NUM_ENVS, 2))
            shared = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
        del envs
        gc.collect()
        return len(os.listdir("/dev/fd")), [name for name in shared if str(os.getpid()) in name]

    cycle()
    first, second = cycle(), cycle()
    assert first == second and first[1] == []
    envs = make_envs("suite/walk", config(2))
    running = processes(envs)
    del envs
    gc.collect()
    assert not any(process.is_alive() for process in running)


def test_workers_end_though_later_ones_hold_their_pipes() -> None:
    with make_envs("suite/walk", config(2)) as first, make_envs("suite/walk", config(2)):
        running = processes(first)
        first.close()
        assert [process.exitcode for process in running] == [0, 0]


@pytest.mark.parametrize("task", ["'toy/balance'", "Hangs"])
def test_workers_end_with_their_owner(task: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time, torch\nfrom worldmpc.config import EnvConfig\nfrom worldmpc.envs import make_envs\n"
        "from worldmpc.envs.toy import Balance\nclass Hangs(Balance):\n    def step(self, action): time.sleep(1000)\n"
        f"one, two = (make_envs({task}, EnvConfig(num_envs=4, workers='async', num_workers=2)) for _ in range(2))\n"
        "one.reset(), two.reset(), one.step_async(torch.zeros(4, 1))\n"
        "time.sleep(0.5)\n"
        "open(sys.argv[1], 'w').write(' '.join(str(process.pid) for envs in (one, two) for process in envs._env.processes))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "pids")]
    status = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment).returncode
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    try:
        assert status == -signal.SIGKILL and len(pids) == 4
        assert wait_until(lambda: not any(runs(pid) for pid in pids)), [pid for pid in pids if runs(pid)]
    finally:
        for pid in filter(runs, pids):
            os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [None, 2])
def test_ctrl_c_in_the_middle_of_a_step(workers: int | None, fault: Any, tmp_path: Path) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # The first step of the first environment takes longer than it takes to interrupt it; the second worker has long stepped then.
    slow = tmp_path / "slow"
    fault(lambda index, time_: time.sleep(0.5) if index == 0 and time_ == 1 and slow.exists() else None)
    with make_envs("suite/walk", config(workers), seed=3) as envs, make_envs("suite/walk", config(None), seed=3) as plain:
        plain.reset()
        first = plain.reset()
        expected = [plain.step(action) for action in actions(10)]
        envs.reset()
        slow.touch()
        before = envs.state_dict()
        handler = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.15)
            with pytest.raises(KeyboardInterrupt):
                envs.step(actions(1, 5)[0])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        with pytest.raises(RuntimeError, match="^suite/walk: the last step was interrupted half-way; reset the environments$"):
            envs.step(actions(1)[0])
        for name, value in before.items():
            assert torch.equal(value, envs.state_dict()[name]), name
        slow.unlink()
        assert torch.equal(envs.reset()[:, :3], first[:, :3])
        assert_same(expected, [envs.step(action) for action in actions(10)])
        assert all(process.is_alive() for process in processes(envs))


def test_a_worker_uses_one_torch_thread() -> None:
    class Threads(Walk):
        def obs(self) -> np.ndarray:
            return np.array([torch.get_num_threads(), 0, 0, 0], np.float32)

    torch.set_num_threads(2)
    with make_envs(Threads, config(2)) as envs:
        assert envs.reset()[:, 0].tolist() == [1] * NUM_ENVS
    assert torch.get_num_threads() == 2


def test_frames_of_workers() -> None:
    with make_envs("suite/walk", config(2), render=True) as envs:
        envs.reset()
        envs.step(torch.zeros(NUM_ENVS, 2))
        frames = envs.render()
        assert [frame.shape for frame in frames] == [(2, 3, 3)] * NUM_ENVS
        assert [int(frame[0, 0, 0]) // 10 for frame in frames] == list(range(NUM_ENVS))


def test_a_frame_that_cannot_travel_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "render", lambda self: (part for part in "abc"))
    with make_envs("suite/walk", config(2), render=True) as envs:
        envs.reset()
        with pytest.raises(EnvError, match="^TypeError: cannot pickle 'generator' object$"):
            envs.render()
        assert envs.step(torch.zeros(NUM_ENVS, 2)).valid.all()


def test_functions_travel_to_spawned_workers() -> None:
    code = (
        "import multiprocessing, torch\nfrom worldmpc.config import ConfigError, EnvConfig\nfrom worldmpc.envs import make_envs\n"
        "from worldmpc.envs.toy import Balance\n"
        "multiprocessing.set_start_method('spawn')\n"
        "length = 7\n"
        "function = lambda: Balance(length=length)\n"
        "found = []\n"
        "for config in (EnvConfig(num_envs=2), EnvConfig(num_envs=2, workers='async', num_workers=1)):\n"
        "    with make_envs(function, config) as envs:\n"
        "        found.append([envs.reset()] + [envs.step(torch.full((2, 1), 0.3)).obs for _ in range(20)])\n"
        "        found[-1] = torch.stack(found[-1])\n"
        "assert torch.equal(*found), found\n"
        "assert len(found[0].unique()) > 20\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(("given", "cores", "expected"), [(None, 8, 5), (None, 2, 2), (3, 2, 3), (1, 2, 1)])
def test_number_of_workers(given: int | None, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with make_envs("suite/walk", EnvConfig(num_envs=NUM_ENVS, workers="async", num_workers=given)) as envs:
            assert len(processes(envs)) == expected
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    too_many = ["env.num_workers: 3 worker processes on 2 CPU cores are slower than 2"]
    assert messages == (too_many if given == 3 else [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"workers": "async", "num_workers": 0, "num_envs": 2}, "env.num_workers: expected at least 1 or null, got 0"),
        ({"workers": "async", "num_workers": -3, "num_envs": 2}, "env.num_workers: expected at least 1 or null, got -3"),
        ({"workers": "async", "num_workers": 3, "num_envs": 2}, "env.num_workers: expected at most env.num_envs (2), got 3"),
        ({"num_workers": 1}, "env.num_workers: expected null, as env.workers=sync has no worker processes, got 1"),
        ({"workers": "async", "num_workers": 1.5}, "env.num_workers: expected int, got 1.5"),
    ],
)
def test_impossible_numbers_of_workers_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config("debug", env=values)
    assert str(caught.value) == expected


def test_possible_numbers_of_workers_are_taken() -> None:
    assert make_config("debug", env={"workers": "async", "num_workers": 2, "num_envs": 2}).env.num_workers == 2
    assert make_config("debug", env={"workers": "async", "num_envs": 2}).env.num_workers is None
    for number, expected in ((0, "at least 1 or null"), (3, r"at most env.num_envs \(2\)")):
        with pytest.raises(ConfigError, match=f"^env.num_workers: expected {expected}, got {number}$"):
            make_envs("suite/walk", config(number, 2))
    with pytest.raises(ConfigError, match="^env.num_envs: expected at least 1, got 0$"):
        make_envs("suite/walk", config(None, 0))
