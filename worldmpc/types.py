"""Shapes, batches and interfaces that every part of the house shares. No logic.

Shape legend, used in every docstring:

======  =====================================  ======  =====================================
``B``   batch                                  ``Z``   latent dimension
``T``   time steps                             ``Q``   critics
``E``   parallel environments                  ``K``   bins of a two-hot head
``H``   planning horizon                       ``O``   observation dimensions
``S``   candidate action sequences             ``A``   action dimensions
``N``   stacked seeds                          ``I``   planner iterations
``G``   auxiliary discounts
======  =====================================  ======  =====================================

Sequences are time-major, ``[T, B, ...]``; observations of a window have ``T + 1`` entries.
"Decisions" are agent steps; "env steps" are simulator steps (decisions x action repeat).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""Named 0-d tensors; nobody reads them with ``.item()`` inside the loop."""

Noise = dict[str, Tensor]
"""Named random tensors of static shape, filled by :mod:`worldmpc.noise`."""

Mode = Literal["explore", "eval", "prior"]
"""``prior`` acts with the mean of the policy prior, without planning."""


class Seat(NamedTuple):
    """What one of two players sees and does."""

    obs_shape: tuple[int, ...]
    action_dim: int
    discrete: bool = False


class Mirror(NamedTuple):
    """A symmetry of a task: what changes sign, or place, where the world is reflected."""

    obs_signs: tuple[int, ...]
    action_signs: tuple[int, ...]
    action_order: tuple[int, ...]
    """Entry of the action that comes to each place, before signs."""


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
    discrete: bool = False
    """Actions are choices among ``action_dim``: one-hot vectors everywhere, also in the replay."""
    seats: tuple[Seat, Seat] | None = None
    """Of a game whose observations and actions are those of two players beside each other; nobody acts in it alone."""
    other: Seat | None = None
    """Who else acts, where observations and actions are those of one of two players."""
    mirror: Mirror | None = None
    """The task's symmetry, where it has one; of both players alike."""


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
    extras: dict[str, Tensor] = {}  # name -> [E, ...], for the replay; of games what the other player saw and did


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


class SequenceBatch(NamedTuple):
    """Windows of ``T`` steps, from a replay. After the end of an episode ``mask`` is 0 and the rest is padding."""

    obs: Tensor  # [T+1, B, *O]
    action: Tensor  # [T, B, A]
    reward: Tensor  # [T, B]
    terminated: Tensor  # [T, B] float, 0 or 1
    truncated: Tensor  # [T, B] float, 0 or 1
    mask: Tensor  # [T, B] float, 1 where the step is real
    index: Tensor  # [T, B] int64 rows of the replay, for writing extras in place
    extras: dict[str, Tensor] = {}  # name -> [T, B, ...]


class TransitionBatch(NamedTuple):
    """Single steps, or ``n`` of them at a time, from a replay."""

    obs: Tensor  # [B, *O]
    action: Tensor  # [B, A]
    reward: Tensor  # [B] discounted sum over the steps
    next_obs: Tensor  # [B, *O] after the last of them
    terminated: Tensor  # [B] float, 0 or 1
    discount: Tensor  # [B] what the value of next_obs weighs, gamma ** steps, before termination
    extras: dict[str, Tensor] = {}  # name -> [B, ...] of the first step


class RolloutBatch(NamedTuple):
    """Steps that the policy under training has just taken, flat over time and environments."""

    obs: Tensor  # [B, *O]
    action: Tensor  # [B, A]
    log_prob: Tensor  # [B] of the action when it was taken
    reward: Tensor  # [B]
    value: Tensor  # [B] when the action was taken
    advantage: Tensor  # [B]
    returns: Tensor  # [B] what the value should have been


Batch = SequenceBatch | TransitionBatch | RolloutBatch
"""What an update learns from; each kind of agent knows which."""


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

    mean: Tensor  # [E, H, A]; of one-hot actions: probabilities
    elites: Tensor  # [E, kept, H, A] candidates of the next plan; kept = 0 for most planners


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
    """What a planning agent remembers between two decisions, one entry per environment."""

    plan: PlanState


