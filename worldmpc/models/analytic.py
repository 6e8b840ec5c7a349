"""Known equations of small tasks: dynamics that are batched, differentiable, and equal to the environment's own step.

Gymnasium's tasks are those of its ``envs/classic_control`` (version 1.4), with the constants written there. States have any number
of leading dimensions and the dtype that they come in. Box actions in [-1, 1] are clipped to it and scaled to the environment's
bounds, as worldmpc's environments do; one-hot actions of Discrete tasks act linearly, so that the gradient passes through
relaxed ones. Termination is a comparison and has no gradient. Time limits are not part of the dynamics.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from worldmpc.config import ConfigError
from worldmpc.envs.toy import LinearQuadratic as LinearQuadraticEnv
from worldmpc.envs.toy import PointMass as PointMassEnv
from worldmpc.models.composed import Dynamics
from worldmpc.types import ModelStep


class KnownDynamics(Dynamics, Protocol):
    """Dynamics that say what they are made for."""

    action_dim: int
    """Action dimensions, or choices."""
    discrete: bool
    """Actions are one-hot."""
    state_dim: int


def _wrap(angle: Tensor) -> Tensor:
    """Angle in [-pi, pi), with derivative 1."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _always(z: Tensor, value: float) -> Tensor:
    return z.new_full((), value).expand(z.shape[:-1])


def _cont(terminated: Tensor, z: Tensor) -> Tensor:
    return (~terminated).to(z.dtype)


class _Observed:
    """Tasks whose observation is the state."""

    def encode(self, obs: Tensor) -> Tensor:
        """[..., O] -> [..., Z], the same."""
        return obs

    def observe(self, z: Tensor) -> Tensor:
        """[..., Z] -> [..., O], the same."""
        return z


class CartPole(_Observed):
    """gym/CartPole-v1: position, velocity, angle and angular velocity of a cart with a pole; push left or right (``cartpole.py``).

    Every step is rewarded with 1, also the one that leaves the bounds and terminates.
    """

    action_dim, discrete, state_dim = 2, True, 4
    GRAVITY, CART_MASS, POLE_MASS = 9.8, 1.0, 0.1
    HALF_LENGTH = 0.5  # of the pole [m]
    FORCE, TIME_STEP = 10.0, 0.02  # [N], [s]
    MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 4], [..., 2] -> z [..., 4], reward [...], cont [...]."""
        position, velocity, angle, spin = z.unbind(-1)
        force = self.FORCE * (action[..., 1] - action[..., 0])
        cosine, sine = torch.cos(angle), torch.sin(angle)
        mass = self.CART_MASS + self.POLE_MASS
        pushed = (force + self.POLE_MASS * self.HALF_LENGTH * spin.square() * sine) / mass
        turned = (self.GRAVITY * sine - cosine * pushed) / (self.HALF_LENGTH * (4.0 / 3.0 - self.POLE_MASS * cosine.square() / mass))
        moved = pushed - self.POLE_MASS * self.HALF_LENGTH * turned * cosine / mass
        change = torch.stack((velocity, moved, spin, turned), -1)
        following = z + self.TIME_STEP * change  # explicit Euler
        position, _, angle, _ = following.unbind(-1)
        terminated = (position.abs() > self.MAX_POSITION) | (angle.abs() > self.MAX_ANGLE)
        return ModelStep(following, _always(z, 1.0), _cont(terminated, z))


class Pendulum:
    """gym/Pendulum-v1: angle (0 is upright) and angular velocity of a pendulum; torque (``pendulum.py``).

    Observations are (cos, sin, velocity). The reward is of the angle before the step; nothing terminates.
    """

    action_dim, discrete, state_dim = 1, False, 2
    GRAVITY, MASS, LENGTH = 10.0, 1.0, 1.0
    TIME_STEP, MAX_SPEED, MAX_TORQUE = 0.05, 8.0, 2.0

    def encode(self, obs: Tensor) -> Tensor:
        """[..., 3] -> [..., 2]."""
        return torch.stack((torch.atan2(obs[..., 1], obs[..., 0]), obs[..., 2]), -1)

    def observe(self, z: Tensor) -> Tensor:
        """[..., 2] -> [..., 3]."""
        return torch.stack((torch.cos(z[..., 0]), torch.sin(z[..., 0]), z[..., 1]), -1)

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 2], [..., 1] -> z [..., 2], reward [...], cont [...]."""
        angle, spin = z.unbind(-1)
        torque = self.MAX_TORQUE * action[..., 0].clamp(-1.0, 1.0)
        cost = _wrap(angle).square() + 0.1 * spin.square() + 0.001 * torque.square()
        gravity = 3 * self.GRAVITY / (2 * self.LENGTH) * torch.sin(angle)
        turned = gravity + 3.0 / (self.MASS * self.LENGTH**2) * torque
        spin = (spin + turned * self.TIME_STEP).clamp(-self.MAX_SPEED, self.MAX_SPEED)
        return ModelStep(torch.stack((angle + spin * self.TIME_STEP, spin), -1), -cost, _always(z, 1.0))


