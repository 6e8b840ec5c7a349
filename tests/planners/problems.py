"""Models whose optimum is known, and planners to try on them."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from worldmpc.config import PlannerConfig
from worldmpc.noise import NoiseStream
from worldmpc.planners import rollout_return
from worldmpc.planners.sampling import SamplingPlanner
from worldmpc.types import ModelStep

CPU = torch.device("cpu")
Z = torch.tensor([[0.5, -0.1], [-0.3, 0.4], [0.2, 0.3]])
"""States of which the linear-quadratic optimum is well inside the bounds."""


class LinearQuadratic:
    """z' = A z + B a, reward -(z' Q z' + a R a) at the new state; an exact model, with no value behind the horizon."""

    A = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
    B = torch.tensor([[0.0], [0.5]])
    R = 0.1

    def encode(self, obs):
        return obs

    def step(self, z, action):
        following = z @ self.A.T + action @ self.B.T
        return ModelStep(following, -following.square().sum(-1) - self.R * action.square().sum(-1), torch.ones(z.shape[:-1]))

    def propose(self, z, eps):
        return eps.clamp(-1, 1)

    def terminal_value(self, z, eps, critics):
        return torch.zeros(z.shape[:-1])

    def optimum(self, z, horizon, discount):
        """Actions [H, 1] of the discounted finite-horizon optimum, and their return, by backward Riccati recursion, for a state [2]."""
        A, B = (matrix.double().numpy() for matrix in (self.A, self.B))
        P, gains = np.zeros((2, 2)), []
        for _ in range(horizon):
            M = np.eye(2) + discount * P
            gains.append(np.linalg.solve(self.R * np.eye(1) + B.T @ M @ B, B.T @ M @ A))
            closed = A - B @ gains[-1]
            P = gains[-1].T @ gains[-1] * self.R + closed.T @ M @ closed
        z, actions = z.double().numpy(), []
        value = -z @ P @ z
        for gain in reversed(gains):
            actions.append(-gain @ z)
            z = A @ z + B @ actions[-1]
        return np.stack(actions), value

    def best(self, z, horizon, discount):
        """First action of the optimum, for a state [2]."""
        return self.optimum(z, horizon, discount)[0][0]


class Line:
    """Left, stay or right on the integers: 1 for being at 2, 5 for being at -3, nothing else; whoever reaches 3 is caught there.

    States are [position, 1 where caught]. Moving right pays at once; going left pays more, and only after three steps.
    """

    def encode(self, obs):
        return obs

    def step(self, z, action):
        free = 1 - z[..., 1]
        position = z[..., 0] + free * (action @ torch.tensor([-1.0, 0.0, 1.0]))
        caught = torch.maximum(z[..., 1], (position == 3).float())
        reward = free * ((position == 2).float() + 5 * (position == -3).float())
        return ModelStep(torch.stack((position, caught), -1), reward, 1 - caught)

    def propose(self, z, eps):
        """Right rather than left."""
        return F.one_hot((eps + torch.tensor([0.0, 0.0, 0.5])).argmax(-1), 3).float()

    def terminal_value(self, z, eps, critics):
        return torch.zeros(z.shape[:-1])

    def optimum(self, z, horizon, discount):
        """First action and return of the best of all sequences, for a state [2]."""
        actions = F.one_hot(torch.tensor(list(itertools.product(range(3), repeat=horizon))), 3).float().transpose(0, 1)
        values = returns(self, z.expand(actions.shape[1], -1), actions, discount)
        return actions[0, values.argmax()], values.max().item()


def returns(model, z, actions, discount):
    """Returns [...] of sequences [H, ..., A] through models that have no value."""
    return rollout_return(model, z, actions, discount, torch.zeros(actions.shape[1:]), torch.tensor([0, 1]))


def run(planner, model, z, explore=False, state=None, seed=0):
    noise = NoiseStream(seed, "plan").draw(planner.noise_specs(len(z)))
    return planner.plan(model, z, state or planner.init(len(z), CPU), noise, explore)


class Recorder:
    """Any model, and the candidates [H, E, S, A] and returns [E, S] of each iteration."""

    def __init__(self, model):
        self.model, self.actions, self.values = model, [], []

    def fast_returns(self, z, actions, discount, eps, critics):
        self.actions.append(actions)
        self.values.append(rollout_return(self.model, z, actions, discount, eps, critics))
        return self.values[-1]

    def __getattr__(self, name):
        return getattr(self.model, name)


def make(name="mppi", discrete=False, **overrides):
    sizes = {"horizon": 4, "iterations": 12, "num_samples": 512, "num_elites": 32, "num_pi_trajs": 8, "temperature": 20.0}
    config = PlannerConfig(name=name, **{**sizes, **overrides})
    return SamplingPlanner(config, action_dim=3 if discrete else 1, discount=0.95, num_q=2, discrete=discrete)


def small(name, discrete, **overrides):
    """A planner, a model and states, for properties that need no optimum."""
    planner = make(name, discrete, **{"iterations": 3, "num_samples": 40, "num_elites": 6, **overrides})
    return planner, Line() if discrete else LinearQuadratic(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]]) if discrete else Z * 4


def return_of(model, z, plan):
    """Returns [E] of following the executed plan, which is the executed action and then the warm start of the next."""
    return returns(model, z, torch.cat((plan.action[:, None], plan.state.mean[:, :-1]), 1).transpose(0, 1), 0.95)
