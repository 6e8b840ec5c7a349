"""Tasks that are learned in seconds and whose right answer is known. Pure numpy.

``toy/pointmass`` has a closed-form optimum, ``toy/balance`` terminates, ``toy/linear-quadratic`` has the optimum of a Riccati
recursion, ``toy/identity`` and ``toy/identity-discrete`` show the action they want, ``toy/counter`` counts and proves that no
transition is lost or invented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from worldmpc.envs.wrappers import SuiteEnv, nearest_name

End = Literal["terminated", "truncated"]
Result = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


class PointMass(gymnasium.Env[Any, Any]):
    """A point in the plane moves at a chosen velocity and should sit at the origin.

    ``x' = x + 0.1 a``, reward ``1 - mean(|x'|)``, 50 steps, first position uniform in [-1, 1] per axis.

    Known answers: the best action is ``clip(-x / 0.1, -1, 1)``; from a first position its return is :func:`optimal_return`, on
    average over first positions 50 - sum_{t<10} (1 - t/10)^2 / 2 = **48.575** (t from 1). Uniformly random actions return
    sum_t (1 - (1 + t/300) / 2) = **22.875** on average (exact up to 0.01, the part of walks longer than 1).
    """

    LENGTH = 50
    SPEED = 0.1
    OPTIMAL_RETURN = 48.575
    RANDOM_RETURN = 22.875

    def __init__(self, *, length: int | None = LENGTH, render: bool = False) -> None:
        """Make the task; ``length`` None removes its time limit."""
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.render_mode = "rgb_array" if render else None
        self.step_limit = length
        self._position = np.zeros(2)
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [2], the position."""
        super().reset(seed=seed)
        self._position = self.np_random.uniform(-1.0, 1.0, 2)
        self._time = 0
        return self._position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> Result:
        """Move: [2] in [-1, 1] -> position [2], reward, terminated (never), truncated, info."""
        self._position = self._position + self.SPEED * np.clip(action, -1.0, 1.0)
        self._time += 1
        reward = 1.0 - float(np.abs(self._position).mean())
        return self._position.astype(np.float32), reward, False, self._time == self.step_limit, {}

    def render(self) -> Any:
        """Return a frame [160, 160, 3] uint8: the origin and the point."""
        return _draw([(0.0, 0.0), (float(self._position[0]), float(self._position[1]))], extent=1.5) if self.render_mode else None

    @staticmethod
    def optimal_return(position: np.ndarray, length: int = LENGTH) -> float:
        """Return the largest return from a first position [2]: each axis comes closer by 0.1 per step, then stays."""
        steps = np.arange(1, length + 1)[:, None]
        return float(length - np.maximum(np.abs(position) - PointMass.SPEED * steps, 0.0).mean(1).sum())


