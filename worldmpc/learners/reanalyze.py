"""Lazy reanalysis: plans in the replay are replaced by those of the present model (BMPC)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from worldmpc.config import ReanalyzeConfig
from worldmpc.data.replay import Replay
from worldmpc.types import SequenceBatch


class Reanalyze:
    """Plans anew, in one batched call, for all steps of a few windows of every so many batches.

    Args:
        config: how often, and how many windows.
        replay: where the batches come from and the new plans go.
        plan: observations [E, O] -> what a plan leaves for each, name -> [E, ...].
        begin: updates before it begins to count.
    """

    def __init__(self, config: ReanalyzeConfig, replay: Replay, plan: Callable[[Tensor], dict[str, Tensor]], begin: int) -> None:
        self.config, self.replay, self.plan, self.begin = config, replay, plan, begin

    def __call__(self, batch: SequenceBatch, update: int) -> SequenceBatch:
        """Return the batch of an update, counted from 1, with new plans where one is due; those in the replay are replaced as well.

        Steps behind an episode's end are planned for, as shapes are static, but go nowhere: their index is a row that nothing reads.
        """
        if update <= self.begin or (update - self.begin) % self.config.interval:
            return batch
        count = self.config.batch_size
        obs, index = batch.obs[:-1, :count], batch.index[:, :count]
        steps = obs.shape[:2]
        extras = dict(batch.extras)
        for name, values in self.plan(obs.reshape(-1, *obs.shape[2:])).items():
            if name not in extras:
                continue
            values = values.view(*steps, *values.shape[1:]).to(extras[name])
            self.replay.write(name, index, values)
            real = batch.mask[:, :count].view(*steps, *[1] * (values.dim() - 2)) > 0
            extras[name] = torch.cat((torch.where(real, values, extras[name][:, :count]), extras[name][:, count:]), 1)
        return batch._replace(extras=extras)
