"""Where the numbers of the training components go: console, metrics.jsonl, stats.csv, TensorBoard, and Weights & Biases on request."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from worldmpc.config import ConfigError, LogConfig
from worldmpc.files import written_aside
from worldmpc.training.configs import WandbConfig
from worldmpc.training.logger import RunLogger, Throughput

COLUMNS = ("epoch", "agent_steps", "name", "value")


class StatsLogger:
    """Collects numbers during an epoch and writes their means at its end.

    Args:
        run_dir: folder of ``metrics.jsonl``, ``stats.csv`` (one number per line) and TensorBoard events; None: no files.
        wandb_run: anything with ``log(record, step=...)``; None: nothing goes there.
        is_master: False: write nothing; for all processes but one.
        total_steps: decisions that the training goes to, for the display.
        action_repeat: simulator steps per decision.
        tensorboard: write events.
        progress: the display; ``none`` for silence.
        console: where it is shown.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        wandb_run: Any = None,
        is_master: bool = True,
        *,
        total_steps: int | None = None,
        action_repeat: int = 1,
        tensorboard: bool = True,
        progress: Literal["auto", "live", "plain", "none"] = "auto",
        console: Console | None = None,
    ) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.wandb_run, self.is_master, self.action_repeat = wandb_run, is_master, action_repeat
        config = LogConfig(tensorboard=tensorboard and run_dir is not None, progress=progress if is_master else "none")
        total = None if total_steps is None else total_steps * action_repeat
        self._logger = RunLogger(self.run_dir if is_master else None, config, total_env_steps=total, console=console)
        self._rates = Throughput(time.perf_counter)
        self._collected: dict[str, list[float]] = {}
        self.episodes = 0
        """Episodes that have ended so far."""

    def add_stats(self, stats: Mapping[str, float | Sequence[float] | np.ndarray | Tensor]) -> None:
        """Add numbers, or lists, arrays and tensors of them, to what this epoch has collected.

        Raises:
            ConfigError: anything else, by name.
        """
        for name, values in stats.items():
            try:
                numbers = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"stats.{name}: expected numbers, got {values!r}") from error
            self._collected.setdefault(name, []).extend(numbers)

    def process_and_log(
        self,
        agent_steps: int,
        epoch: int,
        losses: Mapping[str, float] | None = None,
        *,
        updates: int = 0,
        evals: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write what was collected, and begin the next epoch's collection.

        Args:
            agent_steps: decisions so far.
            epoch: epochs so far.
            losses: of the epoch's updates.
            updates: so far.
            evals: scores, where there was an evaluation.

        Returns:
            ``rollout/<name>``: means of what was added; ``train/<name>``: losses; ``eval/<name>``; ``time/agent_steps_per_s``.
        """
        collected, self._collected = self._collected, {}
        self.episodes += len(collected.get("episode_return", ()))
        record = {f"rollout/{name}": sum(values) / len(values) for name, values in collected.items() if values}
        record |= {f"train/{name}": float(value) for name, value in (losses or {}).items()}
        record |= {f"eval/{name}": float(value) for name, value in (evals or {}).items()}
        record |= self._rates.since_last(agent_steps=agent_steps)
        if self.is_master:
            self._write(record, agent_steps, epoch, updates)
        return record

    def resume(self, agent_steps: int, episodes: int = 0) -> None:
        """Continue the records of a run from a checkpoint with these counters: drop all later ones. Call it before the first record.

        Raises:
            ValueError: a file cannot be read.
        """
        self._rates, self.episodes = Throughput(time.perf_counter, agent_steps=agent_steps), episodes
        if self.run_dir is None or not self.is_master:
            return
        self._logger.truncate(agent_steps)
        path = self.run_dir / "stats.csv"
        if path.exists():
            with path.open(newline="") as file:
                header, *rows = csv.reader(file)
            kept = [row for row in rows if len(row) == len(header) and int(row[1]) <= agent_steps]
            with written_aside(path) as partial, partial.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([header, *kept])

    def close(self) -> None:
        """Show the last state and close all files."""
        self._logger.close()

    def _write(self, record: dict[str, float], agent_steps: int, epoch: int, updates: int) -> None:
        env_steps = agent_steps * self.action_repeat
        counters = {"decisions": agent_steps, "env_steps": env_steps, "updates": updates, "episodes": self.episodes}
        if self.run_dir is not None:
            self._logger.log({**counters, "epoch": epoch, **record})
            path = self.run_dir / "stats.csv"
            begin = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if begin:
                    writer.writerow(COLUMNS)
                writer.writerows((epoch, agent_steps, name, "" if math.isnan(value) else f"{value:.8g}") for name, value in record.items())
        if self.wandb_run is not None:
            self.wandb_run.log({**counters, "epoch": epoch, **record}, step=agent_steps)
        self._logger.progress(agent_steps, env_steps, updates)


def start_wandb(config: WandbConfig, name: str, record: Mapping[str, Any]) -> Any:
    """Begin a run of Weights & Biases, or return None where that is off.

    Args:
        config: section ``wandb``.
        name: of the run, unless the section has one.
        record: the whole configuration, to be stored there.

    Raises:
        ConfigError: its package is not installed.
    """
    if not config.enabled:
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("wandb.enabled: the package wandb is not installed; install it, or set wandb.enabled=false") from error
    return wandb.init(project=config.project, name=config.name or name, tags=list(config.tags), config=dict(record))