class _Valley(_Observed):
    """A car between two hills: position and velocity; a wall on the left, the goal on the right."""

    state_dim = 2
    GRAVITY, MAX_SPEED = 0.0025, 0.07
    MIN_POSITION, MAX_POSITION = -1.2, 0.6

    def _drive(self, z: Tensor, push: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        """Return the next state [..., 2] and whether the goal is reached [...]."""
        position, velocity = z.unbind(-1)
        velocity = velocity + push - self.GRAVITY * torch.cos(3 * position)
        velocity = velocity.clamp(-self.MAX_SPEED, self.MAX_SPEED)
        position = position + velocity
        stopped = (position <= self.MIN_POSITION) & (velocity < 0)
        position = position.clamp(self.MIN_POSITION, self.MAX_POSITION)
        velocity = torch.where(stopped, 0.0, velocity)
        return torch.stack((position, velocity), -1), (position >= goal) & (velocity >= 0)


class MountainCar(_Valley):
    """gym/MountainCar-v0: push left, not at all, or right; reward -1 per step, terminated at the goal (``mountain_car.py``)."""

    action_dim, discrete = 3, True
    FORCE, GOAL = 0.001, 0.5

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 2], [..., 3] -> z [..., 2], reward [...], cont [...]."""
        following, terminated = self._drive(z, self.FORCE * (action[..., 2] - action[..., 0]), self.GOAL)
        return ModelStep(following, _always(z, -1.0), _cont(terminated, z))


class MountainCarContinuous(_Valley):
    """gym/MountainCarContinuous-v0: any push; reward 100 at the goal, where it terminates, less a tenth of its square per step.

    Source: ``continuous_mountain_car.py``.
    """

    action_dim, discrete = 1, False
    POWER, GOAL = 0.0015, 0.45

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 2], [..., 1] -> z [..., 2], reward [...], cont [...]."""
        push = action[..., 0].clamp(-1.0, 1.0)
        following, terminated = self._drive(z, self.POWER * push, self.GOAL)
        return ModelStep(following, 100.0 * terminated.to(z.dtype) - 0.1 * push.square(), _cont(terminated, z))


class Acrobot:
    """gym/Acrobot-v1: two links hanging from a joint; torque -1, 0 or 1 between them (``acrobot.py``, the equations "book").

    State: angle of the first link (0 hangs down), angle of the second relative to it, and their velocities. Observations are
    (cos, sin) of both angles and the velocities. Reward -1 per step, and 0 for the one that lifts the tip above the line, which
    terminates. One step is one Runge-Kutta step of order 4.
    """

    action_dim, discrete, state_dim = 3, True, 4
    GRAVITY, TIME_STEP = 9.8, 0.2
    MASS, LENGTH, CENTRE, INERTIA = 1.0, 1.0, 0.5, 1.0  # of both links; the centre of mass from the joint
    MAX_SPEED_1, MAX_SPEED_2 = 4 * math.pi, 9 * math.pi

    def encode(self, obs: Tensor) -> Tensor:
        """[..., 6] -> [..., 4]."""
        return torch.stack((torch.atan2(obs[..., 1], obs[..., 0]), torch.atan2(obs[..., 3], obs[..., 2]), obs[..., 4], obs[..., 5]), -1)

    def observe(self, z: Tensor) -> Tensor:
        """[..., 4] -> [..., 6]."""
        first, second, spin_1, spin_2 = z.unbind(-1)
        return torch.stack((torch.cos(first), torch.sin(first), torch.cos(second), torch.sin(second), spin_1, spin_2), -1)

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 4], [..., 3] -> z [..., 4], reward [...], cont [...]."""
        torque, half = action[..., 2] - action[..., 0], self.TIME_STEP / 2
        k1 = self._change(z, torque)
        k2 = self._change(z + half * k1, torque)
        k3 = self._change(z + half * k2, torque)
        k4 = self._change(z + self.TIME_STEP * k3, torque)
        first, second, spin_1, spin_2 = (z + self.TIME_STEP / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind(-1)
        spin_1, spin_2 = spin_1.clamp(-self.MAX_SPEED_1, self.MAX_SPEED_1), spin_2.clamp(-self.MAX_SPEED_2, self.MAX_SPEED_2)
        following = torch.stack((_wrap(first), _wrap(second), spin_1, spin_2), -1)
        terminated = -torch.cos(first) - torch.cos(second + first) > 1.0
        cont = _cont(terminated, z)
        return ModelStep(following, -cont, cont)

    def _change(self, z: Tensor, torque: Tensor) -> Tensor:
        """Time derivative: [..., 4], [...] -> [..., 4]."""
        first, second, spin_1, spin_2 = z.unbind(-1)
        mass, length, centre, inertia, gravity = self.MASS, self.LENGTH, self.CENTRE, self.INERTIA, self.GRAVITY
        cosine, sine = torch.cos(second), torch.sin(second)
        d1 = mass * centre**2 + mass * (length**2 + centre**2 + 2 * length * centre * cosine) + 2 * inertia
        d2 = mass * (centre**2 + length * centre * cosine) + inertia
        phi2 = mass * centre * gravity * torch.sin(first + second)
        swing = mass * length * centre * sine
        phi1 = -swing * spin_2 * (spin_2 + 2 * spin_1) + (mass * centre + mass * length) * gravity * torch.sin(first) + phi2
        turned_2 = (torque + d2 / d1 * phi1 - swing * spin_1.square() - phi2) / (mass * centre**2 + inertia - d2.square() / d1)
        turned_1 = -(d2 * turned_2 + phi1) / d1
        return torch.stack((spin_1, spin_2, turned_1, turned_2), -1)


class PointMass(_Observed):
    """toy/pointmass: a point in the plane moves at a chosen velocity (:class:`worldmpc.envs.toy.PointMass`)."""

    action_dim, discrete, state_dim = 2, False, 2

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 2], [..., 2] -> z [..., 2], reward [...], cont [...]."""
        following = z + PointMassEnv.SPEED * action.clamp(-1.0, 1.0)
        return ModelStep(following, 1.0 - following.abs().mean(-1), _always(z, 1.0))


