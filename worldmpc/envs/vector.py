"""Batches of environments as tensors, with one meaning of "the episode ended" whatever is underneath."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor

from worldmpc.config import EnvConfig
from worldmpc.envs.workers import LocalEnvs, Options, WorkerEnvs
from worldmpc.envs.wrappers import SUCCESS_KEYS, EnvError
from worldmpc.types import EnvSpec, EnvStep

VectorEnv: TypeAlias = gymnasium.vector.VectorEnv[Any, Any, Any]
OwnEnvs: TypeAlias = LocalEnvs | WorkerEnvs
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

    Ctrl-C in the middle of a step leaves some environments behind others. A further step is refused then; the environments can be
    reset or a state be loaded, and ``state_dict`` is that of the last complete step.
    """

    def __init__(self, env: VectorEnv | OwnEnvs, spec: EnvSpec, config: EnvConfig, *, seed: int = 1, may_render: bool = True) -> None:
        """Wrap environments; :func:`worldmpc.envs.make_envs` is the usual way here.

        In ours (not a gymnasium vector environment) actions are in [-1, 1], every episode has its own seed, and episodes can be
        played again. ``may_render`` False says that frames were not asked for, where they could have been.
        """
        self.spec = spec
        self.config = config
        """How they were made."""
        self.num_envs = env.num_envs
        self._env = env
        self._own = env if isinstance(env, OwnEnvs) else None
        self._to_env: Callable[[np.ndarray], np.ndarray] = lambda action: action
        self._seed = seed
        self.begun = 0
        """How often all environments have begun new episodes together."""
        self.options: Callable[[int], Options] = lambda env: None
        """Asked, with the environment's number, for what its next episode is begun with; only ours are."""
        self._may_render = may_render
        self._closed = False
        self._obs: Tensor | None = None
        self._action: np.ndarray | None = None  # of the step under way
        self._active: np.ndarray | None = None  # of that step; None: all
        self._torn = False  # from the beginning of a reset or step to its end
        self._pending = np.zeros(self.num_envs, bool)  # NEXT_STEP only: the next call resets this environment
        self._unknown = np.full(self.num_envs, np.nan, np.float32)
        self._rows = np.arange(self.num_envs)
        self._episode = np.full(self.num_envs, -1, np.int64)
        self._options: list[Options] = [None] * self.num_envs
        self._steps = np.zeros(self.num_envs, np.int64)
        longest = (spec.episode_length or 256) * (spec.action_repeat if spec.seats else 1)
        self._log = np.zeros((self.num_envs, longest if self._own else 0, spec.action_dim), np.float32)
        mode = AutoresetMode.DISABLED
        if not isinstance(env, OwnEnvs):
            space = env.single_action_space
            assert isinstance(space, Box | Discrete)
            self._to_env = partial(_choices, start=int(space.start)) if isinstance(space, Discrete) else partial(_scaled, space=space)
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
            RuntimeError: a step is under way.
        """
        self._require_idle("reset")
        if seed is not None:
            self._seed = seed
            self._episode[:] = -1
        return self._reset_all()

    def step(self, action: Tensor) -> EnvStep:
        """Take one decision everywhere: [E, A] in [-1, 1] (clipped to it), or one-hot -> :class:`~worldmpc.types.EnvStep`.

        Both ``terminated`` and ``truncated`` may be True, where an episode terminates at its time limit. The same as
        :meth:`step_async` and :meth:`step_wait` in one.

        Raises:
            EnvError: an environment raised an error, or it or the agent produced a number that is not finite. The
                environments are closed then.
            ValueError: the action has another shape.
            RuntimeError: before the first reset, after an interrupted step, or while a step is under way.
        """
        self.step_async(action)
        return self.step_wait()

    def step_async(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a step with actions [E, A], which may be written to afterwards; :meth:`step_wait` finishes it.

        Where ``active`` [E] is False an environment of ours stays as it is: its step is not ``valid``, with reward 0.

        Worker processes (``env.workers=async``, or a gymnasium AsyncVectorEnv) step from now on, in parallel to whatever the caller
        does. All other environments step within :meth:`step_wait`: a thread would take turns with the caller's Python code anyway,
        and would run environments outside the thread they were made in. What a GPU was given to do in between still runs beside them.

        Raises:
            EnvError: a worker died, or the agent produced a number that is not finite. The environments are closed then.
            ValueError: the action has another shape.
            RuntimeError: before the first reset, after an interrupted step, or while a step is under way.
        """
        self._require_idle("the next one")
        self._require_open()
        if self._obs is None:
            raise RuntimeError(f"{self.spec.name}: reset the environments before using them")
        if self._torn:
            raise RuntimeError(f"{self.spec.name}: the last step was interrupted half-way; reset the environments")
        array = np.array(action.detach().to("cpu", torch.float32).numpy())
        if array.shape != (self.num_envs, self.spec.action_dim):
            raise ValueError(f"action: expected shape ({self.num_envs}, {self.spec.action_dim}), got {tuple(array.shape)}")
        if not _finite(array):
            self._reject(array, "the agent produced a non-finite action for environment {index}")
        self._torn = True
        env = self._env
        self._active = None if active is None or bool(active.all()) else active.numpy().copy()
        if isinstance(env, OwnEnvs):
            self._call("step", lambda: env.step_async(array, None if self._active is None else self._active.tolist()))
        elif isinstance(env, AsyncVectorEnv):
            self._call("step", lambda: env.step_async(self._to_env(array)))
        self._action = array

    def step_wait(self) -> EnvStep:
        """Finish the step under way and return what :meth:`step` does.

        Raises:
            EnvError: an environment raised an error or returned a number that is not finite. The environments are closed then.
            RuntimeError: no step is under way.
        """
        if self._action is None:
            raise RuntimeError(f"{self.spec.name}: no step is under way; step_async begins one")
        action, self._action = self._action, None
        env = self._env
        if isinstance(env, OwnEnvs | AsyncVectorEnv):
            result, reward, terminated, truncated, info = self._call("step", env.step_wait)
        else:
            result, reward, terminated, truncated, info = self._call("step", lambda: env.step(self._to_env(action)))
        next_obs = np.array(result, np.float32)
        reward = np.array(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        still = None if self._active is None else ~self._active
        if still is not None:
            assert self._obs is not None
            next_obs[still], reward[still], terminated[still], truncated[still] = self._obs.numpy()[still], 0.0, False, False
        if not _finite(reward):
            self._reject(reward, "environment {index} returned a non-finite reward")
        next_obs, obs, valid, success, begun = self._finish(next_obs, reward, terminated, truncated, info)
        if still is not None:
            valid, success = valid & ~still, np.where(still, np.float32(np.nan), success)
        for values in (next_obs,) if obs is next_obs else (next_obs, obs):
            if not _finite(values):
                self._reject(values, "environment {index} returned a non-finite observation")
        if self._own:
            self._record(action)
        self._count(begun)
        next_tensor = torch.from_numpy(next_obs)
        self._obs = next_tensor if obs is next_obs else torch.from_numpy(obs)
        self._torn = False
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
            EnvError: the environment cannot render here. The environments are not closed then, unless a worker process died.
            RuntimeError: a step is under way.
        """
        self._require_idle("render")
        self._require_open()
        try:
            frames = self._env.render()
        except EnvError:
            raise
        except (EOFError, ConnectionError) as error:
            raise self._worker_died("render") from error
        except Exception as error:
            text = " ".join(str(error).split())
            raise EnvError(f"{self.spec.name}: render failed: {type(error).__name__}: {text}") from error
        if frames is None or any(frame is None or isinstance(frame, str) for frame in frames):
            hint = "this environment gives no frames; make it with render_mode='rgb_array'"
            raise EnvError(f"{self.spec.name}: {hint if self._may_render else 'no frames; make the environments with render=True'}")
        return tuple(np.asarray(frame) for frame in frames)

    def close(self) -> None:
        """Free the environments and end their worker processes, also in the middle of a step; a second call does nothing."""
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

        seed [], episode [E], steps [E] (all int64), actions [E, longest running episode, A], 0 behind shorter ones, and obs [E, *O]
        (float32); where episodes were begun with options, those of all as JSON, options [bytes] uint8.

        Raises:
            RuntimeError: a step is under way.
        """
        self._require_idle("state_dict")
        longest = int(self._steps.max()) if self._own else 0
        obs = torch.zeros(self.num_envs, *self.spec.obs_shape) if self._obs is None else self._obs.clone()
        actions = self._log[:, :longest].copy()
        actions[np.arange(longest) >= self._steps[:, None]] = 0.0  # of former episodes
        return {
            "seed": torch.tensor(self._seed, dtype=torch.int64),
            "episode": torch.from_numpy(self._episode.copy()),
            "steps": torch.from_numpy(self._steps.copy()),
            "actions": torch.from_numpy(actions),
            "obs": obs,
            **({"options": _as_bytes(self._options)} if any(self._options) else {}),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> bool:
        """Come back to a saved decision by playing the running episodes again from their seeds.

        Returns True where the observations reached equal the saved ones bit by bit. Otherwise (an environment that is not
        deterministic, a foreign vector environment) it warns, begins fresh episodes everywhere, and returns False: ``.obs`` is
        then a first observation, and whoever remembers things about the running episodes must forget them.

        Raises:
            ValueError: the state was saved with other environments (number, observation or action dimensions).
            EnvError: an environment cannot even begin a fresh episode.
            RuntimeError: a step is under way.
        """
        self._require_idle("load_state_dict")
        expected = (self.num_envs, *self.spec.obs_shape), self.spec.action_dim
        found = tuple(state["obs"].shape), state["actions"].shape[-1]
        if expected != found:
            raise ValueError(f"{self.spec.name}: the saved state has observations and action dimensions {found}, expected {expected}")
        self._seed = int(state["seed"])
        self._episode = state["episode"].cpu().numpy().copy()
        self._options = json.loads(bytes(state["options"].tolist())) if "options" in state else [None] * self.num_envs
        self._pending[:] = False
        self._torn = True
        if (self._episode < 0).all():
            self._obs = None
            self._torn = False
            return True
        reason = self._replay(state)
        if reason is None:
            self._obs = state["obs"].to("cpu", torch.float32).clone()
            self._torn = False
            return True
        warnings.warn(f"{self.spec.name}: not resumed exactly, all episodes begin afresh ({reason})", stacklevel=2)
        self._reset_all()
        return False

    def _replay(self, state: Mapping[str, Tensor]) -> str | None:
        """Play the running episodes again; return why that failed, or None."""
        own = self._own
        if own is None:
            return "a vector environment made elsewhere cannot be played again"
        steps = state["steps"].cpu().numpy().copy()
        saved = state["actions"].cpu().numpy()
        seeds = [episode_seed(self._seed, env, int(episode)) for env, episode in enumerate(self._episode)]
        actions = [saved[env, :count] for env, count in enumerate(steps)]
        reached = self._call("replay", lambda: own.replay(seeds, actions, self._options))
        for index, (obs, expected) in enumerate(zip(reached, state["obs"].cpu().numpy(), strict=True)):
            if isinstance(obs, str):
                return f"environment {index}: {obs}"
            if not np.array_equal(obs, expected):
                return f"environment {index} is not deterministic: it reached another observation with the same seed and actions"
        self._reserve(int(steps.max()))
        self._log[:, : saved.shape[1]] = saved
        self._steps = steps
        return None

    def _reset_all(self) -> Tensor:
        """Begin the next episode everywhere."""
        everywhere = np.ones(self.num_envs, bool)
        self._torn = True
        self.begun += 1
        obs = self._begin(everywhere)
        self._count(everywhere)
        self._pending[:] = False
        self._obs = torch.from_numpy(obs)
        self._torn = False
        return self._obs

    def _begin(self, which: np.ndarray) -> np.ndarray:
        """Reset the environments of a mask [E] and return the vector's observations [E, *O], of which only those rows count."""
        episode = (self._episode + 1).tolist()
        env = self._env
        if isinstance(env, OwnEnvs):
            seeds = [episode_seed(self._seed, index, episode[index]) if which[index] else None for index in range(self.num_envs)]
            self._options = [self.options(index) if which[index] else now for index, now in enumerate(self._options)]
            result = self._call("reset", lambda: env.reset(seeds, self._options))
        else:
            # Foreign vector environments need not know lists of seeds; one number is the part of the interface that all have.
            everywhere = bool(which.all())
            seed, options = (episode_seed(self._seed, 0, episode[0]), None) if everywhere else (None, {"reset_mask": which})
            result, _ = self._call("reset", lambda: env.reset(seed=seed, options=options))
        obs = np.array(result, np.float32)
        if not _finite(obs[which]):
            self._reject(obs, "environment {index} returned a non-finite first observation")
        return obs

    def _count(self, begun: np.ndarray) -> None:
        """Take note of the environments [E] that have begun their next episode."""
        self._episode += begun
        self._steps[begun] = 0

    # Each way to finish a step takes what the vector environment returned and gives (next_obs, obs, valid, success, begun); only
    # ``_pending`` changes, so that the state stays that of the last step until all of this one is known to be good.

    def _finish_disabled(
        self, next_obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        done = terminated | truncated
        obs = next_obs
        success = self._success(info)
        if done.any():
            obs = np.where(_like(done, next_obs), self._begin(done), next_obs)
        return next_obs, obs, np.ones(self.num_envs, bool), success, done

    def _finish_same_step(
        self, obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
        return next_obs, obs, np.ones(self.num_envs, bool), success, done

    def _finish_next_step(
        self, next_obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        begun = self._pending
        valid = ~begun
        reward[begun], terminated[begun], truncated[begun] = 0.0, False, False
        self._pending = terminated | truncated
        return next_obs, next_obs, valid, np.where(valid, self._success(info), np.float32(np.nan)), begun

    def _success(self, info: dict[str, Any]) -> np.ndarray:
        """Return [E] float32, NaN where an environment reports no success."""
        success = self._unknown.copy()
        for key in SUCCESS_KEYS:
            if key in info:
                present = np.asarray(info.get(f"_{key}", np.ones(self.num_envs, bool)), bool)
                success[present] = np.asarray(info[key])[present].astype(np.float32)
        return success

    def _record(self, action: np.ndarray) -> None:
        self._reserve(int(self._steps.max()) + 1)
        self._log[self._rows, self._steps] = action
        self._steps += 1 if self._active is None else self._active

    def _reserve(self, length: int) -> None:
        if length > self._log.shape[1]:
            grown = np.zeros((self.num_envs, max(length, 2 * self._log.shape[1]), self.spec.action_dim), np.float32)
            grown[:, : self._log.shape[1]] = self._log
            self._log = grown

    def _call(self, verb: str, function: Callable[[], T]) -> T:
        """Call into the vector environment; whatever it raises becomes one EnvError, after closing."""
        self._require_open()
        try:
            return function()
        except EnvError:
            self.close()
            raise
        except (EOFError, ConnectionError) as error:
            raise self._worker_died(verb) from error
        except Exception as error:
            self.close()
            text = " ".join(str(error).split())
            raise EnvError(f"{self.spec.name}: the vector environment raised {type(error).__name__} in {verb}: {text}") from error

    def _worker_died(self, verb: str) -> EnvError:
        self.close()
        return EnvError(f"{self.spec.name}: a worker process died in {verb} (killed, or crashed in native code)")

    def _require_open(self) -> None:
        if self._closed:
            raise EnvError(f"{self.spec.name}: the environments are closed")

    def _require_idle(self, verb: str) -> None:
        if self._action is not None and not self._closed:
            raise RuntimeError(f"{self.spec.name}: a step is under way; finish it with step_wait before {verb}")

    def _reject(self, values: np.ndarray, message: str) -> None:
        self.close()
        bad = ~np.isfinite(values).reshape(self.num_envs, -1)
        index = int(np.flatnonzero(bad.any(1))[0])
        row = values.reshape(self.num_envs, -1)[index]
        where = f" at entry {int(np.flatnonzero(bad[index])[0])} of {row.size}" if row.size > 1 else ""
        raise EnvError(f"{self.spec.name}: {message.format(index=index)} ({row[bad[index]][0]}{where})")


def _as_bytes(options: list[Options]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(options).encode()), dtype=torch.uint8)


def _scaled(action: np.ndarray, space: Box) -> np.ndarray:
    """[E, A] in [-1, 1] -> [E, A] in the bounds of a space."""
    unit = (np.clip(action, -1.0, 1.0) + 1.0) / 2.0
    return np.clip(space.low + (space.high - space.low) * unit, space.low, space.high).astype(space.low.dtype)


def _choices(action: np.ndarray, start: int) -> np.ndarray:
    """One-hot vectors [E, A] -> the numbers of their choices [E]."""
    return start + action.argmax(1)


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
