"""Many environments stepped together, in this process or in a few worker processes, with the same code in both.

Every environment has one row of :func:`row_type` for its action and for what followed it. :class:`LocalEnvs` steps environments one
after the other, each into its row. :class:`WorkerEnvs` has the rows in memory shared with workers, each of which is a
:class:`LocalEnvs` over a contiguous part of them; only small messages pass through its pipes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector.utils import CloudpickleWrapper

from worldmpc.config import ConfigError
from worldmpc.envs.wrappers import EnvError, GuardedEnv
from worldmpc.types import EnvSpec

EnvFunction = Callable[[], GuardedEnv]
VectorStep = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]
"""Observations [E, *O] float32, rewards [E] float64, terminated [E], truncated [E], and as info ``success`` [E] float32, NaN where
an environment reports none. All are views of the rows, which the next step or reset overwrites."""
Options = dict[str, Any] | None
"""What an episode is begun with besides its seed, as gymnasium's ``reset`` takes it."""

OWNER_INTERVAL = 1.0
"""Seconds between two looks of a worker at whether its owner lives."""
CLOSE_TIMEOUT = 5.0
"""Seconds that workers have to end in order, all together, before they are killed."""


def row_type(spec: EnvSpec) -> np.dtype[Any]:
    """Return the type of one environment's row: action [A], and the observation [*O], reward, flags and success that followed it."""
    fields = [
        ("reward", np.float64),
        ("action", np.float32, (spec.action_dim,)),
        ("obs", np.float32, spec.obs_shape),
        ("success", np.float32),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
    ]
    return np.dtype(fields, align=True)


class LocalEnvs:
    """Environments of this process, stepped one after the other."""

    def __init__(self, functions: Sequence[EnvFunction], rows: np.ndarray | None = None, spec: EnvSpec | None = None) -> None:
        """Make the environments; ``rows`` [E] of :func:`row_type` is where they are stepped, memory of their own where None.

        ``spec`` is what they have to agree with: that of the first one where None.

        Raises:
            ConfigError: they differ in observations or actions, or one cannot be used.
            EnvError: one could not be made.
        """
        self.envs: list[GuardedEnv] = []
        try:
            for function in functions:
                self.envs.append(function())
            self.spec = spec or self.envs[0].env_spec
            self._rows = np.zeros(len(self.envs), row_type(self.spec)) if rows is None else rows
            for env in self.envs:
                _check_same(env, self.spec)
        except BaseException:
            self.close()
            raise
        self.num_envs = len(self.envs)
        self._action, self._result = self._rows["action"], _views(self._rows)
        self._active: Sequence[bool] | None = None

    def reset(self, seeds: Sequence[int | None], options: Sequence[Options]) -> np.ndarray:
        """Begin an episode with its seed and options in every environment that has a seed, and return all observations, [E, *O].

        Raises:
            EnvError: an environment raised an error.
        """
        obs = self._result[0]
        for index, (env, seed, own) in enumerate(zip(self.envs, seeds, options, strict=True)):
            if seed is not None:
                obs[index] = env.reset(seed=seed, options=own)[0]
        return obs

    def step_async(self, action: np.ndarray, active: Sequence[bool] | None = None) -> None:
        """Take actions [E, A] for the step that :meth:`step_wait` does, in all environments or in the ``active`` ones [E]."""
        self._action[:] = action
        self._active = active

    def step_wait(self, active: Sequence[bool] | None = None) -> VectorStep:
        """Step every environment, or the active ones; of the others the rows hold what they did.

        Raises:
            EnvError: an environment raised an error.
        """
        obs, reward, terminated, truncated, info = self._result
        success, active = info["success"], self._active if active is None else active
        for index, (env, action) in enumerate(zip(self.envs, self._action, strict=True)):
            if active is not None and not active[index]:
                continue
            obs[index], reward[index], terminated[index], truncated[index], own = env.step(action)
            success[index] = own.get("success", np.nan)
        return self._result

    def replay(self, seeds: Sequence[int], actions: Sequence[np.ndarray], options: Sequence[Options]) -> list[np.ndarray | str]:
        """Play episodes again: seeds [E], E arrays [steps, A], options [E] -> per environment what :meth:`GuardedEnv.replay` returns."""
        return [env.replay(seed, taken, own) for env, seed, taken, own in zip(self.envs, seeds, actions, options, strict=True)]

    def render(self) -> list[Any]:
        """Return one frame per environment, [height, width, 3] uint8, or None where it gives none.

        Raises:
            EnvError: an environment cannot render here.
        """
        return [env.render() for env in self.envs]

    def close(self) -> None:
        """Free the environments."""
        for env in self.envs:
            env.close()


