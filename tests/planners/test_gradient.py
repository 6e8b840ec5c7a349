"""Gradient ascent on plans: it climbs, keeps the best, and touches nothing else."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from worldmpc.planners.gradient import ascend, better
from worldmpc.planners.rules import WORST

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
    assert_close(actions, torch.ones(3, 2, 1)) and actions.abs().max() <= 1
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
        assert net.weight.grad is None and net.bias.grad is None and (values.detach() > net.bias.detach() * 2).all()
        assert values.requires_grad == enabled or not enabled


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
