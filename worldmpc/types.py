"""Shapes, batches and interfaces that every part of the house shares. No logic.

Shape legend, used in every docstring:

======  =====================================  ======  =====================================
``B``   batch                                  ``Z``   latent dimension
``T``   time steps                             ``Q``   critics
``E``   parallel environments                  ``K``   bins of a two-hot head
``H``   planning horizon                       ``O``   observation dimensions
``S``   candidate action sequences             ``A``   action dimensions
``N``   stacked seeds                          ``I``   planner iterations
======  =====================================  ======  =====================================

Sequences are time-major, ``[T, B, ...]``; observations of a window have ``T + 1`` entries.
"Decisions" are agent steps; "env steps" are simulator steps (decisions x action repeat).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""Named 0-d tensors; nobody reads them with ``.item()`` inside the loop."""

Noise = dict[str, Tensor]
"""Named random tensors of static shape, filled by :mod:`worldmpc.noise`."""

Mode = Literal["explore", "eval", "prior"]
"""``prior`` acts with the mean of the policy prior, without planning."""


@dataclass(frozen=True)
class EnvSpec:
    """What an environment tells the rest of the house about itself."""

    name: str
    obs_shape: tuple[int, ...]
    action_dim: int
    episode_length: int | None
    """Time limit in decisions; ``None`` where the environment has none."""
    action_repeat: int = 1
    can_terminate: bool = True
    """False only where the suite guarantees that episodes end by time limit alone."""
    obs_dtype: torch.dtype = torch.float32


class EnvStep(NamedTuple):
    """Result of one vectorised step. All tensors on the CPU.

    ``next_obs`` is what followed the action, also at the end of an episode; ``obs`` is what to act
    on next, that is the first observation of a new episode where the old one ended.
    ``valid`` is False where the step was no transition (a reset step of a ``NEXT_STEP`` vector
    environment): such an entry must not be stored.
    """

    next_obs: Tensor  # [E, *O]
    reward: Tensor  # [E]
    terminated: Tensor  # [E] bool
    truncated: Tensor  # [E] bool
    obs: Tensor  # [E, *O]
    valid: Tensor  # [E] bool
    success: Tensor  # [E] float, NaN where the environment reports none


class Transition(NamedTuple):
    """One decision in each environment, as a DataSource observes it."""

    obs: Tensor  # [E, *O]
    action: Tensor  # [E, A]
    reward: Tensor  # [E]
    terminated: Tensor  # [E] bool
    truncated: Tensor  # [E] bool
    next_obs: Tensor  # [E, *O]
    valid: Tensor  # [E] bool
    extras: dict[str, Tensor] = {}  # name -> [E, ...]


class Batch(NamedTuple):
    """Windows of ``T`` steps. After the end of an episode ``mask`` is 0 and the rest is padding."""

    obs: Tensor  # [T+1, B, *O]
    action: Tensor  # [T, B, A]
    reward: Tensor  # [T, B]
    terminated: Tensor  # [T, B] float, 0 or 1
    truncated: Tensor  # [T, B] float, 0 or 1
    mask: Tensor  # [T, B] float, 1 where the step is real
    index: Tensor  # [T, B] int64 rows of the replay, for writing extras in place
    extras: dict[str, Tensor] = {}  # name -> [T, B, ...]


class ModelStep(NamedTuple):
    """One imagined step; ``cont`` is the probability that the episode goes on."""

    z: Tensor  # [..., Z]
    reward: Tensor  # [...]
    cont: Tensor  # [...]


class PolicySample(NamedTuple):
    """Output of a policy prior at a latent."""

    action: Tensor  # [..., A] sampled, in [-1, 1]
    mean: Tensor  # [..., A] in [-1, 1]
    log_std: Tensor  # [..., A] before squashing
    log_prob: Tensor  # [...] of the squashed action
    entropy: Tensor  # [...] one-sample estimate, -log_prob
    scaled_entropy: Tensor  # [...] as the published objective uses it


class PlanState(NamedTuple):
    """Warm start of a planner, one entry per environment."""

    mean: Tensor  # [E, H, A]


class PlanResult(NamedTuple):
    """What a planner decided for each environment."""

    action: Tensor  # [E, A] to execute
    elite: Tensor  # [E, A] first action of the chosen sequence, without exploration noise
    mean: Tensor  # [E, H, A] of the refined plan
    std: Tensor  # [E, H, A] of the refined plan
    value: Tensor  # [E] estimated return of the chosen sequence
    state: PlanState
    metrics: Metrics


class Carry(NamedTuple):
    """Everything an agent remembers between two decisions, one entry per environment."""

    plan: PlanState


class ActOutput(NamedTuple):
    """Result of :meth:`Agent.act`. ``extras`` are per-environment records for the replay."""

    action: Tensor  # [E, A]
    carry: Carry
    extras: dict[str, Tensor]  # name -> [E, ...]
    metrics: Metrics


CarryT = TypeVar("CarryT")


@runtime_checkable
class Model(Protocol):
    """All that a planner sees of a world; any number of leading dimensions."""

    def encode(self, obs: Tensor) -> Tensor:
        """[..., *O] -> [..., Z]."""
        ...

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...], cont [...]."""
        ...

    def propose(self, z: Tensor, eps: Tensor) -> Tensor:
        """Sample of the policy prior: [..., Z], [..., A] -> [..., A]."""
        ...

    def terminal_value(self, z: Tensor, eps: Tensor, critics: Tensor) -> Tensor:
        """Value bootstrap with the critics of the given indices: [..., Z], [..., A], [2] -> [...]."""
        ...


@runtime_checkable
class Planner(Protocol):
    """Refines action sequences against a model; keeps no hidden state."""

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes."""
        ...

    def plan(self, model: Model, z: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """[E, Z] -> one decision per environment."""
        ...


@runtime_checkable
class Agent(Protocol):
    """Acts and learns; never steps environments, logs or saves itself."""

    def init_carry(self, num_envs: int) -> Carry:
        """Return the carry of ``num_envs`` fresh episodes."""
        ...

    def act(self, carry: Carry, obs: Tensor, mode: Mode) -> ActOutput:
        """[E, *O] -> action [E, A] in [-1, 1]."""
        ...

    def update(self, batch: Batch) -> Metrics:
        """Do one gradient update and return its metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, running statistics and random streams."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


class DataSource(Protocol):
    """Takes transitions, hands out batches, and says when an update is due."""

    def observe(self, step: Transition) -> None:
        """Take one decision of every environment."""
        ...

    def ready(self) -> int:
        """Return how many updates are due now."""
        ...

    def next(self) -> Batch:
        """Return the batch of the next update."""
        ...


LossTerm = Callable[..., tuple[Tensor, Metrics]]
"""``(model, rollout, batch, noise) -> (loss [T, B] already weighted over time, metrics)``."""
