"""What is made of replayed windows in a run, as its configuration and its opponents say."""

from __future__ import annotations

from typing import Any

import torch

from worldmpc.config import ConfigError, RunConfig
from worldmpc.data.shaping import Transform, reflect, shape_wins
from worldmpc.data.source import ReplaySource
from worldmpc.opponents.match import Envs, Match
from worldmpc.opponents.pool import Phase, Pool
from worldmpc.types import SequenceBatch


def transform_windows(source: Any, envs: Envs, config: RunConfig, generator: torch.Generator) -> None:
    """Let a replay's windows be shaped by who won, and mirrored, as configured.

    Raises:
        ConfigError: a task without symmetry is to be mirrored, or the windows of an agent that draws none.
    """
    transforms: list[Transform] = []
    if isinstance(envs, Match) and isinstance(envs.pool, Pool):
        pool = envs.pool
        transforms.append(lambda batch: shape_wins(batch, *pool.win_bonus))
    if config.replay.mirror:
        mirror = envs.spec.mirror
        if mirror is None:
            raise ConfigError(f"replay.mirror: {envs.spec.name} says of no symmetry; use replay.mirror=false")

        def mirrored(batch: SequenceBatch) -> SequenceBatch:
            return reflect(batch, mirror, torch.rand(batch.reward.shape[1], generator=generator) < 0.5)

        transforms.append(mirrored)
    if isinstance(source, ReplaySource) and source.draw is None:
        source.transforms += transforms
    elif config.replay.mirror or any(phase.win_bonus.start or phase.win_bonus.final for phase in _pool_phases(envs)):
        raise ConfigError(f"agent: {config.agent} draws no windows from a replay; replay.mirror and a win bonus need them")


def _pool_phases(envs: Envs) -> tuple[Phase, ...]:
    return envs.pool.phases if isinstance(envs, Match) and isinstance(envs.pool, Pool) else ()
