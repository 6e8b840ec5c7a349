"""Fits one-step dynamics to transitions: bootstrap per member, early stopping on held-out rows (PETS, Chua et al. 2018)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmpc.config import ConfigError, DynamicsConfig
from worldmpc.models.one_step import OneStepDynamics, Prediction
from worldmpc.types import Metrics, TransitionBatch

MAX_HOLDOUT = 5000
"""Most rows that a loss is measured on (PETS' published code): more cost time and decide nothing."""
BETA = 0.5
"""Exponent of the variance that weighs a Gaussian likelihood in training (Seitzer et al. 2022)."""
BOUND_WEIGHT = 0.01
"""Weight of the distance between the bounds of the log-variance (PETS' published code)."""


class FitResult(NamedTuple):
    """How a fit ended; losses are those of the weights that were kept."""

    train_loss: float
    holdout_loss: float
    holdout_r2: float
    """Share of the held-out targets' variance around the training mean that the members' average explains."""
    epochs: int
    """Passes over the transitions that were made, also those after the best one."""
    best_epoch: int
    """The one whose weights were kept; 0: those from before the fit."""
    diverged: bool
    """Data or a loss were not finite."""

    def metrics(self) -> Metrics:
        """Return it as named 0-d tensors."""
        return {f"dynamics_{name}": torch.tensor(float(value)) for name, value in self._asdict().items()}


class Rows(NamedTuple):
    """Transitions as the networks see them; minibatches have a leading dimension M."""

    inputs: Tensor  # [N, O+A]
    targets: Tensor  # [N, O+1] normalised change of the observation, and reward
    terminated: Tensor  # [N] 0 or 1; a time limit is no termination


class _Snapshot(NamedTuple):
    loss: float
    epoch: int
    parameters: list[Tensor]
    optimizer: dict[str, Any]


def make_optimizer(dynamics: OneStepDynamics, config: DynamicsConfig) -> torch.optim.AdamW:
    """Return the optimiser of the dynamics, which lives over all fits; only weight matrices decay (Loshchilov & Hutter 2019)."""
    decays = {True: config.weight_decay, False: 0.0}
    named = [(".weights." in name, parameter) for name, parameter in dynamics.named_parameters()]
    groups = [{"params": [value for own, value in named if own == kind], "weight_decay": decay} for kind, decay in decays.items()]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def member_losses(prediction: Prediction, rows: Rows, beta: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the losses of each member on each row, of the targets [M, N] and of termination [M, N].

    Gaussian members: twice the negative log-likelihood on average over targets, without its constant (PETS, section 4), each target's
    weighted by its variance to the power of ``beta``, as a constant (beta-NLL, Seitzer et al. 2022): the optimum is the same,
    but rows that are badly predicted are not given up in favour of those that are well predicted. Deterministic ones: mean squared
    error. Termination: binary cross-entropy; rare ones are not weighted up, so that probabilities are those of the data.
    """
    error = (prediction.mean - rows.targets).square()
    if prediction.log_var is not None:
        error = error * (-prediction.log_var).exp() + prediction.log_var
        error = error * (beta * prediction.log_var.detach()).exp()
    loss = error.mean(-1)
    if prediction.logit is None:
        return loss, torch.zeros_like(loss)
    return loss, F.binary_cross_entropy_with_logits(prediction.logit, rows.terminated.expand_as(loss), reduction="none")


def mixture_loss(prediction: Prediction, rows: Rows) -> Tensor:
    """Return the loss [] of all members together: that of the mixture of their distributions, which is what particles sample from.

    A mean over members instead would be decided by rare rows that a single member is too sure about. Infinite where any member's
    own loss is not finite, which a mixture could hide.
    """
    loss, end = member_losses(prediction, rows)
    half = 0.5 * rows.targets.shape[-1]  # back to log-likelihoods of whole rows
    mixture = (math.log(len(loss)) - torch.logsumexp(-half * loss, 0)) / half
    return torch.where(loss.isfinite().all(0), mixture, math.inf).mean() + end.mean()


def fit(
    dynamics: OneStepDynamics,
    optimizer: torch.optim.Optimizer,
    data: TransitionBatch,
    config: DynamicsConfig,
    generator: torch.Generator,
) -> FitResult:
    """Go on training the dynamics, until the loss on held-out rows has not improved for ``patience`` epochs.

    Rows are split anew, and normalisation is taken from the training rows anew. Each member of an ensemble trains on its own
    bootstrap of them. Weights and optimiser end as they were after the epoch with the lowest held-out :func:`mixture_loss`, the same
    one for all members, which may be before the first one. Where that loss is not finite the fit ends there, with that same best
    state; where the data is not, nothing changes at all.

    Args:
        dynamics: what to fit, in place.
        optimizer: of :func:`make_optimizer`.
        data: all transitions, single steps: obs [N, O], action [N, A], reward [N], next_obs [N, O], terminated [N].
        config: batch_size, holdout, max_epochs, patience.
        generator: CPU generator of split, bootstrap and order.

    Raises:
        ConfigError: fewer than 2 transitions, shapes that do not fit, or a generator on another device.
    """
    _check(dynamics, data, generator)
    order = torch.randperm(len(data.obs), generator=generator)
    num_held = min(max(round(config.holdout * len(order)), 1), MAX_HOLDOUT, len(order) - 1)
    obs, action, reward, next_obs, terminated = _fields(data, next(dynamics.parameters()))
    if not all(bool(field.isfinite().all()) for field in (obs, action, reward, next_obs, terminated)):
        return FitResult(math.nan, math.nan, math.nan, 0, 0, True)
    held_index, train_index = order.to(obs.device).tensor_split([num_held])
    dynamics.normalize(obs[train_index], reward[train_index], next_obs[train_index])
    with torch.no_grad():
        targets = dynamics.targets(torch.cat((next_obs - obs, reward[:, None]), -1))
        rows = Rows(dynamics.inputs(obs, action), targets, terminated)
    held, train = (Rows(*(field[index] for field in rows)) for index in (held_index, train_index))

    bootstrap = torch.arange(len(train_index)).expand(dynamics.members, -1)
    if dynamics.members > 1:  # a single network loses by it a third of the rows and gains nothing
        bootstrap = torch.randint(len(train_index), bootstrap.shape, generator=generator)
    best, epoch = _snapshot(dynamics, optimizer, _loss(dynamics, held), 0), 0
    diverged = not math.isfinite(best.loss)
    while not diverged and epoch < config.max_epochs:
        _train_epoch(dynamics, optimizer, train, _minibatches(bootstrap, config.batch_size, generator))
        epoch, loss = epoch + 1, _loss(dynamics, held)
        diverged = not math.isfinite(loss)
        if loss < best.loss:
            best = _snapshot(dynamics, optimizer, loss, epoch)
        if epoch - best.epoch >= config.patience:
            break
    _restore(dynamics, optimizer, best)
    seen = Rows(*(field[:MAX_HOLDOUT] for field in train))
    return FitResult(_loss(dynamics, seen), best.loss, _r2(dynamics, held), epoch, best.epoch, diverged)


def _minibatches(bootstrap: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows [M, N] of all members in a new order each, in pieces [M, at most batch_size]."""
    order = torch.rand(bootstrap.shape, generator=generator).argsort(-1)
    return iter(bootstrap.gather(1, order).split(batch_size, 1))


def _train_epoch(dynamics: OneStepDynamics, optimizer: torch.optim.Optimizer, rows: Rows, batches: Iterator[Tensor]) -> None:
    for index in batches:
        index = index.to(rows.inputs.device)
        # A sum over members, so that each one learns as if it were alone.
        batch = Rows(*(field[index] for field in rows))
        loss, end = member_losses(dynamics(batch.inputs), batch, BETA)
        loss = (loss + end).mean(1).sum()
        if dynamics.gaussian:
            loss = loss + BOUND_WEIGHT * (dynamics.max_log_var - dynamics.min_log_var).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _predict(dynamics: OneStepDynamics, rows: Rows) -> Prediction:
    return dynamics(rows.inputs.expand(dynamics.members, *rows.inputs.shape))


def _loss(dynamics: OneStepDynamics, rows: Rows) -> float:
    return float(mixture_loss(_predict(dynamics, rows), rows))


def _r2(dynamics: OneStepDynamics, rows: Rows) -> float:
    error = _predict(dynamics, rows).mean.mean(0) - rows.targets
    return float(1 - error.square().sum() / rows.targets.square().sum().clamp(min=torch.finfo(error.dtype).tiny))


def _snapshot(dynamics: OneStepDynamics, optimizer: torch.optim.Optimizer, loss: float, epoch: int) -> _Snapshot:
    parameters = [parameter.detach().clone() for parameter in dynamics.parameters()]
    return _Snapshot(loss, epoch, parameters, copy.deepcopy(optimizer.state_dict()))


@torch.no_grad()
def _restore(dynamics: OneStepDynamics, optimizer: torch.optim.Optimizer, best: _Snapshot) -> None:
    for parameter, value in zip(dynamics.parameters(), best.parameters, strict=True):
        parameter.copy_(value)
    optimizer.load_state_dict(best.optimizer)
    optimizer.zero_grad()


def _fields(data: TransitionBatch, like: Tensor) -> tuple[Tensor, ...]:
    """Return obs, action, reward, next_obs and terminated where the parameters are, and of their type."""
    return tuple(field.to(like) for field in (data.obs, data.action, data.reward, data.next_obs, data.terminated))


def _check(dynamics: OneStepDynamics, data: TransitionBatch, generator: torch.Generator) -> None:
    rows = len(data.obs)
    if rows < 2:
        raise ConfigError(f"fit: {rows} transitions cannot be split; give at least 2, one to train on and one to hold out")
    states, actions = (rows, dynamics.obs_dim), (rows, dynamics.action_dim)
    expected = {"obs": states, "action": actions, "reward": (rows,), "next_obs": states, "terminated": (rows,)}
    for name, shape in expected.items():
        if getattr(data, name).shape != shape:
            raise ConfigError(f"fit: {name} has shape {list(getattr(data, name).shape)}; give {list(shape)}")
    if generator.device.type != "cpu":
        raise ConfigError(f"fit: the generator is on {generator.device}; use one on the CPU, so that every device draws the same rows")
