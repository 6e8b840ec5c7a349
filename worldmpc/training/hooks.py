"""Hooks around the training loop: log, evaluate, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmpc.data.source import ReplaySource
from worldmpc.envs.vector import VecEnv
from worldmpc.noise import NoiseStream, derive_seed
from worldmpc.opponents.match import Match
from worldmpc.opponents.pool import Pool
from worldmpc.training.checkpoint import CheckpointStore
from worldmpc.training.evaluator import EvalResult, Stopped, evaluate
from worldmpc.training.logger import RunLogger, Throughput
from worldmpc.training.trainer import Every, TrainState, check_losses
from worldmpc.training.two_player import Fixtures, game_rows
from worldmpc.types import Agent, Metrics, Mode


class LogHook:
    """Writes the losses, episode returns and rates of the last stretch to the logger, and keeps the progress display alive."""

    def __init__(self, logger: RunLogger, throughput: Throughput, every: int) -> None:
        self.logger, self.throughput, self.every = logger, throughput, Every(every)

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Log where due."""
        self.logger.progress(state.decisions, state.env_steps, state.updates)
        if not self.every.due(state.decisions, state.advanced):
            return
        check_losses(metrics, state.agent.config.train.max_loss)
        record: dict[str, float] = {
            name if "/" in name else f"train/{name}": float(value) for name, value in (metrics | state.act_metrics).items()
        }
        if state.finished:
            record["train/episode_return"] = float(np.mean([episode.ret for episode in state.finished]))
            record["train/episode_length"] = float(np.mean([episode.length for episode in state.finished]))
            state.reported = len(state.finished)
        record |= self.throughput.since_last(decisions=state.decisions, env_steps=state.env_steps, updates=state.updates)
        record["time/seconds"] = self.throughput.seconds
        if state.agent.config.compile:
            record["time/compile_seconds"] = state.agent.compile_seconds  # type: ignore[attr-defined]
        self.logger.log(_counters(state) | record)


class GamesHook:
    """Writes every game of training that ended, and empties the replay where a curriculum's next phase asks for it."""

    def __init__(self, logger: RunLogger) -> None:
        self.logger = logger

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Write the games of this step."""
        assert isinstance(state.envs, Match)
        for game in state.envs.finished:
            self.logger.log_game({**_counters(state), "kind": "training", **game})
        pool, source = state.envs.pool, state.source
        if isinstance(pool, Pool) and pool.clears_replay and isinstance(source, ReplaySource):
            self.logger.message(f"opponents: phase {pool.phase.name} begins with an empty replay")
            source.replay.clear()
            pool.clears_replay = False


class EvalHook:
    """Evaluates the planner, and the policy prior alone, on environments of their own; remembers the best."""

    def __init__(
        self,
        logger: RunLogger,
        throughput: Throughput,
        envs: VecEnv | Fixtures,
        every: int,
        episodes: int,
        prior: bool,
        until: float | None,
    ) -> None:
        self.logger, self.throughput, self.envs, self.every = logger, throughput, envs, Every(every)
        self.episodes, self.prior, self.until = episodes, prior, until
        self.best, self.last, self.improved = float("-inf"), float("nan"), False
        self.evaluated_at = -1

    def state_dict(self) -> dict[str, float]:
        """Return the best and the last evaluation."""
        return {"best": self.best, "last": self.last, "at": self.evaluated_at}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.best, self.last, self.evaluated_at = float(state["best"]), float(state["last"]), int(state["at"])

    def reached(self, state: TrainState) -> bool:
        """Return whether the evaluation of this very step has reached the return at which the run ends."""
        return self.until is not None and self.evaluated_at == state.decisions and self.last >= self.until

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Evaluate where due."""
        if self.every.due(state.env_steps, state.advanced * state.envs.spec.action_repeat):
            self.run(state)

    def run(self, state: TrainState) -> None:
        """Evaluate now, unless ``state.stop`` is set meanwhile: then this step's hooks are to be done again by whoever resumes."""
        try:
            self._run(state)
        except Stopped:
            state.settled = False

    def _run(self, state: TrainState) -> None:
        def stop() -> bool:
            return state.stop

        with self.throughput.paused():
            begin = time.perf_counter()
            result = self._play(state.agent, "eval", state.decisions, stop)
            row: dict[str, float | None] = {
                "return_mean": result.mean_return,
                "return_min": min(result.returns),
                "return_max": max(result.returns),
                "return_std": float(np.std(result.returns)),
                "length_mean": float(np.mean(result.lengths)),
                "success": float(np.mean(result.success)),
                "episodes": len(result.returns),
            }
            if self.prior and "prior" in state.agent.modes:
                row["prior_return_mean"] = self._play(state.agent, "prior", state.decisions, stop).mean_return
            row["seconds"] = time.perf_counter() - begin
        counters = {name: value for name, value in _counters(state).items() if name != "episodes"}
        self.logger.log_eval(counters | row)
        for series in game_rows(result):
            self.logger.log_game({**counters, "kind": "evaluation", **series})
        self.last, self.evaluated_at = result.mean_return, state.decisions
        self.improved = result.mean_return > self.best
        self.best = max(self.best, result.mean_return)
        state.stop = state.stop or self.reached(state)

    def _play(self, agent: Agent, mode: Mode, index: int, stop: Callable[[], bool]) -> EvalResult:
        if isinstance(self.envs, Fixtures):
            return self.envs.play(agent, self.episodes, mode=mode, index=index, stop=stop)
        return evaluate(agent, self.envs, self.episodes, mode=mode, index=index, stop=stop)


