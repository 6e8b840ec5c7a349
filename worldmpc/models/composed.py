"""A planning model out of parts: dynamics, and where there are any a policy, a value and a prior over action sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError
from worldmpc.types import Model, ModelStep

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(z [..., Z], action [..., A], next z [..., Z]) -> [...]``."""


@runtime_checkable
class Dynamics(Protocol):
    """How a world moves; any number of leading dimensions.

    Dynamics may offer ``next`` (the next state alone), ``rollout`` (whole sequences) and ``num_particles`` as a
    :class:`~worldmpc.types.Model` does, and say with ``predicts_reward = False`` that the reward of their steps is None.
    """

    def encode(self, obs: Tensor) -> Tensor:
        """[..., *O] -> [..., Z]."""
        ...

    def observe(self, z: Tensor) -> Tensor:
        """Observation of a state, for policies and values: [..., Z] -> [..., *O]."""
        ...

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...], cont [...]."""
        ...


class FunctionDynamics(nn.Module):
    """Dynamics of a function that predicts the next observation; observation and state are the same.

    Args:
        next: ``(z [..., Z], action [..., A]) -> [..., Z]``; where it is a module, its parameters are these dynamics'.
        reward: ``(z, action, next z) -> [...]``; None: :class:`ComposedModel` needs one.
        cont: ``(z, action, next z) -> [...]``, the probability that the episode goes on; None: always 1.
    """

    def __init__(self, next: Callable[[Tensor, Tensor], Tensor], reward: Reward | None = None, cont: Reward | None = None) -> None:
        super().__init__()
        self._next, self._reward, self._cont = next, reward, cont
        self.predicts_reward = reward is not None

    def encode(self, obs: Tensor) -> Tensor:
        """[..., Z] -> [..., Z], the same."""
        return obs

    def observe(self, z: Tensor) -> Tensor:
        """[..., Z] -> [..., Z], the same."""
        return z

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        """Next state alone: [..., Z], [..., A] -> [..., Z]."""
        return self._next(z, action)

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...] or None, cont [...]."""
        following = self._next(z, action)
        reward: Any = None if self._reward is None else self._reward(z, action, following)
        cont = z.new_ones(()).expand(z.shape[:-1]) if self._cont is None else self._cont(z, action, following)
        return ModelStep(following, reward, cont)


