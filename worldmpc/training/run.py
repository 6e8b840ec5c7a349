"""A whole run: from a configuration to a folder with metrics, evaluations, checkpoints, a learning curve and a video."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from rich.console import Console

from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, EnvConfig, RunConfig, lookup, resolve_model, seed_decisions
from worldmpc.envs import EnvError, Task, VecEnv, canonical_task, make_envs
from worldmpc.models import native
from worldmpc.noise import derive_seed
from worldmpc.report.curves import plot_curves
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.report.runs import load_run
from worldmpc.report.video import write_video
from worldmpc.runtime import keep_compiled_code, keep_freed_memory, resolve_device, set_threads, suggested_threads
from worldmpc.training.checkpoint import CheckpointStore, check_same_architecture, load_checkpoint
from worldmpc.training.evaluator import evaluate
from worldmpc.training.hooks import CheckpointHook, EvalHook, LogHook
from worldmpc.training.logger import RunLogger, Throughput
from worldmpc.training.trainer import DivergenceError, Solo, TrainState, make_state, train_together
from worldmpc.types import EnvSpec

MAX_EVAL_ENVS = 10
FREE = ("steps", "eval_freq", "device", "threads", "compile", "cuda_graph", "seeds", "log", "checkpoint", "eval")
"""Keys and groups that may change while ``resume=auto`` still takes a run for the same one."""
FIXED = ("task", "agent", "env", "model", "planner.horizon", "planner.mpc", "replay.capacity")
"""Keys and groups that no resumed run may change, because its past would no longer mean the same."""


class RunResult(NamedTuple):
    """Where a run ended."""

    run_dir: Path
    decisions: int
    env_steps: int
    last_return: float
    best_return: float
    finished: bool
    """False where a signal ended it early; ``resume=auto`` goes on."""


def run(config: RunConfig, task: Task | None = None, *, extra_hooks: tuple[Any, ...] = ()) -> RunResult:
    """Train as configured, or go on where an earlier run of this configuration stopped.

    With ``config.seeds`` all seeds are trained together, each in a folder of its own as if trained alone, and the result is the first
    one's; :func:`run_seeds` returns those of all.

    Args:
        config: everything about the run.
        task: an environment, a factory or a vector environment to use instead of ``config.task``.
        extra_hooks: called after the updates of every step, as ``hook(state, metrics)``.

    Raises:
        ConfigError: the configuration cannot be used with this task, device or folder.
        CheckpointError: the checkpoint to resume from cannot be read, or writing one failed.
        DivergenceError: a loss exploded; the state before it is saved.
        EnvError: an environment failed; the state before it is saved.
    """
    return run_seeds(config, task, extra_hooks=extra_hooks)[0]


def run_seeds(config: RunConfig, task: Task | None = None, *, extra_hooks: tuple[Any, ...] = ()) -> list[RunResult]:
    """Do what :func:`run` does and return the results of all seeds."""
    keep_freed_memory()
    set_threads(config.threads or suggested_threads(resolve_model(config.model).mlp_dim))
    device = resolve_device(config.device)
    check_modes(config, device)
    if config.compile:
        keep_compiled_code()
    if task is None:
        config = dataclasses.replace(config, task=canonical_task(config.task))
        task = config.task
    if config.seeds is not None and not isinstance(task, str) and not callable(task):
        raise ConfigError("seeds: every seed needs environments of its own; pass a function that makes the environment")
    with ExitStack() as stack:
        runs = [_Run(stack, own, task, device, extra_hooks, show=index == 0) for index, own in enumerate(_each_seed(config))]
        _bring_together(runs)
        states = [one.state for one in runs]
        team = Solo(states[0].agent) if len(runs) == 1 else Stack([state.agent for state in states])
        stack.enter_context(_stop_on_signals(states, runs[0].logger))
        for one in runs:
            one.begin()
        try:
            train_together(team, states, [one.hooks for one in runs], runs[0].total)
        except (DivergenceError, EnvError) as error:
            saved = [one.save_after(error) for one in runs]
            raise type(error)(f"{error} [{saved[0]}]") from error
        return [one.finish() for one in runs]


def check_modes(config: RunConfig, device: str) -> None:
    """Refuse fast modes that this machine does not have, naming the slower one that works.

    Raises:
        ConfigError: compile without a C++ compiler, CUDA graphs without CUDA, bf16 where PyTorch cannot.
    """
    kind = torch.device(device).type
    if config.cuda_graph and kind != "cuda":
        raise ConfigError(f"cuda_graph: needs device=cuda, this run is on {kind}; leave it out")
    if config.compile and kind == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise ConfigError("compile: needs a C++ compiler (g++), and none was found; leave it out, or install one")
    for key in ("planner.precision", "train.precision"):
        if lookup(config, key) == "bf16" and kind == "mps":
            raise ConfigError(f"{key}: bf16 is not supported on {kind}; use fp32")
        if lookup(config, key) == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(f"{key}: this GPU has no bfloat16 arithmetic; use fp32")


def _each_seed(config: RunConfig) -> list[RunConfig]:
    """Return the configuration of every seed as if it were trained alone."""
    if config.seeds is None:
        return [config]
    base = None if config.run_dir is None else Path(config.run_dir)
    folders = [None if base is None else str(base / f"seed{seed}") for seed in config.seeds]
    return [dataclasses.replace(config, seed=seed, seeds=None, run_dir=folder) for seed, folder in zip(config.seeds, folders, strict=True)]


class _Run:
    """One seed's folder and everything in it: environments, state, logger and hooks."""

    def __init__(self, stack: ExitStack, config: RunConfig, task: Task, device: str, extra_hooks: tuple[Any, ...], *, show: bool) -> None:
        """Prepare the run, from its checkpoint where it goes on; ``show`` False leaves the console to another one."""
        # Environments first: a task that cannot be made leaves no folder, and workers do not inherit the lock.
        envs = stack.enter_context(make_envs(task, config.env, seed=config.seed))
        if not isinstance(task, str):
            config = dataclasses.replace(config, task=envs.spec.name)
        eval_envs = stack.enter_context(_eval_envs(task, config, envs.spec))
        self.folder, self.checkpoint = choose_folder(config)
        stack.enter_context(_lock(self.folder))
        self.config, self.task = config, task
        self.total = math.ceil(config.steps / envs.spec.action_repeat)
        random_decisions = seed_decisions(config, envs.spec.episode_length)
        agent = TDMPC2(config, envs.spec, device, total_updates=max(int(self.total * config.train.utd), 1))
        self.state = make_state(agent, envs, capacity=config.replay.capacity, seed_decisions=random_decisions)
        console = None if show else Console(file=io.StringIO())
        self.logger = stack.enter_context(
            RunLogger(self.folder, config.log, total_env_steps=self.total * envs.spec.action_repeat, console=console)
        )
        self._eval_envs, self._extra_hooks = eval_envs, extra_hooks

    def restore(self) -> None:
        """Load the checkpoint, if there is one, and set up what is done after every step."""
        config, state = self.config, self.state
        tree = _restore(state, self.checkpoint, self.logger, config)
        meta = _write_meta(self.folder, config, state.envs, self.checkpoint)
        earlier = 0.0 if tree is None else float(tree["loop"]["seconds"])
        self.throughput = Throughput(earlier=earlier, decisions=state.decisions, env_steps=state.env_steps, updates=state.updates)
        self.evaluation = EvalHook(
            self.logger,
            self.throughput,
            self._eval_envs,
            config.eval_freq,
            config.eval.episodes,
            config.eval.prior,
            config.train.until_return,
        )
        if tree is not None:
            self.evaluation.load_state_dict(tree["loop"]["evaluation"])
            state.stop = self.evaluation.reached(state)
        store = CheckpointStore(self.folder / "checkpoints", keep=config.checkpoint.keep)
        self.saving = CheckpointHook(store, self.evaluation, self.throughput, config.checkpoint.every, config.checkpoint.replay, meta)
        self.hooks = (LogHook(self.logger, self.throughput, config.log.every), self.evaluation, self.saving, *self._extra_hooks)
        _introduce(self.logger, state, config, self.total, self.folder, self.checkpoint)

    def begin(self) -> None:
        """Evaluate the untrained agent, unless an earlier run has."""
        if self.evaluation.evaluated_at < 0:
            self.evaluation.run(self.state)
            self.saving(self.state, {})

    def save_after(self, error: Exception) -> str:
        """Save what an error has left intact, and say where."""
        if not all(bool(value.isfinite().all()) for value in self.state.agent.model.state_dict().values()):
            return f"parameters are no longer finite; the last checkpoint in {self.folder} is kept"
        self.saving.save(self.state)
        return f"saved at {self.state.env_steps:,} simulator steps in {self.folder}"

    def finish(self) -> RunResult:
        """Evaluate where that is due, save, draw the curve and record the video."""
        state, evaluation = self.state, self.evaluation
        finished = (state.decisions >= self.total or evaluation.reached(state)) and state.settled
        if finished and evaluation.evaluated_at != state.decisions:
            evaluation.run(state)
            finished = state.settled
        self.saving.save(state, best=evaluation.improved)
        result = RunResult(self.folder, state.decisions, state.env_steps, evaluation.last, evaluation.best, finished)
        _finish(result, self.logger, self.config, self.task, state.agent, self.throughput.seconds)
        return result