class Balance(_Observed):
    """toy/balance: an unstable point on a line (:class:`worldmpc.envs.toy.Balance`)."""

    action_dim, discrete, state_dim = 1, False, 1

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 1], [..., 1] -> z [..., 1], reward [...], cont [...]."""
        following = 1.1 * z + 0.1 * action.clamp(-1.0, 1.0)
        return ModelStep(following, _always(z, 1.0), _cont(following[..., 0].abs() > 1.0, z))


class LinearQuadratic(_Observed):
    """toy/linear-quadratic: linear dynamics, quadratic cost (:class:`worldmpc.envs.toy.LinearQuadratic`)."""

    action_dim, discrete, state_dim = 1, False, 2
    ((A11, A12), (A21, A22)), ((B1,), (B2,)) = LinearQuadraticEnv.A.tolist(), LinearQuadraticEnv.B.tolist()
    ((Q11, _), (_, Q22)), ((R11,),) = LinearQuadraticEnv.Q.tolist(), LinearQuadraticEnv.R.tolist()

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., 2], [..., 1] -> z [..., 2], reward [...], cont [...]."""
        (x1, x2), force = z.unbind(-1), action[..., 0].clamp(-1.0, 1.0)
        reward = -(self.Q11 * x1.square() + self.Q22 * x2.square() + self.R11 * force.square())
        following = (self.A11 * x1 + self.A12 * x2 + self.B1 * force, self.A21 * x1 + self.A22 * x2 + self.B2 * force)
        return ModelStep(torch.stack(following, -1), reward, _always(z, 1.0))


class Repeated:
    """Dynamics of decisions that repeat an action: rewards add up, and nothing moves or counts after termination."""

    def __init__(self, dynamics: KnownDynamics, repeat: int) -> None:
        self._dynamics, self._repeat = dynamics, repeat
        self.encode, self.observe = dynamics.encode, dynamics.observe
        self.action_dim, self.discrete, self.state_dim = dynamics.action_dim, dynamics.discrete, dynamics.state_dim

    def step(self, z: Tensor, action: Tensor) -> ModelStep:
        """[..., Z], [..., A] -> z [..., Z], reward [...], cont [...]."""
        z, total, cont = self._dynamics.step(z, action)
        for _ in range(self._repeat - 1):
            following, reward, more = self._dynamics.step(z, action)
            z = torch.where(cont[..., None] > 0, following, z)
            total, cont = total + cont * reward.masked_fill(cont == 0, 0.0), torch.where(cont == 0, cont, cont * more)
        return ModelStep(z, total, cont)


ANALYTIC: dict[str, type[KnownDynamics]] = {
    "gym/CartPole-v1": CartPole,
    "gym/Pendulum-v1": Pendulum,
    "gym/MountainCar-v0": MountainCar,
    "gym/MountainCarContinuous-v0": MountainCarContinuous,
    "gym/Acrobot-v1": Acrobot,
    "toy/pointmass": PointMass,
    "toy/balance": Balance,
    "toy/linear-quadratic": LinearQuadratic,
}
"""Canonical task name -> its dynamics."""


def analytic_dynamics(task: str, action_repeat: int = 1) -> KnownDynamics:
    """Return the known equations of a task, by its canonical name; a decision repeats its action as the environment does.

    Raises:
        ConfigError: a task without known equations.
    """
    if task not in ANALYTIC:
        raise ConfigError(
            f"dynamics.name: no known equations for {task}; there are for {', '.join(ANALYTIC)}; "
            "use dynamics=simulator for MuJoCo tasks, or agent=mbmpc, which learns them"
        )
    dynamics = ANALYTIC[task]()
    return dynamics if action_repeat == 1 else Repeated(dynamics, action_repeat)
