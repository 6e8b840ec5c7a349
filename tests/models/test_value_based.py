"""Plain networks: what they compute, and where their weights come from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from worldmpc.models.value_based import (
    LOG_STD_MAX,
    LOG_STD_MIN,
    DeterministicActor,
    GaussianActor,
    QNetwork,
    StackedMLP,
    Temperature,
    initialise,
    mlp,
    polyak,
    target_of,
)


def ready(network, seed=0):
    initialise([network], seed)
    return network


@pytest.mark.parametrize("out_dim", [1, 3])
def test_stacked_networks_are_separate_ones(out_dim):
    """Each member is the network of its own weights, evaluated alone; the first members can be had without the rest."""
    stacked = ready(StackedMLP(3, 5, (8, 6), out_dim))
    obs, action = torch.randn(7, 4), torch.randn(7, 1)
    found = stacked(obs, action)
    assert found.shape == (3, 7, out_dim)
    for member in range(3):
        x = torch.cat((obs, action), -1)
        for number, layer in enumerate(stacked.layers):
            x = F.linear(x, layer.weight[member].T, layer.bias[member, 0])
            x = x.relu() if number < 2 else x
        assert_close(found[member], x)
    assert_close(stacked(obs, action, members=1), found[:1])


@pytest.mark.parametrize("out_dim", [1, 3])
def test_stacked_gradients_stay_with_their_member(out_dim):
    stacked, obs = ready(StackedMLP(2, 4, (8,), out_dim)), torch.randn(7, 4)
    gradients = torch.autograd.grad(stacked(obs)[1].square().sum(), list(stacked.parameters()))
    assert all(gradient[0].abs().max() == 0 and gradient[1].abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("hidden", [(8,), (8, 6), (8, 6, 4)])
def test_dueling_streams_are_identifiable(hidden):
    """Advantages have mean zero: the mean over actions is the value stream, and a constant on all advantages changes nothing."""
    network, obs = ready(QNetwork(4, 3, hidden, dueling=True)), torch.randn(7, 4)
    before = network(obs)
    assert before.shape == (7, 3)
    assert_close(before.mean(-1), network.value(network.trunk(obs))[:, 0])
    with torch.no_grad():
        network.advantage[-1].bias += 5.0
    assert_close(network(obs), before, atol=1e-5, rtol=1e-5)


def test_dueling_and_plain_share_nothing_but_the_shape():
    plain, dueling = QNetwork(4, 3, (8, 6)), QNetwork(4, 3, (8, 6), dueling=True)
    assert {name.split(".")[0] for name, _ in plain.named_parameters()} == {"q"}
    assert {name.split(".")[0] for name, _ in dueling.named_parameters()} == {"trunk", "value", "advantage"}


def test_weights_come_from_the_seed_alone():
    """Global randomness neither matters nor is used up; every weight is within PyTorch's default bounds, and none is left out."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    networks = [ready(QNetwork(4, 2, (32,)), seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (dict(network.named_parameters()) for network in networks)
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    stacked = ready(StackedMLP(2, 16, (400,), 1))
    for layer, bound in zip(stacked.layers, (1 / 4, 1 / 20), strict=True):
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
        assert abs(layer.weight.std() / bound - 3**-0.5) < 0.05
    assert not torch.equal(stacked.layers[0].weight[0], stacked.layers[0].weight[1])


def test_gaussian_actor():
    """Bounded, deterministic in its noise, the mean without noise, and its density is that of the change of variables."""
    actor, obs, eps = ready(GaussianActor(4, 2, (16,))), 10 * torch.randn(50, 4), torch.randn(50, 2)
    sample = actor(obs, eps)
    assert sample.action.abs().max() <= 1 and sample.log_std.min() >= LOG_STD_MIN and sample.log_std.max() <= LOG_STD_MAX
    assert_close(actor(obs, torch.zeros(50, 2)).action, sample.mean)
    gaussian = torch.distributions.Normal(sample.mean.atanh(), sample.log_std.exp())
    raw = sample.mean.atanh() + eps * sample.log_std.exp()
    exact = (gaussian.log_prob(raw) - torch.log1p(-raw.tanh().square())).sum(-1)
    inside = sample.action.abs().amax(-1) < 0.99
    assert inside.sum() > 10
    assert_close(sample.log_prob[inside], exact[inside], atol=2e-3, rtol=1e-3)
    assert_close(sample.entropy, -sample.log_prob)


def test_deterministic_actor_is_bounded():
    actor, obs = ready(DeterministicActor(4, 2, (16,))), torch.randn(9, 4)
    assert_close(actor(obs), torch.tanh(actor.net(obs)))
    assert actor(1e3 * obs).abs().max() <= 1


def test_temperature_is_learned_or_fixed():
    learned, fixed = Temperature(0.2, learned=True), Temperature(0.0, learned=False)
    assert_close(learned(), torch.tensor(0.2))
    assert [name for name, _ in learned.named_parameters()] == ["log_alpha"] and not list(fixed.parameters())
    assert fixed() == 0.0 and "alpha" in fixed.state_dict()


def test_polyak():
    """A step of 0.25 ends a quarter of the way, one of 0 nowhere, one of 1 at the source exactly; no gradient leads to targets."""
    source = ready(mlp(3, (4,), 2), 1)
    target = target_of(ready(mlp(3, (4,), 2), 2))
    assert not any(parameter.requires_grad for parameter in target.parameters())
    before = [parameter.clone() for parameter in target.parameters()]
    polyak(target, source, torch.tensor(0.25))
    for now, old, goal in zip(target.parameters(), before, source.parameters(), strict=True):
        assert_close(now, 0.75 * old + 0.25 * goal)
    after = [parameter.clone() for parameter in target.parameters()]
    polyak(target, source, torch.tensor(0.0))
    assert all(torch.equal(now, old) for now, old in zip(target.parameters(), after, strict=True))
    polyak(target, source, torch.tensor(1.0))
    assert all(torch.equal(now, goal) for now, goal in zip(target.parameters(), source.parameters(), strict=True))
