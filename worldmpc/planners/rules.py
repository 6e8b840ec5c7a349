"""What tells the sampling planners apart: one row each."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

WORST = -1e30
"""Score of a candidate whose return is not finite: never an elite while any other candidate is finite."""


class Rule(NamedTuple):
    """How a planner samples, weighs its elites and chooses what to execute."""

    execute: Literal["draw", "mean", "best"]
    """An elite drawn by weight, the refined mean, or the best sequence ever seen."""
    refines: bool = True
    """False: one iteration."""
    soft: bool = False
    """Elites weigh exponentially in their returns; False: all the same."""
    momentum: bool = False
    """A refit keeps a share of the former mean and standard deviation."""
    noise: Literal["white", "coloured", "uniform"] = "white"
    keeps: bool = False
    """Elites are candidates again, the refined mean is one in the last iteration, and samples get fewer (iCEM)."""
    guided: bool = False
    """All candidates follow the policy prior, with noise."""


RULES = {
    "mppi": Rule("draw", soft=True),
    "cem": Rule("mean", momentum=True),
    "icem": Rule("best", momentum=True, noise="coloured", keeps=True),
    "random_shooting": Rule("best", refines=False, noise="uniform"),
    "policy_guided": Rule("best", refines=False, soft=True, guided=True),
}
"""The planners by name: MPPI as TD-MPC2 published it (Hansen et al. 2024), the cross-entropy method (Rubinstein 1999), its
sample-efficient form (Pinneri et al. 2020), random shooting (Nagabandi et al. 2018), and candidates of the policy prior alone."""


def soft_weights(values: Tensor, temperature: float) -> Tensor:
    """Weights exp(temperature * value), normalised: [E, elites] -> [E, elites]."""
    return torch.softmax(temperature * values, 1)


def equal_weights(values: Tensor) -> Tensor:
    """Equal weights of all elites with a finite return, or of all where none has one: [E, elites] -> [E, elites]."""
    return torch.softmax(values.new_zeros(()).where(values > WORST, WORST), 1)