def _bring_together(runs: Sequence[_Run]) -> None:
    """Let all seeds begin at the same step, and restore them: a kill between two of their checkpoints leaves one behind.

    Raises:
        ConfigError: some have checkpoints and some have none, or none of the same step.
    """
    if len({None if one.checkpoint is None else one.checkpoint.name for one in runs}) > 1:
        names = [{path.name for path in CheckpointStore(one.folder / "checkpoints", keep=1).all()} for one in runs]
        common = sorted(set.intersection(*names))
        if not common:
            seeds = ", ".join(f"{one.config.seed} at {one.checkpoint.name if one.checkpoint else 'the beginning'}" for one in runs)
            raise ConfigError(f"seeds: their runs have no checkpoint of the same step ({seeds}); go on with each seed alone")
        for one in runs:
            one.checkpoint = one.folder / "checkpoints" / common[-1]
    for one in runs:
        one.restore()


def choose_folder(config: RunConfig) -> tuple[Path, Path | None]:
    """Return the folder of the run, created, and the checkpoint to resume from, if any.

    Raises:
        ConfigError: ``run_dir`` holds another run, or ``resume`` names nothing that can be resumed.
    """
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        holds_run = (path / "checkpoints").is_dir()
        if not holds_run and (not (path / "meta.json").is_file() or path.parent.name != "checkpoints"):
            raise ConfigError(f"resume: expected never, auto, a run folder or a checkpoint folder, got '{config.resume}'")
        if config.run_dir is not None and Path(config.run_dir) not in (path, path.parent.parent):
            raise ConfigError(f"run_dir: a resumed run goes on in its own folder; leave run_dir out, or copy {path} there first")
        if holds_run:
            newest = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).newest_valid()
            if newest is None:
                raise ConfigError(f"resume: no usable checkpoint in {path / 'checkpoints'}")
            return path, newest
        return path.parent.parent, path
    base = Path(config.run_dir) if config.run_dir else default_folder(config)
    candidates = [base] if config.run_dir else [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    taken = candidates[: _first_free(candidates)]
    if config.resume == "auto":
        for path in taken if config.run_dir else []:
            different = _differences(path, config)
            if different:
                raise ConfigError(
                    f"resume: {path} holds a run with another {', '.join(different)}; choose another run_dir, or resume={path}"
                )
        same = [path for path in taken if not _differences(path, config)]
        for path in reversed(same):
            newest = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).newest_valid()
            if newest is not None:
                return path, newest
        damaged = next((path for path in same if CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).all()), None)
        if damaged is not None:
            raise ConfigError(f"resume: no intact checkpoint in {damaged / 'checkpoints'}; choose another run_dir to begin anew")
        # Killed before its first checkpoint: begin again in the same place.
        folder = same[-1] if same else candidates[_first_free(candidates)]
    elif taken and config.run_dir:
        raise ConfigError(f"run_dir: {base} already holds a run; go on with resume=auto, or choose another run_dir")
    else:
        folder = candidates[_first_free(candidates)]
    folder.mkdir(parents=True, exist_ok=True)
    return folder, None