class Balance(gymnasium.Env[Any, Any]):
    """An unstable point on a line should be kept within a band; leaving it terminates.

    ``x' = 1.1 x + 0.1 a``, terminated where ``|x'| > 1``, reward 1 per step (the last one included), 100 steps at most, first
    position uniform in [-0.5, 0.5].

    Known answers: ``a = clip(-11 x, -1, 1)`` never leaves the band, so the largest return is **100** from every start. Uniformly
    random actions return **17.99** on average (measured over 10^6 episodes, standard error 0.01).
    """

    LENGTH = 100
    OPTIMAL_RETURN = 100.0
    RANDOM_RETURN = 17.99

    def __init__(self, *, length: int | None = LENGTH, render: bool = False) -> None:
        """Make the task; ``length`` None removes its time limit."""
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.render_mode = "rgb_array" if render else None
        self.step_limit = length
        self._position = 0.0
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [1], the position."""
        super().reset(seed=seed)
        self._position = float(self.np_random.uniform(-0.5, 0.5))
        self._time = 0
        return np.array([self._position], np.float32), {}

    def step(self, action: np.ndarray) -> Result:
        """Push: [1] in [-1, 1] -> position [1], reward 1, terminated outside the band, truncated, info."""
        self._position = 1.1 * self._position + 0.1 * float(np.clip(action, -1.0, 1.0)[0])
        self._time += 1
        return np.array([self._position], np.float32), 1.0, abs(self._position) > 1.0, self._time == self.step_limit, {}

    def render(self) -> Any:
        """Return a frame [160, 160, 3] uint8: both edges of the band and the point."""
        return _draw([(-1.0, 0.0), (1.0, 0.0), (self._position, 0.0)], extent=1.5) if self.render_mode else None


class LinearQuadratic(gymnasium.Env[Any, Any]):
    """A point that tips away from the origin should be held there with little force.

    ``x' = A x + B u`` with ``x = (position, velocity)`` and one force ``u``; ``A`` has the eigenvalues 1.07 and 0.93. Reward
    ``-(x^T Q x + u^T R u)``, of the position, velocity and force of this step; 30 steps, first position and velocity uniform in
    [-0.3, 0.3].

    Known answers: the best force is ``u_t = -K_t x_t`` with the gains of :meth:`riccati` (Bertsekas, Dynamic Programming and
    Optimal Control, section 4.1). From every start it stays within [-0.982, 0.982], so the bounds of the action do not matter and
    :meth:`optimal_return` is ``-x_0^T P_0 x_0``, on average over starts ``-0.3^2 / 3 tr P_0`` = **-1.2234**. Uniformly random
    actions, whose variance is 1/3, return ``-sum_t (tr Q S_t + R / 3)`` = **-22.80** on average, with the second moments
    ``S_0 = 0.3^2 / 3`` and ``S_{t+1} = A S_t A^T + B B^T / 3``.
    """

    A = np.array([[1.0, 0.1], [0.05, 1.0]])
    B = np.array([[0.0], [0.1]])
    Q = np.diag([1.0, 0.1])
    R = np.array([[1.0]])
    LENGTH = 30
    START = 0.3
    OPTIMAL_RETURN = -1.2234
    RANDOM_RETURN = -22.80

    def __init__(self, *, length: int | None = LENGTH, render: bool = False) -> None:
        """Make the task; ``length`` None removes its time limit."""
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.render_mode = "rgb_array" if render else None
        self.step_limit = length
        self._state = np.zeros(2)
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [2], position and velocity."""
        super().reset(seed=seed)
        self._state = self.np_random.uniform(-self.START, self.START, 2)
        self._time = 0
        return self._state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> Result:
        """Push: [1] in [-1, 1] -> position and velocity [2], reward, terminated (never), truncated, info."""
        force = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        reward = -float(self._state @ self.Q @ self._state + force @ self.R @ force)
        self._state = self.A @ self._state + self.B @ force
        self._time += 1
        return self._state.astype(np.float32), reward, False, self._time == self.step_limit, {}

    def render(self) -> Any:
        """Return a frame [160, 160, 3] uint8: the origin and the point."""
        return _draw([(0.0, 0.0), (float(self._state[0]), 0.0)], extent=1.5) if self.render_mode else None

    @classmethod
    def riccati(cls, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
        """Return the best gains of every step [T, 1, 2] and the matrix of the cost-to-go of the first one [2, 2].

        ``K = (R + B^T P B)^-1 B^T P A`` and ``P <- Q + A^T P (A - B K)``, backwards from ``P = 0``.
        """
        cost, gains = np.zeros((2, 2)), np.zeros((length, 1, 2))
        for step in reversed(range(length)):
            gains[step] = np.linalg.solve(cls.R + cls.B.T @ cost @ cls.B, cls.B.T @ cost @ cls.A)
            cost = cls.Q + cls.A.T @ cost @ (cls.A - cls.B @ gains[step])
        return gains, cost

    @classmethod
    def optimal_return(cls, state: np.ndarray, length: int = LENGTH) -> float:
        """Return the largest return from a first position and velocity [2], each within [-0.3, 0.3]."""
        return -float(state @ cls.riccati(length)[1] @ state)


class Identity(gymnasium.Env[Any, Any]):
    """The observation shows the action that is wanted; the next one is a new draw, so every step is a task of its own.

    Box (``toy/identity``): target uniform in [-1, 1], shown as it is, reward ``1 - |a - target|``. Discrete
    (``toy/identity-discrete``): target uniform among 3, shown as a one-hot vector, reward 1 where it is chosen, else 0. 20 steps.

    Known answers, the same for both: taking what is shown returns **20**; uniformly random actions return 20/3 = **6.667** on
    average, as the distance of two independent uniform numbers in [-1, 1] is 2/3 and one choice of three is right.
    """

    LENGTH = 20
    CHOICES = 3
    OPTIMAL_RETURN = 20.0
    RANDOM_RETURN = 20.0 / 3.0

    def __init__(self, *, discrete: bool = False, length: int | None = LENGTH) -> None:
        """Make the task; ``length`` None removes its time limit."""
        self.observation_space = Box(0.0, 1.0, (self.CHOICES,), np.float32) if discrete else Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(self.CHOICES) if discrete else Box(-1.0, 1.0, (1,), np.float32)
        self.step_limit = length
        self._discrete = discrete
        self._target = self.observation_space.low
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [1] or [3], the first target."""
        super().reset(seed=seed)
        self._time = 0
        return self._show(), {}

    def step(self, action: Any) -> Result:
        """Answer: [1] in [-1, 1], or a choice -> the next target [1] or [3], reward, terminated (never), truncated, info."""
        if self._discrete:
            reward = float(self._target[int(action)])
        else:
            reward = 1.0 - abs(float(np.clip(action, -1.0, 1.0)[0]) - float(self._target[0]))
        self._time += 1
        return self._show(), reward, False, self._time == self.step_limit, {}

    def _show(self) -> np.ndarray:
        if self._discrete:
            self._target = np.eye(self.CHOICES, dtype=np.float32)[self.np_random.integers(self.CHOICES)]
        else:
            self._target = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self._target.copy()


class Counter(gymnasium.Env[Any, Any]):
    """The counting environment: observation [step in episode, episode number, environment number], reward = step number.

    Episode ``k`` has ``lengths[k % len(lengths)]`` steps and ends by ``ends[k % len(ends)]``; its ``info['success']`` is True on
    the last step of odd episodes. A transition is real exactly if its next observation is its observation plus [1, 0, 0], and no
    two are equal. Episodes are numbered over the life of the object, so this is also the one that cannot be resumed exactly.
    """

    def __init__(
        self, *, env_id: int = 0, lengths: Sequence[int] = (3, 1, 5, 2), ends: Sequence[End] = ("terminated", "truncated")
    ) -> None:
        """Make the task with a number of its own and its schedule."""
        self.observation_space = Box(-1.0, np.inf, (3,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.step_limit = None
        self._id = env_id
        self._lengths = tuple(lengths)
        self._ends = tuple(ends)
        self._episode = -1
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin the next episode: [3]."""
        super().reset(seed=seed)
        self._episode += 1
        self._time = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> Result:
        """Count: [1], ignored -> [3], the step number as reward, the flags of the schedule, info with ``success``.

        Raises:
            RuntimeError: the episode is over.
        """
        length = self._lengths[self._episode % len(self._lengths)]
        if self._time >= length:
            raise RuntimeError("step after the end of the episode")
        self._time += 1
        last = self._time == length
        end = self._ends[self._episode % len(self._ends)] if last else None
        return self._obs(), float(self._time), end == "terminated", end == "truncated", {"success": last and self._episode % 2 == 1}

    def _obs(self) -> np.ndarray:
        return np.array([self._time, self._episode, self._id], np.float32)


def _make_pointmass(index: int, unlimited: bool, render: bool) -> SuiteEnv:
    env = PointMass(length=None if unlimited else PointMass.LENGTH, render=render)
    return SuiteEnv(env, "toy/pointmass", env.step_limit, can_terminate=False)


def _make_balance(index: int, unlimited: bool, render: bool) -> SuiteEnv:
    env = Balance(length=None if unlimited else Balance.LENGTH, render=render)
    return SuiteEnv(env, "toy/balance", env.step_limit)


def _make_linear_quadratic(index: int, unlimited: bool, render: bool) -> SuiteEnv:
    env = LinearQuadratic(length=None if unlimited else LinearQuadratic.LENGTH, render=render)
    return SuiteEnv(env, "toy/linear-quadratic", env.step_limit, can_terminate=False)


def _make_identity(index: int, unlimited: bool, render: bool) -> SuiteEnv:
    env = Identity(length=None if unlimited else Identity.LENGTH)
    return SuiteEnv(env, "toy/identity", env.step_limit, can_terminate=False)


def _make_identity_discrete(index: int, unlimited: bool, render: bool) -> SuiteEnv:
    env = Identity(discrete=True, length=None if unlimited else Identity.LENGTH)
    return SuiteEnv(env, "toy/identity-discrete", env.step_limit, can_terminate=False)


def _make_counter(index: int, unlimited: bool, render: bool) -> SuiteEnv:
    return SuiteEnv(Counter(env_id=index), "toy/counter", None)


MAKERS: dict[str, Callable[[int, bool, bool], SuiteEnv]] = {
    "pointmass": _make_pointmass,
    "balance": _make_balance,
    "linear-quadratic": _make_linear_quadratic,
    "identity": _make_identity,
    "identity-discrete": _make_identity_discrete,
    "counter": _make_counter,
}


def list_names() -> list[str]:
    """Return the names of all tasks, without the suite's prefix."""
    return list(MAKERS)


def resolve(name: str) -> str:
    """Return the canonical form of a name, both without the suite's prefix.

    Raises:
        ConfigError: no such task.
    """
    return nearest_name(name, name.lower().replace("_", "-"), "toy", MAKERS)


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment of a canonical name; ``unlimited`` lifts its time limit, ``index`` is the counter's number."""
    return MAKERS[name](index, unlimited, render)


def _draw(points: Sequence[tuple[float, float]], extent: float) -> np.ndarray:
    """Draw points on white, the last one red: pairs in [-extent, extent] -> [160, 160, 3] uint8."""
    size, radius = 160, 5
    frame = np.full((size, size, 3), 255, np.uint8)
    for number, (x, y) in enumerate(points):
        column, row = (int(round((0.5 + 0.5 * value / extent) * (size - 1))) for value in (x, -y))
        rows = slice(max(row - radius, 0), max(row + radius, 0))
        frame[rows, max(column - radius, 0) : max(column + radius, 0)] = (200, 30, 30) if number == len(points) - 1 else (120, 120, 120)
    return frame
