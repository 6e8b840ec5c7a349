"""From any gymnasium environment to the one form the rest of the house knows.

That form is: actions in [-1, 1], or one-hot vectors for Discrete ones, float32 observations with one axis, action repeat and
time limit applied, errors that name the task, and an :class:`~worldmpc.types.EnvSpec`. :func:`adapt` builds it out of small wrappers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TimeLimit

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.types import EnvSpec

Env: TypeAlias = gymnasium.Env[Any, Any]
StepResult = tuple[Any, Any, bool, bool, dict[str, Any]]

SUCCESS_KEYS = ("success", "is_success")

UNBOUNDED = 1e10
"""Action bounds from here on are none: simulators write such numbers where an actuator has no limit."""


class EnvError(RuntimeError):
    """An environment, or the agent acting in it, did something that training cannot go on with; the message is one line."""


@dataclass(frozen=True)
class SuiteEnv:
    """What a suite hands to :func:`adapt`: an environment and what is known about it."""

    env: Env
    name: str
    step_limit: int | None
    """The environment's own time limit in simulator steps, already enforced by ``env``."""
    can_terminate: bool = True
    action_repeat: int = 1
    """The suite's default, used where the configuration names none."""


class RescaleAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Maps actions from [-1, 1] (clipped to it) onto the bounds of the wrapped environment."""

    def __init__(self, env: Env) -> None:
        """Wrap an environment with a bounded Box action space."""
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, Box)
        dtype = space.dtype
        self._center = ((space.high + space.low) / 2).astype(dtype)
        self._half = ((space.high - space.low) / 2).astype(dtype)
        self._low, self._high = space.low, space.high
        self._plain = bool((space.low == -1).all() and (space.high == 1).all())
        self.action_space = Box(-1.0, 1.0, space.shape, np.float32)

    def action(self, action: Any) -> Any:
        """Return the action of the wrapped environment: [A] in [-1, 1] -> [A] in its bounds."""
        clipped = np.minimum(np.maximum(np.asarray(action, self._center.dtype), -1.0), 1.0)
        if self._plain:
            return clipped
        # Rounding may step over the bound by one unit in the last place, which some environments assert on.
        return np.minimum(np.maximum(self._center + self._half * clipped, self._low), self._high)


class OneHotAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Takes the choices of a Discrete action space as one-hot vectors; of any vector, its largest entry is the choice."""

    def __init__(self, env: Env) -> None:
        """Wrap an environment with a Discrete action space."""
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, Discrete)
        self._start = int(space.start)
        self.action_space = Box(0.0, 1.0, (int(space.n),), np.float32)

    def action(self, action: Any) -> Any:
        """Return the action of the wrapped environment: [A] -> its number."""
        return self._start + int(np.argmax(action))


class ActionRepeat(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Repeats each action, sums the rewards, keeps the largest success, and stops early at the end of an episode."""

    def __init__(self, env: Env, repeat: int) -> None:
        """Wrap an environment so that one decision is up to ``repeat`` simulator steps."""
        super().__init__(env)
        self._repeat = repeat

    def step(self, action: Any) -> StepResult:
        """Take one decision: the last observation, the summed reward, the last flags and info, with the largest ``success`` if any."""
        obs, total, terminated, truncated, info = self.env.step(action)
        success = success_of(info)
        for _ in range(self._repeat - 1):
            if terminated or truncated:
                break
            obs, reward, terminated, truncated, info = self.env.step(action)
            total = float(total) + float(reward)
            if (now := success_of(info)) is not None:
                success = now if success is None else max(success, now)
        return obs, total, terminated, truncated, info if success is None else {**info, "success": success}


class FloatObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Casts observations to float32, in an array of their own."""

    def __init__(self, env: Env) -> None:
        """Wrap an environment with a Box observation space of one axis."""
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, Box)
        with np.errstate(over="ignore"):  # a bound too large for float32 is no bound
            low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        self.observation_space = Box(low, high, dtype=np.float32)

    def observation(self, observation: Any) -> Any:
        """Return [O] as float32.

        Raises:
            ValueError: another shape than the observation space has, which would be repeated or cut without a word.
        """
        array = np.array(observation, np.float32)
        if array.shape != self.observation_space.shape:
            expected = f"{list(self.observation_space.shape or ())} as in observation_space"
            raise ValueError(f"an observation of shape {list(array.shape)} instead of {expected} (reset returns observation and info)")
        return array


class GuardedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Outermost wrapper: carries the spec, names the task in every error, keeps of ``info`` only ``success``, replays episodes.

    ``env_spec`` is the :class:`~worldmpc.types.EnvSpec`. The first ``reset`` without a seed uses the one given here.
    """

    def __init__(self, env: Env, spec: EnvSpec, *, seed: int | None = None, index: int = 0) -> None:
        """Wrap an adapted environment; ``index`` is the number it bears in errors."""
        super().__init__(env)
        self.env_spec = spec
        self.index = index
        self._first_seed = seed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode and return its first observation [O].

        Raises:
            EnvError: the environment raised an error.
        """
        seed, self._first_seed = self._first_seed if seed is None else seed, None
        try:
            obs, _ = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._failure("reset", error) from error
        return obs, {}

    def step(self, action: Any) -> StepResult:
        """Take one decision: [A] in [-1, 1], or one-hot -> observation [O], reward, terminated, truncated, info with ``success`` at most.

        Raises:
            EnvError: the environment raised an error.
        """
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            success = success_of(info)
            return obs, float(reward), bool(terminated), bool(truncated), {} if success is None else {"success": success}
        except Exception as error:
            raise self._failure("step", error) from error

    def render(self) -> Any:
        """Return one frame [height, width, 3] uint8.

        Raises:
            EnvError: the environment cannot render here.
        """
        try:
            return self.env.render()
        except Exception as error:
            raise self._failure("render", error) from error

    def replay(self, seed: int, actions: np.ndarray, options: dict[str, Any] | None = None) -> np.ndarray | str:
        """Reset with seed and options, take actions [steps, A] float32 again, and return the observation reached, [O].

        Returns the reason as text where the episode could not be played again.
        """
        try:
            obs, _ = self.env.reset(seed=seed, options=options)
            for number, action in enumerate(actions):
                obs, _, terminated, truncated, _ = self.env.step(action)
                if terminated or truncated:
                    return f"the episode ended at decision {number + 1} of {len(actions)}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return obs

    def _failure(self, verb: str, error: Exception) -> EnvError:
        text = " ".join(str(error).split())
        return EnvError(f"{self.env_spec.name}: environment {self.index} raised {type(error).__name__} in {verb}: {text}")


def nearest_name(name: str, spelled: str, suite: str, names: Collection[str]) -> str:
    """Return how a suite spells a name, if it has it.

    Raises:
        ConfigError: there is none; the message has the nearest one, or all.
    """
    if spelled in names:
        return spelled
    near = difflib.get_close_matches(spelled, names, n=1)
    hint = f"did you mean {suite}/{near[0]}?" if near else f"one of {', '.join(f'{suite}/{task}' for task in names)}"
    raise ConfigError(f"task: unknown task '{suite}/{name}'; {hint}")


def success_of(info: Mapping[str, Any]) -> float | None:
    """Return the success that a step reported, under whichever of :data:`SUCCESS_KEYS`; None where it reported none."""
    return next((float(info[key]) for key in SUCCESS_KEYS if key in info), None)


def adapt(made: SuiteEnv, config: EnvConfig, *, seed: int | None = None, index: int = 0) -> GuardedEnv:
    """Bring a suite's environment into the common form.

    The time limit is the shorter of the environment's own and ``config.episode_length`` (decisions); a suite that can lift its
    own limit has done so before. Actions of games are not repeated here, as only one of the players may do that.

    Raises:
        ConfigError: the observation or action space is not supported.
    """
    obs_shape, action_dim, discrete = check_spaces(made.env.observation_space, made.env.action_space, made.name)
    repeat = config.action_repeat or made.action_repeat
    own = None if made.step_limit is None else math.ceil(made.step_limit / repeat)
    limits = [limit for limit in (own, config.episode_length) if limit is not None]
    spec = EnvSpec(
        name=made.name,
        obs_shape=obs_shape,
        action_dim=action_dim,
        episode_length=min(limits, default=None),
        action_repeat=repeat,
        can_terminate=made.can_terminate,
        discrete=discrete,
        seats=getattr(made.env.unwrapped, "seats", None),
        mirror=getattr(made.env.unwrapped, "mirror", None),
    )
    env: Env = OneHotAction(made.env) if discrete else RescaleAction(made.env)
    if repeat > 1 and spec.seats is None:  # of a game whoever seats the players repeats, as only one of them does
        env = ActionRepeat(env, repeat)
    if config.episode_length is not None:
        env = TimeLimit(env, config.episode_length * (repeat if spec.seats else 1))
    return GuardedEnv(FloatObservation(env), spec, seed=seed, index=index)


def check_spaces(observation: gymnasium.Space[Any], action: gymnasium.Space[Any], name: str) -> tuple[tuple[int, ...], int, bool]:
    """Return (observation shape, action dimensions or choices, whether they are choices) of supported spaces.

    Raises:
        ConfigError: a space that is not supported; the message names it and what to do.
    """
    if not isinstance(observation, Box):
        raise ConfigError(
            f"{name}: observation space {_describe(observation)} is not supported, only Box; "
            "gymnasium.wrappers.FlattenObservation turns most spaces into one"
        )
    if len(observation.shape) == 3 and observation.dtype == np.uint8:
        raise ConfigError(f"{name}: images are not supported yet (observation space {_describe(observation)})")
    if len(observation.shape) != 1 or 0 in observation.shape:
        raise ConfigError(
            f"{name}: observation space {_describe(observation)} is not supported, only a Box with one axis; "
            "gymnasium.wrappers.FlattenObservation makes one"
        )
    if isinstance(action, Discrete):
        return observation.shape, int(action.n), True
    if not isinstance(action, Box) or not np.issubdtype(action.dtype, np.floating) or len(action.shape) != 1 or 0 in action.shape:
        raise ConfigError(f"{name}: action space {_describe(action)} is not supported, only Discrete and a float Box with one axis")
    if not max(np.abs(action.low).max(), np.abs(action.high).max()) < UNBOUNDED:
        raise ConfigError(f"{name}: action space {_describe(action)} is unbounded; wrap the environment so that its bounds are finite")
    return observation.shape, action.shape[0], False


def own_step_limit(env: Env) -> int | None:
    """Return the time limit that gymnasium enforces on an environment, in its own steps; None where it has none."""
    layer: Any = env
    limits: list[int] = []
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, TimeLimit):
            limits.append(layer._max_episode_steps)
        layer = layer.env
    return min(limits, default=None)


def _describe(space: gymnasium.Space[Any]) -> str:
    return " ".join(str(space).split())