def _differences(folder: Path, config: RunConfig) -> list[str]:
    """Return the keys, other than those of :data:`FREE`, in which a folder's run differs from a configuration."""
    file = folder / "config.json"
    if not file.exists():
        return []
    changes = _config_changes(json.loads(file.read_text()), config.to_dict())
    return [name for name, _, _ in changes if name.split(".")[0] not in FREE]


def default_folder(config: RunConfig) -> Path:
    """Return runs/<task>/<agent>-<preset>-seed<seed>."""
    slug = config.task.replace("/", "-").replace(":", "-")
    return Path("runs") / slug / f"{config.agent}-{config.preset}-seed{config.seed}"


def _first_free(candidates: list[Path]) -> int:
    return next((index for index, path in enumerate(candidates) if not _holds_run(path)), len(candidates))


def _holds_run(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "checkpoints").exists()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"run_dir: another process is writing to {folder}; choose another run_dir or wait") from error
        yield


def _eval_envs(task: Task, config: RunConfig, spec: EnvSpec) -> VecEnv:
    if not isinstance(task, str) and not callable(task):
        raise ConfigError("task: training evaluates on environments of its own; pass a function that makes the environment")
    number = config.eval.episodes if spec.episode_length is None else min(config.eval.episodes, MAX_EVAL_ENVS)
    eval_config: EnvConfig = dataclasses.replace(config.env, num_envs=number, workers="sync", num_workers=None)
    return make_envs(task, eval_config, seed=derive_seed(config.seed, "eval") % 2**31)