class SnapshotHook:
    """Logs what an agent's auxiliary values say about a few replayed windows, at the steps of evaluations.

    Its random numbers depend on seed and step alone, so that it neither disturbs training nor depends on what came before.
    """

    def __init__(self, logger: RunLogger, every: int, objectives: Callable[..., Mapping[str, Tensor]]) -> None:
        self.logger, self.every, self.snapshot = logger, Every(every), objectives

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Log where due."""
        if self.every.due(state.env_steps, state.advanced * state.envs.spec.action_repeat):
            self.log(state)

    def log(self, state: TrainState) -> None:
        """Log now, if there is something to look at."""
        source = state.source
        assert isinstance(source, ReplaySource)
        if not source.replay.num_windows():
            return
        agent: Any = state.agent
        stream = NoiseStream(agent.config.seed, "snapshot", state.decisions, device=agent.device)
        draw = torch.Generator().manual_seed(derive_seed(agent.config.seed, "snapshot windows", state.decisions))
        batch = source.replay.sample(torch.rand(agent.config.multi_gamma.log_num_examples, dtype=torch.float64, generator=draw))
        found = self.snapshot(batch, stream.draw(agent.objectives.noise_specs(*batch.reward.shape)))
        plain = {name: values.tolist() for name, values in found.items()}
        self.logger.log_snapshot(_counters(state) | {"gammas": list(agent.objectives.model.auxiliary.gammas), **plain})


class CheckpointHook:
    """Saves the whole state at fixed intervals, and the best evaluated one besides."""

    def __init__(
        self, store: CheckpointStore, evaluation: EvalHook, throughput: Throughput, every: int, replay: bool, meta: dict[str, object]
    ) -> None:
        self.store, self.evaluation, self.throughput, self.every = store, evaluation, throughput, Every(every)
        self.replay, self.meta = replay, meta
        self.saved: tuple[int, bool] | None = None
        """Decisions and ``settled`` of the state that was saved last."""

    def __call__(self, state: TrainState, metrics: Metrics) -> None:
        """Save where due, and where the evaluation just made is the best so far."""
        best = self.evaluation.improved and self.evaluation.evaluated_at == state.decisions
        if best or self.every.due(state.env_steps, state.advanced * state.envs.spec.action_repeat):
            self.save(state, best=best)

    def save(self, state: TrainState, best: bool = False) -> None:
        """Save now, unless this very state has just been saved."""
        if self.saved == (state.decisions, state.settled) and not best:
            return
        tree = state.state_dict()
        if not self.replay:
            del tree["replay"]
        tree["loop"]["evaluation"] = self.evaluation.state_dict()
        tree["loop"]["seconds"] = self.throughput.seconds
        self.store.save(state.env_steps, tree, {**self.meta, **_counters(state)}, best=best)
        self.evaluation.improved = False
        self.saved = (state.decisions, state.settled)


def _counters(state: TrainState) -> dict[str, float]:
    return {"decisions": state.decisions, "env_steps": state.env_steps, "updates": state.updates, "episodes": state.episodes}
