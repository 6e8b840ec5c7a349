"""The full state of a MuJoCo simulator as part of the observation, and the way back into the simulator."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from worldmpc.config import ConfigError
from worldmpc.envs.dmc import DMControlEnv
from worldmpc.envs.wrappers import Env, StepResult

RESETS = 8
"""Episodes begun to see which entries of its model an environment draws anew in each."""

MOST_DRAWN = 256
"""More of them than this are too many to append to an observation."""

Entries = list[tuple[np.ndarray, np.ndarray]]
"""Flat arrays of the simulator, each with the indices of those entries that belong to the state."""


class SimulatorState(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Appends to observations [O] all that the simulator's next step depends on: [O + S].

    The ``S`` = ``state_dim`` numbers are, in this order:

    * MuJoCo's physics state (time, positions, velocities, actuators, plugins), its solver's warm start, active equality
      constraints, mocap bodies and user data. Without the warm start a step differs where the solver stops early.
    * the entries of ``MjModel`` that ``reset`` draws anew, such as the target of dmc/reacher-easy. They are found by beginning
      ``RESETS`` episodes here.
    * of Gymnasium's environments the positions of all bodies and of their centres of mass. MuJoCo integrates last, so those are
      older than the state, by up to one simulator step, and Ant and Humanoid take their velocity from them.

    In float64 a step from a restored state equals the true one bit for bit. float32 keeps 7 digits: then it equals it to about 1e-6
    of each number, and less well only where contacts amplify the rounding. What an environment keeps in Python between two steps
    is not part of the state, nor are external forces that it sets once and leaves in place.
    """

    def __init__(self, env: Env, dtype: Any = np.float32) -> None:
        """Wrap an environment with a Box observation space of one axis; ``dtype`` is that of its observations from now on.

        Raises:
            ConfigError: not a MuJoCo environment, one that draws too much of its model anew in each episode, or other observations.
        """
        super().__init__(env)
        space, self._dtype = env.observation_space, dtype
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ConfigError("env.simulator_state: observations must be a Box with one axis; wrap the environment, or leave it out")
        self._model, self._data = _simulator(env)
        mujoco: Any = importlib.import_module("mujoco")
        state = mujoco.mjtState
        self._parts = int(state.mjSTATE_FULLPHYSICS | state.mjSTATE_WARMSTART | state.mjSTATE_EQ_ACTIVE | state.mjSTATE_USERDATA)
        self._parts |= int(state.mjSTATE_MOCAP_POS | state.mjSTATE_MOCAP_QUAT)
        self._get, self._set, self._update = mujoco.mj_getState, mujoco.mj_setState, mujoco.mj_step1
        self._physics = np.empty(mujoco.mj_stateSize(self._model, self._parts))
        self._drawn = _drawn_entries(env, self._model)
        if _simulator(env)[1] is not self._data:
            raise ConfigError(
                f"env.simulator_state: {type(env.unwrapped).__name__} makes a new simulator for each episode, which cannot be followed"
            )
        self._control = env.unwrapped._env if isinstance(env.unwrapped, DMControlEnv) else None
        self._older: Entries = []
        if self._control is None:
            positions = np.arange(3, self._data.xpos.size)  # the first body is the world, which stays where it is
            self._older = [(array.reshape(-1), positions) for array in (self._data.xpos, self._data.xipos)]
        self.state_dim = self._physics.size + sum(index.size for _, index in self._drawn + self._older)
        free = np.full(self.state_dim, np.inf)
        with np.errstate(over="ignore"):  # a bound too large for float32 is no bound
            low, high = np.append(space.low, -free).astype(dtype), np.append(space.high, free).astype(dtype)
        self.observation_space = Box(low, high, dtype=dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [O + S]."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._append(obs), info

    def step(self, action: Any) -> StepResult:
        """Take one simulator step: observation [O + S], reward, terminated, truncated, info."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._append(obs), reward, terminated, truncated, info

    def set_state(self, state: np.ndarray) -> None:
        """Put the simulator into a state [S], in an episode without past; the environment must have been reset once."""
        drawn, older = np.split(state[self._physics.size :], [sum(index.size for _, index in self._drawn)])
        _write(self._drawn, drawn)
        self._physics[:] = state[: self._physics.size]
        self._set(self._model, self._data, self._physics, self._parts)
        self._update(self._model, self._data)  # all that follows from positions and velocities
        _write(self._older, older)
        if self._control is not None:
            self._control._step_count, self._control._reset_next_step = 0, False

    def _append(self, obs: np.ndarray) -> np.ndarray:
        self._get(self._model, self._data, self._physics, self._parts)
        parts = [obs, self._physics, *(array[index] for array, index in self._drawn + self._older)]
        return np.concatenate(parts).astype(self._dtype)


def _simulator(env: Env) -> tuple[Any, Any]:
    """Return the ``MjModel`` and ``MjData`` of an environment of dm_control, of Gymnasium, or with such attributes."""
    base: Any = env.unwrapped
    if isinstance(base, DMControlEnv):
        physics = base._env.physics
        return physics.model.ptr, physics.data.ptr
    model, data = getattr(base, "model", None), getattr(base, "data", None)
    if (type(model).__name__, type(data).__name__) != ("MjModel", "MjData"):
        raise ConfigError(
            f"env.simulator_state: {type(base).__name__} is not a MuJoCo environment (no MjModel as .model and MjData as .data); "
            "only those of dm_control and Gymnasium's MuJoCo suite have a state that can be set"
        )
    return model, data


def _drawn_entries(env: Env, model: Any) -> Entries:
    """Return the entries of a model that differ between episodes."""
    fields = {name: getattr(model, name) for name in dir(model)}
    arrays = {name: array.reshape(-1) for name, array in fields.items() if isinstance(array, np.ndarray) and array.dtype.kind == "f"}
    env.reset(seed=0)
    first = {name: array.copy() for name, array in arrays.items()}
    differs = {name: np.zeros(array.size, bool) for name, array in arrays.items()}
    for seed in range(1, RESETS):
        env.reset(seed=seed)
        for name, array in arrays.items():
            differs[name] |= array != first[name]
    drawn = {name: np.flatnonzero(entries) for name, entries in differs.items() if entries.any()}
    if (number := sum(index.size for index in drawn.values())) > MOST_DRAWN:
        raise ConfigError(
            f"env.simulator_state: {type(env.unwrapped).__name__} draws {number} numbers of its model anew in each episode "
            f"({', '.join(drawn)}), more than the {MOST_DRAWN} that observations take; use learned dynamics for this task"
        )
    return [(arrays[name], index) for name, index in drawn.items()]


def _write(entries: Entries, values: np.ndarray) -> None:
    start = 0
    for array, index in entries:
        array[index] = values[start : start + index.size]
        start += index.size
