"""MPPI against models whose answer is known."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from worldmpc.config import PlannerConfig
from worldmpc.noise import NoiseStream
from worldmpc.planners import rollout_return
from worldmpc.planners.sampling import MPPI
from worldmpc.types import ModelStep, PlanState

CPU = torch.device("cpu")


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

    def best(self, z, horizon, discount):
        """First action of the discounted finite-horizon optimum, by backward Riccati recursion, for a state [2]."""
        A, B = (matrix.double().numpy() for matrix in (self.A, self.B))
        P, gain = np.zeros((2, 2)), None
        for _ in range(horizon):
            M = np.eye(2) + discount * P
            gain = np.linalg.solve(self.R * np.eye(1) + B.T @ M @ B, B.T @ M @ A)
            closed = A - B @ gain
            P = gain.T @ gain * self.R + closed.T @ M @ closed
        return -gain @ z.double().numpy()


class Gated(LinearQuadratic):
    """Reward 1 per step; a first action above 0 ends the episode with probability ``p``."""

    p = 1.0

    def step(self, z, action):
        return ModelStep(z, torch.ones(z.shape[:-1]), 1 - self.p * (action[..., 0] > 0).float())


def run(planner, model, z, explore=False, state=None, seed=0):
    noise = NoiseStream(seed, "plan").draw(planner.noise_specs(len(z)))
    return planner.plan(model, z, state or planner.init(len(z), CPU), noise, explore)


def make(**overrides):
    config = {"horizon": 4, "iterations": 12, "num_samples": 512, "num_elites": 32, "num_pi_trajs": 8, "temperature": 20.0, **overrides}
    return MPPI(PlannerConfig(**config), action_dim=1, discount=0.95, num_q=2)


def test_finds_the_linear_quadratic_optimum():
    planner, model = make(), LinearQuadratic()
    z = torch.tensor([[0.5, -0.1], [-0.3, 0.4], [0.0, 0.0]])
    plan = run(planner, model, z)
    for row, mean in zip(z, plan.mean, strict=True):
        assert mean[0].item() == pytest.approx(model.best(row, 4, 0.95).item(), abs=0.06)


def test_value_is_the_return_of_the_chosen_sequence_or_above_the_mean_plan():
    planner, model = make(), LinearQuadratic()
    z = torch.tensor([[0.5, -0.1]])
    plan = run(planner, model, z)
    of_mean = rollout_return(model, z, plan.mean.transpose(0, 1), 0.95, torch.zeros(1, 1), torch.tensor([0, 1]))
    assert plan.value[0] == pytest.approx(of_mean.item(), abs=0.02)


def test_actions_stay_within_bounds_and_std_within_its_own():
    planner = make(min_std=0.1, max_std=1.5, iterations=3)
    plan = run(planner, LinearQuadratic(), torch.randn(6, 2) * 50, explore=True)
    assert plan.action.abs().max() <= 1 and plan.mean.abs().max() <= 1 + 1e-6
    assert plan.std.min() >= 0.1 and plan.std.max() <= 1.5


def test_environments_do_not_see_each_other():
    """A plan for three states equals three plans with the same noise."""
    planner, model, z = make(iterations=3), LinearQuadratic(), torch.randn(3, 2)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(3))
    state = PlanState(torch.rand(3, 4, 1))
    together = planner.plan(model, z, state, noise, True)
    for env in range(3):
        one = slice(env, env + 1)
        mine = {
            "proposal": noise["proposal"][:, one], "samples": noise["samples"][:, :, one], "terminal": noise["terminal"][:, one],
            "critics": noise["critics"], "elite": noise["elite"][one], "action": noise["action"][one],
        }  # fmt: skip
        alone = planner.plan(model, z[one], PlanState(state.mean[one]), mine, True)
        for field in ("action", "mean", "std", "value"):
            assert_close(getattr(alone, field), getattr(together, field)[one])


def test_warm_start_is_the_shifted_plan():
    plan = run(make(iterations=2), LinearQuadratic(), torch.randn(2, 2))
    assert_close(plan.state.mean[:, :-1], plan.mean[:, 1:])
    assert (plan.state.mean[:, -1] == 0).all()


def test_warm_start_helps_a_single_iteration():
    planner, model, z = make(iterations=1, max_std=0.3, num_pi_trajs=0), LinearQuadratic(), torch.tensor([[3.0, 1.0]])
    cold = run(planner, model, z)
    warm = run(planner, model, z, state=PlanState(torch.full((1, 4, 1), -1.0)))
    assert warm.value > cold.value + 1


def test_exploration_adds_noise_to_the_action_alone():
    planner, model, z = make(iterations=3), LinearQuadratic(), torch.randn(5, 2)
    quiet, loud = run(planner, model, z), run(planner, model, z, explore=True)
    assert torch.equal(quiet.mean, loud.mean) and torch.equal(quiet.elite, loud.elite)
    assert torch.equal(quiet.action, quiet.elite) and not torch.equal(loud.action, loud.elite)


def test_bad_candidates_are_never_chosen_and_are_reported():
    class Broken(LinearQuadratic):
        def step(self, z, action):
            step = super().step(z, action)
            reward = torch.where(action[..., 0] > 0, torch.nan, step.reward)
            return step._replace(reward=torch.where(action[..., 0] < -0.9, torch.inf, reward))

    plan = run(make(), Broken(), torch.tensor([[-1.0, 0.0]]))
    assert plan.value.isfinite().all() and -0.9 <= plan.action[0, 0] <= 0 and plan.metrics["plan_bad"] > 0


def test_all_candidates_bad_still_gives_a_finite_action():
    class Hopeless(LinearQuadratic):
        def step(self, z, action):
            return super().step(z, action)._replace(reward=torch.full(z.shape[:-1], torch.nan))

    plan = run(make(), Hopeless(), torch.zeros(2, 2))
    assert plan.action.isfinite().all() and plan.mean.isfinite().all() and plan.metrics["plan_bad"] == 1


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_termination_weighs_everything_behind_it(p):
    """Three rewards of 1; ending at step 0 leaves 1 + (1 - p)(0.9 + 0.81)."""
    model = Gated()
    model.p = p
    actions = torch.tensor([[[-1.0], [1.0]], [[-1.0], [-1.0]], [[-1.0], [-1.0]]])
    returns = rollout_return(model, torch.zeros(2, 2), actions, 0.9, torch.zeros(2, 1), torch.tensor([0, 1]))
    assert_close(returns, torch.tensor([1 + 0.9 + 0.81, 1 + (1 - p) * (0.9 + 0.81)]))


def test_more_iterations_for_large_action_spaces():
    config = PlannerConfig()
    assert MPPI(config, 19, 0.99, 5).iterations == 6 and MPPI(config, 20, 0.99, 5).iterations == 8


def test_without_policy_proposals():
    plan = run(make(num_pi_trajs=0), LinearQuadratic(), torch.tensor([[0.5, -0.1]]))
    assert plan.mean[0, 0].item() == pytest.approx(LinearQuadratic().best(torch.tensor([0.5, -0.1]), 4, 0.95).item(), abs=0.06)
