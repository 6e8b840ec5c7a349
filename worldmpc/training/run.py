"""A whole run: from a configuration to a folder with metrics, evaluations, checkpoints, a learning curve and a video."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from worldmpc.agents import make_agent
from worldmpc.agents.director import Director
from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, RunConfig, auxiliary_warning, lookup, network_width
from worldmpc.envs import EnvError, Task, VecEnv, canonical_task, make_envs
from worldmpc.functional import parameter_table
from worldmpc.models import native
from worldmpc.noise import derive_seed
from worldmpc.opponents.games import play_games
from worldmpc.opponents.match import Match
from worldmpc.opponents.players import AgentPlayer
from worldmpc.report.curves import plot_curves
from worldmpc.report.goals import GOALS, plot_goals, write_goals
from worldmpc.report.overrides import overrides_of
from worldmpc.report.runs import load_run
from worldmpc.report.video import write_video
from worldmpc.runtime import check_modes, keep_compiled_code, keep_freed_memory, resolve_device, set_threads, suggested_threads
from worldmpc.training.checkpoint import CheckpointError, CheckpointStore, verify_checkpoint
from worldmpc.training.evaluator import evaluate, evaluation_envs
from worldmpc.training.folder import choose_folder, lock, restore, write_meta
from worldmpc.training.goal_diary import GoalDiary
from worldmpc.training.hooks import CheckpointHook, EvalHook, GamesHook, LogHook, SnapshotHook
from worldmpc.training.logger import RunLogger, Throughput
from worldmpc.training.trainer import DivergenceError, Solo, TrainState, make_state, train_together
from worldmpc.training.two_player import Fixtures, evaluation_opponents, seat_opponents
from worldmpc.types import Agent, Mode


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
    set_threads(config.threads or suggested_threads(network_width(config)))
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
        alone = config.seeds is None
        runs = [_Run(stack, own, task, device, extra_hooks, show=not index, alone=alone) for index, own in enumerate(_each_seed(config))]
        _choose_common_checkpoint(runs)
        for one in runs:
            one.restore()
        states = [one.state for one in runs]
        stack.enter_context(_stop_on_signals(states, runs[0].logger))
        try:
            for one in runs:
                one.begin()
            _catch_up(runs)
            if not any(state.stop for state in states):
                team = Solo(states[0].agent) if len(runs) == 1 else Stack([_stackable(state.agent) for state in states])
                train_together(team, states, [one.hooks for one in runs], runs[0].total)
            results = [one.finish() for one in runs]
            for one, result in list(zip(runs, results, strict=True))[1:]:
                reached = f"return {result.last_return:.1f} (best {result.best_return:.1f})"
                runs[0].logger.message(f"seed {one.config.seed}: {reached} after {result.env_steps:,} simulator steps; {result.run_dir}")
            return results
        except (DivergenceError, EnvError) as error:
            saved = [one.save_after() for one in runs]
            raise type(error)(f"{error} [{saved[0]}]") from error


def _has_auxiliary(agent: Agent) -> bool:
    objectives = getattr(agent, "objectives", None)
    return objectives is not None and objectives.model.auxiliary is not None


def _stackable(agent: Agent) -> TDMPC2:
    assert isinstance(agent, TDMPC2)  # the configuration allows seeds for no other
    return agent


def _each_seed(config: RunConfig) -> list[RunConfig]:
    """Return the configuration of every seed as if it were trained alone."""
    if config.seeds is None:
        return [config]
    base = None if config.run_dir is None else Path(config.run_dir)
    folders = [None if base is None else str(base / f"seed{seed}") for seed in config.seeds]
    return [dataclasses.replace(config, seed=seed, seeds=None, run_dir=folder) for seed, folder in zip(config.seeds, folders, strict=True)]


class _Run:
    """One seed's folder and everything in it: environments, state, logger and hooks."""

    def __init__(
        self, stack: ExitStack, config: RunConfig, task: Task, device: str, extra_hooks: tuple[Any, ...], *, show: bool, alone: bool
    ) -> None:
        """Prepare the run, from its checkpoint where it goes on; where it is not ``alone``, ``show`` says whose the console is."""
        # Environments and agent first: what cannot be made leaves no folder, and workers do not inherit the lock.
        envs = stack.enter_context(seat_opponents(make_envs(task, config.env, seed=config.seed), config))
        if isinstance(envs, Match) and not alone:
            raise ConfigError("seeds: games are trained one run per seed, with -m seed=1,2,3; leave seeds out")
        if not isinstance(task, str):
            config = dataclasses.replace(config, task=envs.spec.name)
        eval_envs = _evaluated_in(stack.enter_context(_eval_envs(task, config)), config)
        self.state = make_state(make_agent(config, envs.spec, device), envs)
        self.folder, self.checkpoint = choose_folder(config)
        stack.enter_context(lock(self.folder))
        self.config, self.task = config, task
        self.total = math.ceil(config.steps / envs.spec.action_repeat)
        console = None if show else Console(file=io.StringIO())
        self.logger = stack.enter_context(
            RunLogger(self.folder, config.log, total_env_steps=self.total * envs.spec.action_repeat, console=console)
        )
        self._eval_envs, self._extra_hooks = eval_envs, extra_hooks

    def restore(self) -> None:
        """Load the checkpoint, if there is one, and set up what is done after every step."""
        config, state = self.config, self.state
        tree = restore(state, self.checkpoint, self.logger, config)
        meta = write_meta(self.folder, config, state.envs, self.checkpoint, dict(parameter_table(state.agent.model)))
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
        if store.forget_best(state.env_steps):
            self.logger.message("resume: the best checkpoint was of a later step than this run goes on from, and is forgotten")
        self.saving = CheckpointHook(store, self.evaluation, self.throughput, config.checkpoint.every, config.checkpoint.replay, meta)
        agent: Any = state.agent
        self.snapshots = [SnapshotHook(self.logger, config.eval_freq, agent.objectives.snapshot)] if _has_auxiliary(agent) else []
        logging = LogHook(self.logger, self.throughput, config.log.every)
        games = [GamesHook(self.logger)] if isinstance(state.envs, Match) else []
        self.hooks = (logging, *games, *self.snapshots, self.evaluation, self.saving, *self._extra_hooks)
        _introduce(self.logger, state, config, self.total, self.folder, self.checkpoint)

    def begin(self) -> None:
        """Evaluate the untrained agent, unless an earlier run has."""
        if self.evaluation.evaluated_at < 0:
            self.state.settled = True  # False where an earlier run was stopped in here: there is no step whose hooks are to be done
            self.evaluation.run(self.state)
            self.saving(self.state, {})

    def save_after(self) -> str:
        """Save what an error has left intact, and say where."""
        if not all(bool(value.isfinite().all()) for value in self.state.agent.model.state_dict().values()):
            return f"parameters are no longer finite; the last checkpoint in {self.folder} is kept"
        try:
            self.saving.save(self.state)
        except Exception as error:  # another seed's state, and the error that led here, must not be lost to this one
            return f"not saved ({' '.join(str(error).split())}); the last checkpoint in {self.folder} is kept"
        return f"saved at {self.state.env_steps:,} simulator steps in {self.folder}"

    def finish(self) -> RunResult:
        """Evaluate where that is due, save, draw the curve and record the video."""
        state, evaluation = self.state, self.evaluation
        finished = (state.decisions >= self.total or evaluation.reached(state)) and state.settled
        if finished and evaluation.evaluated_at != state.decisions:
            for snapshot in self.snapshots:
                snapshot.log(state)
            evaluation.run(state)
            finished = state.settled
        self.saving.save(state, best=evaluation.improved)
        result = RunResult(self.folder, state.decisions, state.env_steps, evaluation.last, evaluation.best, finished)
        _finish(result, self.logger, self.config, self.task, state.agent, self.throughput.seconds)
        return result


