"""Batches of environments as tensors, with one meaning of "the episode ended" whatever is underneath."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, cast

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from worldmpc.envs.wrappers import FAILURE_KEY, SUCCESS_KEYS, EnvError
from worldmpc.types import EnvSpec, EnvStep

VectorEnv: TypeAlias = gymnasium.vector.VectorEnv[Any, Any, Any]
T = TypeVar("T")


def episode_seed(seed: int, env: int, episode: int) -> int:
    """Return the seed of one episode of one environment of a run: below 2**32, independent between episodes."""
    return int(np.random.SeedSequence([seed, env, episode]).generate_state(1)[0])


class VecEnv:
    """Environments stepped together: tensors in, tensors out, a finished environment begins its next episode at once.

    ``spec`` is the :class:`~worldmpc.types.EnvSpec`, ``num_envs`` is ``E``. Tensors returned belong to the caller, except that
    ``EnvStep.obs`` is ``EnvStep.next_obs`` itself (and ``.obs``) where no episode ended: do not write into them.

    A wrapped ``NEXT_STEP`` environment returns the first observation of a new episode one call late: at the end of an episode
    ``obs`` is still the last observation, the following call has ``valid`` False and brings the first one.
    """

    def __init__(self, env: VectorEnv, spec: EnvSpec, *, seed: int = 1, owned: bool = False, may_render: bool = True) -> None:
        """Wrap a gymnasium vector environment; :func:`worldmpc.envs.make_envs` is the usual way here.

        ``owned`` says that the environments inside are :class:`~worldmpc.envs.wrappers.GuardedEnv` in mode ``DISABLED``: their
        actions are in [-1, 1], every episode has its own seed, and episodes can be played again. ``may_render`` False says that
        frames were not asked for, where they could have been.
        """
        self.spec = spec
        self.num_envs = env.num_envs
        self._env = env
        self._seed = seed
        self._owned = owned
        self._may_render = may_render
        self._closed = False
        self._obs: Tensor | None = None
        self._pending = np.zeros(self.num_envs, bool)  # NEXT_STEP only: the next call resets this environment
        self._unknown = np.full(self.num_envs, np.nan, np.float32)
        self._rows = np.arange(self.num_envs)
        self._episode = np.full(self.num_envs, -1, np.int64)
        self._steps = np.zeros(self.num_envs, np.int64)
        self._log = np.zeros((self.num_envs, (spec.episode_length or 256) if owned else 0, spec.action_dim), np.float32)
        if not owned:
            assert isinstance(env.single_action_space, Box)
            self._low, self._high = env.single_action_space.low, env.single_action_space.high
        mode = AutoresetMode(env.metadata["autoreset_mode"])
        self._finish = {
            AutoresetMode.DISABLED: self._finish_disabled,
            AutoresetMode.SAME_STEP: self._finish_same_step,
            AutoresetMode.NEXT_STEP: self._finish_next_step,
        }[mode]

    @property
    def obs(self) -> Tensor:
        """Current observation, [E, *O].

        Raises:
            RuntimeError: before the first reset.
        """
        if self._obs is None:
            raise RuntimeError(f"{self.spec.name}: reset the environments before using them")
        return self._obs

    def reset(self, seed: int | None = None) -> Tensor:
        """Begin a new episode everywhere and return its first observation, [E, *O].

        ``seed`` starts the sequence of episodes anew, as a fresh VecEnv of that seed would.

        Raises:
            EnvError: an environment raised an error or returned a number that is not finite.
        """
        if seed is not None:
            self._seed = seed
            self._episode[:] = -1
        self._pending[:] = False
        self._obs = torch.from_numpy(self._begin(np.ones(self.num_envs, bool)))
        return self._obs

    def step(self, action: Tensor) -> EnvStep:
        """Take one decision everywhere: [E, A] in [-1, 1] (clipped to it) -> :class:`~worldmpc.types.EnvStep`.

        Both ``terminated`` and ``truncated`` may be True, where an episode terminates at its time limit.

        Raises:
            EnvError: an environment raised an error, or it or the agent produced a number that is not finite. The
                environments are closed then.
            ValueError: the action has another shape.
            RuntimeError: before the first reset.
        """
        if self._obs is None:
            raise RuntimeError(f"{self.spec.name}: reset the environments before using them")
        array = action.detach().to("cpu", torch.float32).numpy()
        if array.shape != (self.num_envs, self.spec.action_dim):
            raise ValueError(f"action: expected shape ({self.num_envs}, {self.spec.action_dim}), got {tuple(array.shape)}")
        if not _finite(array):
            self._reject(array, "the agent produced a non-finite action for environment {index}")
        result, reward, terminated, truncated, info = self._call("step", lambda: self._env.step(self._to_env(array)))
        self._check_failure(info)
        next_obs = np.array(result, np.float32)
        reward = np.array(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        if not _finite(reward):
            self._reject(reward, "environment {index} returned a non-finite reward")
        if self._owned:
            self._record(array)
        next_obs, obs, valid, success = self._finish(next_obs, reward, terminated, truncated, info)
        for values in (next_obs,) if obs is next_obs else (next_obs, obs):
            if not _finite(values):
                self._reject(values, "environment {index} returned a non-finite observation")
        next_tensor = torch.from_numpy(next_obs)
        self._obs = next_tensor if obs is next_obs else torch.from_numpy(obs)
        return EnvStep(
            next_obs=next_tensor,
            reward=torch.from_numpy(reward),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            obs=self._obs,
            valid=torch.from_numpy(valid),
            success=torch.from_numpy(success),
        )

    def render(self) -> tuple[np.ndarray, ...]:
        """Return one frame per environment, [height, width, 3] uint8; needs ``make_envs(..., render=True)``.

        Raises:
            EnvError: the environment cannot render here. The environments are not closed then.
        """
        try:
            frames = self._env.render()
        except EnvError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise EnvError(f"{self.spec.name}: render failed: {type(error).__name__}: {text}") from error
        for frame in frames or ():
            if isinstance(frame, str):
                raise EnvError(frame)
        if frames is None or any(frame is None for frame in frames):
            hint = "this environment gives no frames; make it with render_mode='rgb_array'"
            raise EnvError(f"{self.spec.name}: {hint if self._may_render else 'no frames; make the environments with render=True'}")
        return tuple(np.asarray(frame) for frame in frames)

    def close(self) -> None:
        """Free the environments and end their worker processes; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if isinstance(self._env, AsyncVectorEnv):
            _close_workers(self._env)
        else:
            self._env.close()

    def __enter__(self) -> VecEnv:
        """Return itself, to be closed at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what :meth:`load_state_dict` needs to come back to this very decision.

        seed [], episode [E], steps [E] (all int64), actions [E, longest running episode, A] and obs [E, *O] (float32).
        """
        longest = int(self._steps.max()) if self._owned else 0
        obs = torch.zeros(self.num_envs, *self.spec.obs_shape) if self._obs is None else self._obs.clone()
        return {
            "seed": torch.tensor(self._seed, dtype=torch.int64),
            "episode": torch.from_numpy(self._episode.copy()),
            "steps": torch.from_numpy(self._steps.copy()),
            "actions": torch.from_numpy(self._log[:, :longest].copy()),
            "obs": obs,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> bool:
        """Come back to a saved decision by playing the running episodes again from their seeds.

        Returns True where the observations reached equal the saved ones bit by bit. Otherwise (an environment that is not
        deterministic, a foreign vector environment) it warns, begins fresh episodes everywhere, and returns False: ``.obs`` is
        then a first observation, and whoever remembers things about the running episodes must forget them.

        Raises:
            ValueError: the state was saved with other environments (number, observation or action dimensions).
            EnvError: an environment cannot even begin a fresh episode.
        """
        expected = (self.num_envs, *self.spec.obs_shape), self.spec.action_dim
        found = tuple(state["obs"].shape), state["actions"].shape[-1]
        if expected != found:
            raise ValueError(f"{self.spec.name}: the saved state has observations and action dimensions {found}, expected {expected}")
        self._seed = int(state["seed"])
        self._episode = state["episode"].cpu().numpy().copy()
        self._pending[:] = False
        if (self._episode < 0).all():
            self._obs = None
            return True
        reason = self._replay(state) if self._owned else "a vector environment made elsewhere cannot be played again"
        if reason is None:
            self._obs = state["obs"].to("cpu", torch.float32).clone()
            return True
        warnings.warn(f"{self.spec.name}: not resumed exactly, all episodes begin afresh ({reason})", stacklevel=2)
        self._obs = torch.from_numpy(self._begin(np.ones(self.num_envs, bool)))
        return False

    def _replay(self, state: Mapping[str, Tensor]) -> str | None:
        """Play the running episodes again; return why that failed, or None."""
        steps = state["steps"].cpu().numpy().copy()
        saved = state["actions"].cpu().numpy()
        seeds = [episode_seed(self._seed, env, int(episode)) for env, episode in enumerate(self._episode)]
        actions = [saved[env, :count] for env, count in enumerate(steps)]
        call = cast(SyncVectorEnv | AsyncVectorEnv, self._env).call
        reached = self._call("replay", lambda: call("replay", seeds, actions))
        for index, (obs, expected) in enumerate(zip(reached, state["obs"].cpu().numpy(), strict=True)):
            if isinstance(obs, str):
                return f"environment {index}: {obs}"
            if not np.array_equal(obs, expected):
                return f"environment {index} is not deterministic: it reached another observation with the same seed and actions"
        self._reserve(int(steps.max()))
        self._log[:, : saved.shape[1]] = saved
        self._steps = steps
        return None

    def _begin(self, which: np.ndarray) -> np.ndarray:
        """Reset the environments of a mask [E] and return the vector's observations [E, *O], of which only those rows count."""
        self._episode += which
        self._steps[which] = 0
        result, info = self._call("reset", lambda: self._env.reset(**self._reset_arguments(which)))
        self._check_failure(info)
        obs = np.array(result, np.float32)
        if not _finite(obs[which]):
            self._reject(obs, "environment {index} returned a non-finite first observation")
        return obs

    def _reset_arguments(self, which: np.ndarray) -> dict[str, Any]:
        everywhere = bool(which.all())
        options = None if everywhere else {"reset_mask": which}
        if self._owned:
            seeds = [episode_seed(self._seed, env, int(self._episode[env])) if which[env] else None for env in range(self.num_envs)]
            return {"seed": seeds, "options": options}
        # Foreign vector environments need not know lists of seeds; one number is the part of the interface that all have.
        return {"seed": episode_seed(self._seed, 0, int(self._episode[0])) if everywhere else None, "options": options}

    # Each way to finish a step takes what the vector environment returned and gives (next_obs, obs, valid, success).

    def _finish_disabled(
        self, next_obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        done = terminated | truncated
        obs = next_obs
        if done.any():
            obs = np.where(_like(done, next_obs), self._begin(done), next_obs)
        return next_obs, obs, np.ones(self.num_envs, bool), self._success(info)

    def _finish_same_step(
        self, obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        done = terminated | truncated
        success = self._success(info)
        next_obs = obs
        if done.any():
            if "final_obs" not in info:
                self.close()
                raise EnvError(f"{self.spec.name}: the vector environment ended an episode without info['final_obs']")
            next_obs = obs.copy()
            for index in np.flatnonzero(done):
                next_obs[index] = info["final_obs"][index]
            success = np.where(done, self._success(info.get("final_info", {})), success)
            self._episode += done
        return next_obs, obs, np.ones(self.num_envs, bool), success

    def _finish_next_step(
        self, next_obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        valid = ~self._pending
        self._episode += self._pending
        reward[self._pending], terminated[self._pending], truncated[self._pending] = 0.0, False, False
        self._pending = terminated | truncated
        return next_obs, next_obs, valid, np.where(valid, self._success(info), np.float32(np.nan))

    def _success(self, info: dict[str, Any]) -> np.ndarray:
        """Return [E] float32, NaN where an environment reports no success."""
        success = self._unknown.copy()
        for key in SUCCESS_KEYS:
            if key in info:
                present = np.asarray(info.get(f"_{key}", np.ones(self.num_envs, bool)), bool)
                success[present] = np.asarray(info[key])[present].astype(np.float32)
        return success

    def _to_env(self, action: np.ndarray) -> np.ndarray:
        if self._owned:
            return action
        unit = (np.clip(action, -1.0, 1.0) + 1.0) / 2.0
        return np.clip(self._low + (self._high - self._low) * unit, self._low, self._high).astype(self._low.dtype)

    def _record(self, action: np.ndarray) -> None:
        self._reserve(int(self._steps.max()) + 1)
        self._log[self._rows, self._steps] = action
        self._steps += 1

    def _reserve(self, length: int) -> None:
        if length > self._log.shape[1]:
            grown = np.zeros((self.num_envs, max(length, 2 * self._log.shape[1]), self.spec.action_dim), np.float32)
            grown[:, : self._log.shape[1]] = self._log
            self._log = grown

    def _call(self, verb: str, function: Callable[[], T]) -> T:
        """Call into the vector environment; whatever it raises becomes one EnvError, after closing."""
        if self._closed:
            raise EnvError(f"{self.spec.name}: the environments are closed")
        try:
            return function()
        except EnvError:
            self.close()
            raise
        except (EOFError, ConnectionError) as error:
            self.close()
            raise EnvError(f"{self.spec.name}: a worker process died in {verb} (killed, or crashed in native code)") from error
        except Exception as error:
            self.close()
            text = " ".join(str(error).split())
            raise EnvError(f"{self.spec.name}: the vector environment raised {type(error).__name__} in {verb}: {text}") from error

    def _check_failure(self, info: dict[str, Any]) -> None:
        if FAILURE_KEY in info:
            self.close()
            raise EnvError(next(message for message in info[FAILURE_KEY] if message))

    def _reject(self, values: np.ndarray, message: str) -> None:
        self.close()
        bad = ~np.isfinite(values).reshape(self.num_envs, -1)
        index = int(np.flatnonzero(bad.any(1))[0])
        row = values.reshape(self.num_envs, -1)[index]
        where = f" at entry {int(np.flatnonzero(bad[index])[0])} of {row.size}" if row.size > 1 else ""
        raise EnvError(f"{self.spec.name}: {message.format(index=index)} ({row[bad[index]][0]}{where})")


def _finite(values: np.ndarray) -> bool:
    # The squared sum is several times faster, and wrong only where huge numbers overflow it.
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def _like(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    return mask.reshape(-1, *(1,) * (values.ndim - 1))


def _close_workers(env: AsyncVectorEnv) -> None:
    """End worker processes, also those that died or hang in a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium warns where a step was under way, which is why we are here
        try:
            env.close(timeout=5)
        except (EOFError, OSError, TypeError):
            # The pipe of a dead worker: gymnasium cannot end in order, so end the rest by hand.
            for process in env.processes:
                process.terminate()
                process.join()
            env.closed = True