def _restore(state: TrainState, checkpoint: Path | None, logger: RunLogger, config: RunConfig) -> dict[str, Any] | None:
    """Load the checkpoint, drop what was logged after it, and return its tree."""
    if checkpoint is None:
        logger.truncate(-1)
        return None
    tree, meta = load_checkpoint(checkpoint)
    check_same_architecture(state.agent.model.state_dict(), tree["agent"]["model"])
    for name, before, now in _config_changes(meta["config"], config.to_dict()):
        if name in FIXED or name.split(".")[0] in FIXED:
            raise ConfigError(f"resume: {checkpoint} was made with {name}={before}, which cannot become {now}; begin a new run")
        logger.message(f"resume: {name} was {before!r}, is now {now!r}")
    if meta["spec"] != spec_dict(state.envs.spec):
        raise ConfigError(f"resume: {checkpoint} was made with another environment: {meta['spec']}, now {spec_dict(state.envs.spec)}")
    if "replay" not in tree:
        logger.message(
            f"resume: the checkpoint has no replay (checkpoint.replay=false): acting for {state.source.seed_decisions:,} decisions "
            f"before the next update"
        )
    try:
        state.load_state_dict(tree)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"resume: {checkpoint} does not fit this configuration: {reason[:400]}") from error
    # Where the hooks of the saved step are still to be done, what they wrote about it is theirs to write again.
    logger.truncate(state.decisions if state.settled else state.decisions - 1)
    return tree


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, before, now) of everything that differs, apart from where a run is and how it was begun."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _config_changes(before, value, f"{prefix}{name}.")
        elif before != value and f"{prefix}{name}" not in ("resume", "run_dir"):
            yield f"{prefix}{name}", before, value


def spec_dict(spec: EnvSpec) -> dict[str, Any]:
    """Return a spec as plain data, for ``meta.json``."""
    return {
        "name": spec.name,
        "obs_shape": list(spec.obs_shape),
        "action_dim": spec.action_dim,
        "episode_length": spec.episode_length,
        "action_repeat": spec.action_repeat,
        "can_terminate": spec.can_terminate,
    }