def _choose_common_checkpoint(runs: Sequence[_Run]) -> None:
    """Let all seeds go on from the same step where they can: a kill between two of their checkpoints leaves one behind."""
    if len({None if one.checkpoint is None else one.checkpoint.name for one in runs}) == 1:
        return
    folders = [one.folder / "checkpoints" for one in runs]
    names = [{path.name for path in CheckpointStore(folder, keep=1).all()} for folder in folders]
    for name in sorted(set.intersection(*names), reverse=True):
        try:
            for folder in folders:
                verify_checkpoint(folder / name)
        except CheckpointError as error:
            runs[0].logger.message(f"warning: {error}; trying the one before")
            continue
        for one, folder in zip(runs, folders, strict=True):
            one.checkpoint = folder / name
        return


def _catch_up(runs: Sequence[_Run]) -> None:
    """Train seeds alone that are behind the others, as one that was added or lost its checkpoints, until all are at the same step."""
    ahead = max(one.state.decisions for one in runs)
    if len(runs) == 1:
        return  # the loop itself does what is left of an interrupted step
    for one in runs:
        if one.state.decisions == ahead and one.state.settled:
            continue
        runs[0].logger.message(f"seed {one.config.seed} catches up alone from {one.state.env_steps:,} simulator steps")
        try:
            train_together(Solo(one.state.agent), [one.state], [one.hooks], ahead)
        except (DivergenceError, EnvError) as error:
            raise type(error)(f"seed {one.config.seed}: {error}") from error


