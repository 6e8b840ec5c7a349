"""What is made of replayed windows as a configuration says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from worldmpc.config import ConfigError, RunConfig
from worldmpc.data.shaping import Transform, reflect, shape_wins
from worldmpc.data.source import ReplaySource
from worldmpc.types import EnvSpec


def shape_windows(
    source: Any, spec: EnvSpec, config: RunConfig, generator: torch.Generator, wins: Callable[[], tuple[float, float]] | None, needed: bool
) -> None:
    """Let a replay's windows be shaped by who won, and mirrored, as configured.

    Args:
        source: of an agent's updates.
        spec: of what it plays.
        config: the run's.
        generator: says what is mirrored.
        wins: asked for every batch: bonus and discount of won games; None: there are no games.
        needed: a bonus will be given at some time.

    Raises:
        ConfigError: a task without symmetry is to be mirrored, or the windows of an agent that draws none.
    """
    transforms: list[Transform] = [] if wins is None else [lambda batch: shape_wins(batch, *wins())]
    if config.replay.mirror:
        mirror = spec.mirror
        if mirror is None:
            raise ConfigError(f"replay.mirror: {spec.name} says of no symmetry; use replay.mirror=false")
        transforms.append(lambda batch: reflect(batch, mirror, torch.rand(batch.reward.shape[1], generator=generator) < 0.5))
    if isinstance(source, ReplaySource) and source.draw is None:
        source.transforms += transforms
    elif config.replay.mirror or needed:
        raise ConfigError(f"agent: {config.agent} draws no windows from a replay; replay.mirror and a win bonus need them")