def _write_meta(folder: Path, config: RunConfig, envs: VecEnv, checkpoint: Path | None) -> dict[str, Any]:
    meta = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "spec": spec_dict(envs.spec),
    }
    if checkpoint is not None and (folder / "meta.json").exists():
        first = json.loads((folder / "meta.json").read_text())
        meta = first | {"resumed": [*first.get("resumed", []), {name: meta[name] for name in ("command", "commit", "machine", "started")}]}
    _write_json(folder / "meta.json", meta)
    _write_json(folder / "config.json", config.to_dict())
    return {"config": config.to_dict(), "spec": meta["spec"]}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(partial, path)


def _introduce(logger: RunLogger, state: TrainState, config: RunConfig, total: int, folder: Path, checkpoint: Path | None) -> None:
    agent = state.agent
    logger.table([{"network": name, "parameters": count} for name, count in agent.model.parameter_table()], title="world model")
    logger.message(
        f"{agent.spec.name}: {agent.config.agent}, preset {config.preset}, seed {config.seed}, discount {agent.discount:.4g}, "
        f"{state.source.seed_decisions:,} random decisions first, {config.train.utd:g} updates per decision, "
        f"{state.envs.num_envs} environments, device {agent.device}"
    )
    if total <= state.source.seed_decisions:
        logger.message(f"warning: nothing will be learned, as the run ends within its {state.source.seed_decisions:,} random decisions")
    library = native.library() if agent.device.type == "cpu" else None
    if isinstance(library, str):
        logger.message(f"warning: the faster networks in C are not used ({library}); PyTorch's functions take their place")
    logger.message(state.source.replay.describe())
    if checkpoint is not None:
        logger.message(f"resumed from {checkpoint} at {state.env_steps:,} simulator steps")
    logger.message(f"writing to {folder}")


@contextmanager
def _stop_on_signals(states: Sequence[TrainState], logger: RunLogger) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the loop at the next clean point; a second one ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        for state in states:
            state.stop = True
        signal.signal(number, before[number])
        logger.message(f"{signal.Signals(number).name}: saving and stopping; once more to stop at once")

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever owns it decides about signals
        before.clear()
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _finish(result: RunResult, logger: RunLogger, config: RunConfig, task: Task, agent: TDMPC2, seconds: float) -> None:
    """Draw the curve, record the video, and say what was reached and where to look."""
    trained = load_run(result.run_dir)
    if trained.evals:  # none where a signal came during the first one
        plot_curves([trained], result.run_dir / "curve.png")
    if not result.finished:
        logger.close()
        logger.message(f"stopped at {result.env_steps:,} simulator steps, saved in {result.run_dir}; go on with resume=auto")
        return
    video = ""
    if config.eval.video:
        video = _attempt_video(result.run_dir / "final.mp4", task, config, agent, logger)
    logger.close()  # the last progress line comes before the last word
    reached = f"return {result.last_return:.1f} (best {result.best_return:.1f}) after {result.env_steps:,} simulator steps"
    where = f"look at {result.run_dir}/curve.png{video}"
    logger.message(f"done: {agent.spec.name} {reached} in {seconds / 60:.1f} minutes of training; {where}")


def _attempt_video(path: Path, task: Task, config: RunConfig, agent: TDMPC2, logger: RunLogger) -> str:
    try:
        record_video(path, task, config, agent)
    except Exception as error:  # whatever a user's renderer does, the run itself is complete
        kind = "" if isinstance(error, EnvError) else f"{type(error).__name__}: "
        logger.message(f"no video: {kind}{' '.join(str(error).split())}")
        return ""
    return f", {path}"


def record_video(path: Path, task: Task, config: RunConfig, agent: TDMPC2, *, index: int = 0) -> float:
    """Record one evaluation episode as an mp4 and return its return.

    Raises:
        EnvError: the environment cannot render.
    """
    with make_envs(
        task, dataclasses.replace(config.env, num_envs=1, workers="sync", num_workers=None), seed=config.seed, render=True
    ) as envs:
        result = evaluate(agent, envs, 1, index=index, record=True)
        write_video(path, result.frames, fps=25)
    return result.mean_return