def _eval_envs(task: Task, config: RunConfig) -> AbstractContextManager[VecEnv]:
    if not isinstance(task, str) and not callable(task):
        raise ConfigError("task: training evaluates on environments of its own; pass a function that makes the environment")
    return evaluation_envs(task, config.env, config.eval.episodes, seed=derive_seed(config.seed, "eval") % 2**31)


def _evaluated_in(envs: VecEnv, config: RunConfig) -> VecEnv | Fixtures:
    return envs if envs.spec.seats is None else Fixtures(envs, evaluation_opponents(config, envs.spec))


def _introduce(logger: RunLogger, state: TrainState, config: RunConfig, total: int, folder: Path, checkpoint: Path | None) -> None:
    agent = state.agent
    logger.table([{"network": name, "parameters": count} for name, count in parameter_table(agent.model)], title="networks")
    name = f"{config.label}, {config.agent}" if config.label not in (None, config.agent) else config.agent
    logger.message(
        f"{agent.spec.name}: {name}, preset {config.preset}, seed {config.seed}, discount {agent.discount:.4g}, "
        f"{state.envs.num_envs} environments, device {agent.device}"
    )
    if changed := overrides_of(config.to_dict()):
        logger.message(f"unlike the preset: {', '.join(f'{key}={json.dumps(value)}' for key, value in changed.items())}")
    if total <= state.source.seed_decisions:
        logger.message(f"warning: nothing will be learned, as the run ends within its {state.source.seed_decisions:,} random decisions")
    library = native.library() if agent.device.type == "cpu" else None
    if isinstance(library, str):
        logger.message(f"warning: the faster networks in C are not used ({library}); PyTorch's functions take their place")
    if (warning := auxiliary_warning(config.multi_gamma)) is not None:
        logger.message(f"warning: {warning}")
    for key in ("planner.precision", "train.precision"):
        if lookup(config, key) == "bf16" and library is not None and (isinstance(library, str) or not library.bf16):
            logger.message(f"warning: {key}=bf16 is slower than fp32 here, as this processor cannot multiply bfloat16 numbers")
    cores = os.cpu_count() or 1
    if config.threads > cores:
        logger.message(f"warning: threads={config.threads} on {cores} cores: they will wait for each other; threads=0 chooses")
    logger.message(state.source.describe())
    if checkpoint is not None:
        logger.message(f"resumed from {checkpoint} at {state.env_steps:,} simulator steps")
    logger.message(f"writing to {folder}")