class WorkerEnvs:
    """Environments in worker processes, each of which steps a contiguous part of them.

    The workers are started as this platform starts processes by default (on Linux before Python 3.14 by fork); functions need not
    be importable, as they travel by cloudpickle where they travel at all. A worker uses one torch thread and ignores Ctrl-C: the
    process that owns this object decides when its workers end, and they end when it does. The shared memory has no name, so that
    nothing of it outlives the processes, however they end.
    """

    def __init__(self, functions: Sequence[EnvFunction], spec: EnvSpec, num_workers: int) -> None:
        """Start ``num_workers`` processes, at most one per function, and make the environments in them.

        Raises:
            ConfigError: environments differ from ``spec`` in observations or actions, or one cannot be used.
            EnvError: an environment could not be made.
            EOFError: a worker died.
        """
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._owner = os.getpid()
        self.spec = spec
        self.num_envs = len(functions)
        bounds = [self.num_envs * number // num_workers for number in range(num_workers + 1)]
        self._parts = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        context = multiprocessing.get_context()
        memory = context.RawArray("b", self.num_envs * row_type(spec).itemsize)
        rows = np.frombuffer(memory, row_type(spec))
        self._action, self._result = rows["action"], _views(rows)
        self._number = 0
        try:
            for part in self._parts:
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                made_by = [CloudpickleWrapper(function) for function in functions[part]]
                arguments = (made_by, memory, spec, part, theirs, tuple(self._pipes))
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                self.processes.append(process)
                theirs.close()
            self._asked = list(self._pipes)
            self._answers()
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Sequence[int | None], options: Sequence[Options]) -> np.ndarray:
        """As :meth:`LocalEnvs.reset`; EOFError or ConnectionError where a worker died."""
        parts = [(seeds[part], options[part]) for part in self._parts]
        self._ask("reset", [part if any(seed is not None for seed in part[0]) else None for part in parts])
        self._answers()
        return self._result[0]

    def step_async(self, action: np.ndarray, active: Sequence[bool] | None = None) -> None:
        """Begin a step of every environment, or of the ``active`` ones [E], with actions [E, A], and return at once.

        Raises:
            ConnectionError: a worker died.
        """
        self._action[:] = action
        self._ask("step_wait", [() if active is None else (active[part],) for part in self._parts])

    def step_wait(self) -> VectorStep:
        """As :meth:`LocalEnvs.step_wait`; EOFError or ConnectionError where a worker died."""
        self._answers()
        return self._result

    def replay(self, seeds: Sequence[int], actions: Sequence[np.ndarray], options: Sequence[Options]) -> list[np.ndarray | str]:
        """As :meth:`LocalEnvs.replay`; EOFError or ConnectionError where a worker died."""
        self._ask("replay", [(seeds[part], actions[part], options[part]) for part in self._parts])
        return [obs for answer in self._answers() for obs in answer]

    def render(self) -> list[Any]:
        """As :meth:`LocalEnvs.render`; EOFError or ConnectionError where a worker died."""
        self._ask("render", [()] * len(self._parts))
        return [frame for answer in self._answers() for frame in answer]

    def close(self) -> None:
        """End the workers: in order those that answer, by force those that hang or still step after ``CLOSE_TIMEOUT``."""
        for pipe in self._pipes:
            with suppress(OSError):  # the worker is dead already, or this is the second call
                pipe.send((0, "close", ()))
            pipe.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()

    def __del__(self) -> None:
        """Close what nobody closed, except in a forked copy of the owner."""
        if os.getpid() == self._owner:
            self.close()

    def _ask(self, verb: str, arguments: Sequence[tuple[Any, ...] | None]) -> None:
        """Have every worker call a method with its arguments; those with None are left out."""
        self._number += 1
        self._asked: list[Connection] = []
        for pipe, own in zip(self._pipes, arguments, strict=True):
            if own is not None:
                pipe.send((self._number, verb, own))
                self._asked.append(pipe)

    def _answers(self) -> list[Any]:
        """Wait for all workers that were asked; the first one's failure is raised once all have answered."""
        answers = [self._answer(pipe) for pipe in self._asked]
        for answer in answers:
            if isinstance(answer, _Failure):
                raise answer.kind(answer.message)
        return answers

    def _answer(self, pipe: Connection) -> Any:
        while True:
            number, answer = pipe.recv()
            if number == self._number:  # a smaller one answers a question whose asker was interrupted
                return answer


class _Failure(NamedTuple):
    """A worker's answer where an error was raised."""

    kind: type[Exception]
    message: str


def _views(rows: np.ndarray) -> VectorStep:
    return rows["obs"], rows["reward"], rows["terminated"], rows["truncated"], {"success": rows["success"]}


def _check_same(env: GuardedEnv, expected: EnvSpec) -> None:
    if _spaces(env.env_spec) != _spaces(expected):
        raise ConfigError(
            f"{env.env_spec.name}: environment {env.index} has {_spaces(env.env_spec)}, "
            f"environment 0 has {_spaces(expected)}; environments stepped together must agree"
        )


def _spaces(spec: EnvSpec) -> str:
    return f"observations {spec.obs_shape} and {f'{spec.action_dim} choices' if spec.discrete else f'actions {(spec.action_dim,)}'}"


def _work(functions: Any, memory: Any, spec: EnvSpec, part: slice, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """Be a worker: make the environments of a part, then answer (number, method, arguments) with (number, result) until told to close."""
    # Ctrl-C reaches the whole process group; the owner decides when workers end. A handler of the owner's is none of a fork's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for other in inherited:  # the owner's ends, so that its death is the end of file for all workers
        other.close()
    try:
        envs = LocalEnvs(functions, np.frombuffer(memory, row_type(spec))[part], spec)
    except Exception as error:
        pipe.send((0, _failure(error)))
        return
    with suppress(EOFError, ConnectionError):  # the owner is gone
        pipe.send((0, None))
        while True:
            number, verb, arguments = pipe.recv()
            if verb == "close":
                break
            try:
                result = getattr(envs, verb)(*arguments)
                pipe.send((number, result if verb in ("replay", "render") else None))  # the rest is read from the rows
            except ConnectionError:
                raise
            except Exception as error:
                pipe.send((number, _failure(error)))
    envs.close()


def _end_with(owner: int) -> None:
    """End this process soon after its owner, also while an environment hangs and nobody reads the pipe."""
    while os.getppid() == owner:
        time.sleep(OWNER_INTERVAL)
    os._exit(1)


def _failure(error: Exception) -> _Failure:
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError | EnvError):
        return _Failure(ConfigError if isinstance(error, ConfigError) else EnvError, text)
    return _Failure(EnvError, f"{type(error).__name__}: {text}")
