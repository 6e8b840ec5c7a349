"""VecEnv: options of episodes, and steps that only some environments take."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from tests.trees import differences
from worldmpc.config import EnvConfig
from worldmpc.envs import make_envs


class Walk(gymnasium.Env[np.ndarray, np.ndarray]):
    """Adds its action to where the options say that it begins, with noise of its seed."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Box(-1.0, 1.0, (1,))
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.left = float((options or {}).get("begin", 0.0)), int((options or {}).get("length", 4))
        return self.seen(), {}

    def step(self, action: np.ndarray) -> Any:
        self.place, self.left = self.place + float(action[0]) + 1e-3 * self.np_random.random(), self.left - 1
        return self.seen(), 1.0, self.left == 0, False, {"success": self.place > 50}

    def seen(self) -> np.ndarray:
        return np.array([self.place, self.left], np.float32)


def config(workers: Any, num_envs: int = 3) -> EnvConfig:
    return EnvConfig(num_envs=num_envs, workers=workers, num_workers=2 if workers == "async" else None)


@pytest.fixture(params=["sync", "async"])
def workers(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_episode_is_begun_with_what_is_asked_for_its_environment(workers: str) -> None:
    asked: list[int] = []

    def options(env: int) -> Any:
        asked.append(env)
        return None if env == 1 else {"begin": 10.0 * env + 100 * len(asked), "length": 2 + env}

    with make_envs(Walk, config(workers)) as envs:
        envs.options = options
        assert envs.reset()[:, 0].tolist() == [100, 0, 320] and asked == [0, 1, 2]
        step = envs.step(torch.zeros(3, 1))
        assert not step.terminated.any() and asked == [0, 1, 2]
        step = envs.step(torch.zeros(3, 1))
        assert step.terminated.tolist() == [True, False, False] and asked == [0, 1, 2, 0]
        assert step.obs[0].tolist() == [400, 2] and step.next_obs[0, 0] == pytest.approx(100, abs=0.01)
        assert step.success.tolist() == [1, 0, 1]


def test_options_are_saved_and_played_again(workers: str) -> None:
    def options(env: int) -> Any:
        return None if env == 1 else {"begin": 0.1 + env, "length": 5 + env, "note": [{"text": "Ü"}, None, True]}

    with make_envs(Walk, config(workers), seed=5) as envs, make_envs(Walk, config(workers)) as fresh:
        envs.options = options
        envs.reset()
        for _ in range(7):
            envs.step(torch.rand(3, 1))
        state = envs.state_dict()
        assert fresh.load_state_dict(state) and torch.equal(fresh.obs, envs.obs)
        assert differences(fresh.state_dict(), state) == []
        fresh.options = options
        for _ in range(9):
            action = torch.rand(3, 1)
            one, two = envs.step(action), fresh.step(action)
            assert torch.equal(one.next_obs, two.next_obs) and torch.equal(one.obs, two.obs)
        without = {name: tensor for name, tensor in envs.state_dict().items() if name != "options"}
        with pytest.warns(UserWarning, match="not resumed exactly"):
            assert not fresh.load_state_dict(without)


def test_states_without_options_have_none() -> None:
    with make_envs(Walk, config("sync")) as envs:
        envs.reset()
        assert "options" not in envs.state_dict()


def test_environments_that_are_not_active_stay_as_they_are(workers: str) -> None:
    with make_envs(Walk, config(workers)) as envs:
        envs.options = lambda env: {"begin": 10.0 * env}
        before = envs.reset().clone()
        envs.step_async(torch.tensor([[0.5], [0.6], [0.7]]), torch.tensor([True, False, True]))
        step = envs.step_wait()
        assert torch.equal(step.obs[1], before[1]) and torch.equal(step.next_obs[1], before[1])
        assert step.valid.tolist() == [True, False, True] and step.reward.tolist() == [1, 0, 1]
        assert step.success.isnan().tolist() == [False, True, False] and not (step.terminated | step.truncated).any()
        assert step.obs[:, 0].tolist() == pytest.approx([0.5, 10, 20.7], abs=0.01)
        assert envs.state_dict()["steps"].tolist() == [1, 0, 1]
        envs.step(torch.zeros(3, 1))
        assert envs.state_dict()["actions"][1, 0].tolist() == [0]  # that of the step it took, not of the one it did not


def test_an_end_is_told_once(workers: str) -> None:
    with make_envs(Walk, config(workers)) as envs:
        envs.options = lambda env: {"length": 1}
        envs.reset()
        assert envs.step(torch.zeros(3, 1)).terminated.all()
        envs.step_async(torch.zeros(3, 1), torch.tensor([True, False, False]))
        assert envs.step_wait().terminated.tolist() == [True, False, False]
        envs.step_async(torch.zeros(3, 1), torch.zeros(3, dtype=torch.bool))
        step = envs.step_wait()
        assert not step.terminated.any() and not step.valid.any() and step.reward.sum() == 0
        assert envs.state_dict()["episode"].tolist() == [2, 1, 1]


def test_resumed_exactly_after_mixed_activity(workers: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def random_step(*both: Any) -> list[Any]:
        action, active = torch.rand(3, 1, generator=generator), torch.rand(3, generator=generator) < 0.6
        for envs in both:
            envs.step_async(action, active)
        return [envs.step_wait() for envs in both]

    with make_envs(Walk, config(workers), seed=2) as envs, make_envs(Walk, config(workers)) as fresh:
        envs.options = fresh.options = lambda env: {"length": 6 + env}
        envs.reset()
        for _ in range(5):
            for _ in range(7):
                random_step(envs)
            assert fresh.load_state_dict(envs.state_dict())
            assert differences(fresh.state_dict(), envs.state_dict()) == []
            for _ in range(4):
                one, two = random_step(envs, fresh)
                assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(one[:7], two[:7], strict=True))