@contextmanager
def _stop_on_signals(states: Sequence[TrainState], logger: RunLogger) -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C end the loop at the next clean point; a second one ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        for state in states:
            state.stop = True
        signal.signal(number, before[number])
        logger.message(f"{signal.Signals(number).name}: saving and stopping; once more to stop at once")

    before: dict[int, Any] = {}
    try:
        for number in _signals():
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever owns it decides about signals
        before.clear()
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _signals() -> tuple[int, ...]:
    """Signals that end a run; that of a terminal that is closed not where it is to be ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    ours = (signal.SIGTERM, signal.SIGINT)
    return ours if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN else (*ours, hangup)


def _finish(result: RunResult, logger: RunLogger, config: RunConfig, task: Task, agent: Agent, seconds: float) -> None:
    """Draw the curve, record the video, and say what was reached and where to look."""
    trained = load_run(result.run_dir)
    if trained.evals:  # none where a signal came during the first one
        plot_curves([trained], result.run_dir / "curve.png")
    if not result.finished:
        logger.close()
        logger.message(f"stopped at {result.env_steps:,} simulator steps, saved in {result.run_dir}; go on with resume=auto")
        return
    images = ""
    if isinstance(agent, Director):
        director = agent
        images += _attempt("image of goals", result.run_dir / "goals.png", lambda path: _draw_goals(path, task, config, director), logger)
    if config.eval.video:
        images += _attempt("video", result.run_dir / "final.mp4", lambda path: record_video(path, task, config, agent), logger)
    logger.close()  # the last progress line comes before the last word
    reached = f"return {result.last_return:.1f} (best {result.best_return:.1f}) after {result.env_steps:,} simulator steps"
    where = f"look at {result.run_dir}/curve.png{images}"
    logger.message(f"done: {agent.spec.name} {reached} in {seconds / 60:.1f} minutes of training; {where}")


def _attempt(what: str, path: Path, make: Callable[[Path], object], logger: RunLogger) -> str:
    try:
        make(path)
    except Exception as error:  # whatever a user's environment does now, the run itself is complete
        kind = "" if isinstance(error, EnvError) else f"{type(error).__name__}: "
        logger.message(f"no {what}: {kind}{' '.join(str(error).split())}")
        return ""
    return f", {path}"


def record_video(path: Path, task: Task, config: RunConfig, agent: Agent, *, mode: Mode = "eval", seed: int | None = None) -> float:
    """Record one evaluation episode as an mp4, of agents that follow goals beside what these look like, and return its return.

    Raises:
        EnvError: the environment cannot render.
    """
    with evaluation_envs(task, config.env, 1, seed=config.seed if seed is None else seed, render=True) as envs:
        if envs.spec.seats is not None:
            return _record_game(path, envs, config, agent, mode)
        diary = GoalDiary(agent) if isinstance(agent, Director) else None
        result = evaluate(agent, envs, 1, mode=mode, record=True, watch=None if diary is None else diary.note)
        write_video(path, result.frames if diary is None else diary.beside(result.frames), fps=25)
    return result.mean_return


def _record_game(path: Path, envs: VecEnv, config: RunConfig, agent: Agent, mode: Mode) -> float:
    """Record a game against the first opponent of evaluations, and return the agent's return."""
    frames: list[np.ndarray] = []
    opponent = next(iter(evaluation_opponents(config, envs.spec).values()))
    (game,) = play_games(envs, AgentPlayer(agent, mode), opponent, 1, derive_seed(config.seed, "video"), frames=frames)
    write_video(path, frames, fps=50)
    return game.ret


def _draw_goals(path: Path, task: Task, config: RunConfig, agent: Director) -> None:
    """Play one evaluation episode, draw how near the agent came to its goals, and write that beside it."""
    diary = GoalDiary(agent)
    with evaluation_envs(task, config.env, 1, seed=config.seed) as envs:
        evaluate(agent, envs, 1, watch=diary.note)
    write_goals(path.with_name(GOALS), diary.steps)
    plot_goals({agent.spec.name: diary.steps}, path)