class GameCarry(NamedTuple):
    """What an agent that imagines its opponents remembers between two decisions, one entry per game."""

    plan: PlanState
    belief: Tensor  # [E, K] log-weights of who plays


class ActOutput(NamedTuple):
    """Result of :meth:`Agent.act`. ``extras`` are per-environment records for the replay."""

    action: Tensor  # [E, A]
    carry: Any  # nested tuples of tensors [E, ...], such as Carry; () for agents without memory
    extras: dict[str, Tensor]  # name -> [E, ...]
    metrics: Metrics


@runtime_checkable
class Model(Protocol):
    """All that a planner sees of a world; any number of leading dimensions.

    A model may offer more, which is used where it is there: ``next`` (the next latent alone), ``rollout`` (whole sequences),
    ``fast_returns`` and ``fast_proposals`` (see :mod:`worldmpc.planners`), ``num_particles`` (imagined copies of every candidate,
    over which returns are averaged, or made one by ``aggregate``, [P, ...] -> [...]; its ``rollout``, or its ``step`` where it has none,
    gets them as the first dimension),
    ``action_probs`` (the policy prior's probabilities of one-hot actions, [..., Z] -> [..., A]), ``trajectory`` (a learned prior over
    action sequences), and ``value``, which is None where the terminal value is 0 for want of one.
    """

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

    def noise_specs(self, num_envs: int) -> dict[str, Any]:
        """Declare the noise of one plan, name -> :class:`worldmpc.noise.NoiseSpec`."""
        ...

    def init(self, num_envs: int, device: torch.device) -> PlanState:
        """Return the warm start of fresh episodes."""
        ...

    def plan(self, model: Model, z: Tensor, state: PlanState, noise: Noise, explore: bool) -> PlanResult:
        """[E, Z] -> one decision per environment."""
        ...


@runtime_checkable
class Agent(Protocol):
    """Acts and learns; never steps environments, logs or saves itself."""

    config: Any
    spec: EnvSpec
    device: torch.device
    discount: float
    model: Any
    """The torch module that holds all its networks."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can act."""
        ...

    def make_source(self, num_envs: int, generator: torch.Generator) -> DataSource:
        """Return what it learns from: where transitions go and batches come from; ``generator`` is the CPU stream of sampling."""
        ...

    def init_carry(self, num_envs: int) -> Any:
        """Return the carry of ``num_envs`` fresh episodes."""
        ...

    def act(self, carry: Any, obs: Tensor, mode: Mode) -> ActOutput:
        """[E, *O] -> action [E, A]: in [-1, 1], or one-hot."""
        ...

    def update(self, batch: Any) -> Metrics:
        """Do one update and return its metrics, among them ``total_loss``."""
        ...

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew, so that evaluations neither depend on nor disturb anything else."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return parameters (as ``model``), optimisers, running statistics and random streams."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


class DataSource(Protocol):
    """Takes transitions, hands out batches, and says when an update is due."""

    decisions: int
    updates: int
    seed_decisions: int
    """Decisions at random before the agent acts."""

    def observe(self, step: Transition) -> None:
        """Take one decision of every environment."""
        ...

    def ready(self) -> int:
        """Return how many updates are due now."""
        ...

    def next(self) -> Batch:
        """Return the batch of the next update, and count it as done."""
        ...

    def describe(self) -> str:
        """Return one line: what it holds and where."""
        ...

    def cut(self) -> None:
        """End all running episodes where they are, as if truncated."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        ...

    def data_state(self) -> dict[str, Tensor]:
        """Return the stored data; tensors may share memory with it until the next step is observed."""
        ...

    def load_data(self, data: Mapping[str, Tensor] | None) -> None:
        """Restore what :meth:`data_state` returned; None: go on without, collecting anew before the next update."""
        ...


LossTerm = Callable[..., tuple[Tensor, Metrics]]
"""``(model, rollout, batch, noise) -> (loss [T, B] already weighted over time, metrics)``.

``rollout.time_weight`` is that weight, 0 behind an episode's end. With several dynamics networks the batch is repeated for each.
"""
