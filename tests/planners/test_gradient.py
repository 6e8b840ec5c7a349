"""Gradient ascent on plans: it climbs, keeps the best, and touches nothing else."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.planners.problems import LinearQuadratic, Z, make, return_of, run, small
from worldmpc.config import ModelConfig
from worldmpc.models import kernels
from worldmpc.models.packing import constant_parameters
from worldmpc.models.world_model import WorldModel
from worldmpc.planners import rollout_return
from worldmpc.planners.gradient import ascend, better
from worldmpc.planners.rules import RULES, WORST
from worldmpc.planners.sampling import SamplingPlanner

TARGET = torch.tensor([[[0.5, -0.2], [0.0, 0.9]], [[-0.7, 0.1], [0.3, 0.3]]])
"""[H, E, A] of which the distance counts."""


def distance(actions, scale=1.0):
    return -scale * (actions - TARGET).square().sum((0, 2))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_finds_the_top_whatever_the_scale(scale):
    actions, values = ascend(lambda actions: distance(actions, scale), torch.zeros(2, 2, 2), 150, 0.05)
    assert_close(actions, TARGET, atol=0.01, rtol=0)
    assert_close(values, distance(actions, scale))


def test_stays_within_bounds():
    actions, values = ascend(lambda actions: actions.sum((0, 2)), torch.zeros(3, 2, 1), 40, 0.05)
    assert_close(actions, torch.ones(3, 2, 1))
    assert actions.abs().max() <= 1
    assert_close(values, torch.full((2,), 3.0))


def test_steps_are_of_the_given_size():
    actions, _ = ascend(lambda actions: 7 * actions.sum((0, 2)), torch.zeros(3, 2, 1), 4, 0.05)
    assert_close(actions, torch.full((3, 2, 1), 0.2))


def test_the_best_seen_is_kept_for_each_environment():
    """Steps that are much too large: one environment starts at the top, the other may find something."""
    start = torch.stack((TARGET[:, 0], torch.zeros(2, 2)), 1)
    actions, values = ascend(distance, start, 3, 1.5)
    assert torch.equal(actions[:, 0], start[:, 0]) and values[0] == 0
    assert values[1] >= distance(start)[1]


def test_no_step_is_the_start():
    actions, values = ascend(distance, torch.zeros(2, 2, 2), 0, 0.1)
    assert torch.equal(actions, torch.zeros(2, 2, 2))
    assert_close(values, distance(torch.zeros(2, 2, 2)))


def test_numbers_that_are_not_finite():
    """The second environment has neither value nor gradient; the first does not notice."""

    def score(actions):
        return distance(actions) * torch.tensor([1.0, torch.nan])

    actions, values = ascend(score, torch.zeros(2, 2, 2), 100, 0.05)
    assert_close(actions[:, 0], TARGET[:, 0], atol=0.02, rtol=0)
    assert (actions[:, 1] == 0).all() and values[1] == WORST


def test_gradients_that_are_not_finite():
    """That of |a| as a square root at 0: there it does not exist, and all other actions climb nevertheless."""

    def score(actions):
        return distance(actions) - 0.1 * actions[0, :, 0].square().sqrt()

    actions, _ = ascend(score, torch.zeros(2, 2, 2), 100, 0.05)
    assert (actions[0, :, 0] == 0).all()
    assert_close(actions[1], TARGET[1], atol=0.02, rtol=0)


def test_a_cliff_is_not_jumped_off():
    """Return grows up to 0.5, behind which it is infinite."""

    def score(actions):
        total = actions.sum((0, 2))
        return torch.where(total > 0.5, torch.inf, total)

    actions, values = ascend(score, torch.zeros(1, 1, 1), 30, 0.05)
    assert 0.4 < values.item() <= 0.5
    assert_close(actions.sum((0, 2)), values)


def test_parameters_get_no_gradient():
    """Neither outside of no_grad nor inside; results need none."""
    net = nn.Linear(2, 1)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            _, values = ascend(lambda actions: net(actions).sum((0, 2)), torch.zeros(2, 2, 2), 5, 0.05)
        assert net.weight.grad is None and net.bias.grad is None and (values > 4 * net.bias).all()
        assert not values.requires_grad


def test_mapped_over_parameters():
    targets = torch.stack((TARGET, -TARGET))
    found, _ = torch.vmap(lambda target: ascend(lambda actions: -(actions - target).square().sum((0, 2)), torch.zeros(2, 2, 2), 150, 0.05))(
        targets
    )
    assert_close(found, targets, atol=0.01, rtol=0)


def test_better():
    one, two = torch.ones(2, 4, 3), torch.zeros(2, 4, 3)
    actions, values = better(one, torch.tensor([2.0, 0.0, torch.nan, torch.inf]), two, torch.tensor([1.0, 1.0, WORST, 1.0]))
    assert_close(actions[0, :, 0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert_close(values, torch.tensor([2.0, 1.0, WORST, 1.0]))


# Plans refined by gradient.


def test_gradient_refines_every_planner_that_samples():
    model = LinearQuadratic()
    for name in RULES:
        coarse = {"iterations": 1, "num_samples": 16, "num_elites": 4, "num_pi_trajs": 4, "horizon": 8}
        plain, refined = (run(make(name, gradient_steps=steps, **coarse), model, Z) for steps in (0, 40))
        assert (refined.value > plain.value).all(), name
        assert_close(return_of(model, Z, refined), refined.value)
        assert_close(refined.state.mean[:, :-1], refined.mean[:, 1:])
        assert torch.equal(refined.action, refined.mean[:, 0]) and refined.mean.abs().max() <= 1


def test_returns_without_gradient_are_not_used():
    class Fast(LinearQuadratic):
        def fast_returns(self, z, actions, discount, eps, critics):
            return rollout_return(LinearQuadratic(), z, actions, discount, eps, critics).detach()

    plans = [run(make(iterations=1, gradient_steps=10), model, Z) for model in (LinearQuadratic(), Fast())]
    assert_close(plans[0].mean, plans[1].mean)
    assert (plans[1].value > run(make(iterations=1), Fast(), Z).value).all()


def test_gradient_keeps_what_it_cannot_improve():
    """A return with the sign of its gradient turned round."""

    class Perverse(LinearQuadratic):
        def step(self, z, action):
            return super().step(z, 2 * action.detach() - action)

    plain, refined = (run(make(gradient_steps=steps), Perverse(), Z) for steps in (0, 5))
    assert_close(refined.value, plain.value)
    for field in ("action", "mean", "std"):
        assert torch.equal(getattr(refined, field), getattr(plain, field))
    assert torch.equal(refined.state.mean, plain.state.mean)


def world_model(terminates=False):
    config = ModelConfig(enc_dim=16, mlp_dim=32, latent_dim=16, num_enc_layers=2, num_q=3)
    model = WorldModel(config, 5, 2, terminates=terminates)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("terminates", [False, True])
def test_gradient_through_a_learned_model(terminates, monkeypatch):
    """Whose parameters are left as they were, in the scope that agents plan in; and with the library of networks, which has none."""
    monkeypatch.setattr(kernels, "NATIVE_FROM", 1)
    model, values = world_model(terminates), {}
    with constant_parameters(), torch.no_grad():
        z = model.encode(torch.randn(4, 5))
        for steps in (0, 10):
            planner = SamplingPlanner(dataclasses.replace(small("icem", False)[0].config, gradient_steps=steps), 2, 0.95, 3)
            plan = run(planner, model, z)
            values[steps] = plan.value
    assert (values[10] > values[0] + 1e-4).any() and not plan.value.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.q.parameters())


@pytest.mark.parametrize("name", RULES)
def test_plans_in_half_precision(name):
    """Of a learned model's products alone: noise and actions stay in single precision."""
    model, planner = world_model(), SamplingPlanner(small(name, False, gradient_steps=2)[0].config, 2, 0.95, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plan = run(planner, model, model.encode(torch.randn(4, 5)), explore=True)
    for value in (plan.action, plan.mean, plan.std, plan.state.mean, plan.state.elites):
        assert value.dtype == torch.float32
    assert plan.action.isfinite().all() and plan.value.isfinite().all()