class ComposedModel(nn.Module):
    """What a planner needs (:class:`~worldmpc.types.Model`), put together.

    It has ``next``, ``rollout`` and ``num_particles`` where the dynamics offer them.

    Args:
        dynamics: how the world moves.
        policy: proposes actions: ``sample(obs [..., O], eps [..., A]) -> [..., A]``; of Discrete actions it may also have
            ``probs(obs) -> [..., A]``, which becomes ``action_probs`` of the model. None: nothing is proposed.
        value: ``obs [..., O] -> [...]`` or ``[..., 1]``, the return behind the horizon. None: zero.
        trajectory: a learned prior over action sequences, for the planners that use one.
        reward: ``(z, action, next z) -> [...]``, used instead of what the dynamics predict.

    Raises:
        ConfigError: the dynamics predict no reward, and none is given.
    """

    def __init__(
        self, dynamics: Dynamics, policy: Any = None, value: Any = None, trajectory: Any = None, reward: Reward | None = None
    ) -> None:
        super().__init__()
        if reward is None and not getattr(dynamics, "predicts_reward", True):
            raise ConfigError(_no_reward(dynamics))
        self.dynamics, self.policy, self.value, self.trajectory, self.reward = dynamics, policy, value, trajectory, reward
        self.num_particles: int = getattr(dynamics, "num_particles", 1)
        # Planners ask whether a model has these, so it has those alone that can be answered.
        if (following := getattr(dynamics, "next", None)) is not None:
            self.next = following
        if hasattr(dynamics, "rollout"):
            self.rollout = self._rollout
        if hasattr(policy, "probs"):
            self.action_probs = self._action_probs

    def encode(self, obs: Tensor) -> Tensor:
        """[..., *O] -> [..., Z]."""
        return self.dynamics.encode(obs)

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...], cont [...]."""
        return self._rewarded(self.dynamics.step(z, action), z, action)

    def propose(self, z: Tensor, eps: Tensor) -> Tensor:
        """Sample of the policy: [..., Z], [..., A] -> [..., A].

        Raises:
            ConfigError: the model has no policy.
        """
        if self.policy is None:
            raise ConfigError("planner.num_pi_trajs: this model has no policy that could propose actions; set it to 0, or pass policy=...")
        return self.policy.sample(self.dynamics.observe(z), eps)

    def terminal_value(self, z: Tensor, eps: Tensor, critics: Tensor) -> Tensor:
        """Value of a state, 0 without one; ``eps`` and ``critics`` are not used: [..., Z], [..., A], [2] -> [...]."""
        if self.value is None:
            return z.new_zeros(()).expand(z.shape[:-1])
        value = self.value(self.dynamics.observe(z))
        return value.squeeze(-1) if value.dim() == z.dim() else value

    def _rollout(self, z: Tensor, actions: Tensor) -> ModelStep:
        """Imagine whole sequences: [..., Z], [H, ..., A] -> z [H+1, ..., Z], reward [H, ...], cont [H, ...]."""
        steps: ModelStep = self.dynamics.rollout(z, actions)  # type: ignore[attr-defined]
        rewarded = self._rewarded(steps._replace(z=steps.z[1:]), steps.z[:-1], actions)
        return rewarded._replace(z=steps.z)

    def _rewarded(self, step: ModelStep, z: Tensor, action: Tensor) -> ModelStep:
        if self.reward is not None:
            return step._replace(reward=self.reward(z, action, step.z))
        if step.reward is None:
            raise ConfigError(_no_reward(self.dynamics))
        return step

    def _action_probs(self, z: Tensor) -> Tensor:
        """Probabilities of one-hot actions: [..., Z] -> [..., A]."""
        return self.policy.probs(self.dynamics.observe(z))


def _no_reward(dynamics: Any) -> str:
    return f"dynamics: {type(dynamics).__name__} predicts no reward; pass reward=..., a function of (z, action, next z)"


@torch.no_grad()
def check_model(model: Model, obs_shape: tuple[int, ...], action_dim: int, device: torch.device | str = "cpu") -> None:
    """Try every method of a model once on zeros, with two leading dimensions, and compare the shapes of what it returns.

    Raises:
        ConfigError: a method failed, or returned something of another shape; the message names it.
    """
    lead = (2, 3)
    obs, action = torch.zeros(*lead, *obs_shape, device=device), torch.zeros(*lead, action_dim, device=device)
    action[..., 0] = 1.0  # also a valid choice
    critics = torch.zeros(2, dtype=torch.long, device=device)
    z = _attempt("encode", f"observations {list(obs.shape)}", model.encode, obs)
    _compare("z of encode", z, (*lead, z.shape[-1] if isinstance(z, Tensor) and z.dim() else 0))
    particles = getattr(model, "num_particles", 1)
    if particles > 1:
        lead, z, action = (particles, *lead), z.expand(particles, *z.shape), action.expand(particles, *action.shape)
    shapes = f"z {list(z.shape)} and action {list(action.shape)}"
    step = _attempt("step", shapes, model.step, z, action)
    for name, size in (("z", z.shape), ("reward", lead), ("cont", lead)):
        _compare(f"{name} of step", getattr(step, name, None), size)
    _compare("terminal_value", _attempt("terminal_value", shapes, model.terminal_value, z, action, critics), lead)
    if getattr(model, "policy", True) is not None:
        _compare("action of propose", _attempt("propose", shapes, model.propose, z, torch.zeros_like(action)), action.shape)
    if (probs := getattr(model, "action_probs", None)) is not None:
        _compare("action_probs", _attempt("action_probs", shapes, probs, z), action.shape)
    if (rollout := getattr(model, "rollout", None)) is not None:
        steps = _attempt("rollout", f"2 actions from {shapes}", rollout, z, action.expand(2, *action.shape))
        for name, size in (("z", (3, *z.shape)), ("reward", (2, *lead)), ("cont", (2, *lead))):
            _compare(f"{name} of rollout", getattr(steps, name, None), size)


def _attempt(method: str, shapes: str, function: Callable[..., Any], *arguments: Tensor) -> Any:
    try:
        return function(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model: {method} raised {type(error).__name__} on {shapes}: {reason}") from error


def _compare(name: str, value: Any, shape: tuple[int, ...]) -> None:
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        raise ConfigError(f"model: {name} should be a tensor {list(shape)}, but is {found}")
