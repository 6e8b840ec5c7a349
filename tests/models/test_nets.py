"""Building blocks of the networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from worldmpc.models import kernels
from worldmpc.models.nets import MLP, EnsembleMLP, NormedLinear, SimNorm, init_weights

ROWS = [(), (4,), (3, 5), (40,)]


@pytest.fixture(params=["as it is", "by PyTorch"])
def way(request, monkeypatch):
    """Networks as this machine evaluates them, and by PyTorch's functions."""
    if request.param == "by PyTorch":
        monkeypatch.setattr(kernels, "NATIVE_FROM", 1 << 60)


def randomised(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3).add_(parameter.dim() == 1)
    return network


def layer_by_layer(network, x, simnorm=None):
    """An MLP as its modules say."""
    *hidden, last = network
    for layer in hidden:
        x = F.mish(layer.ln(nn.Linear.forward(layer, x)))
    x = nn.Linear.forward(last, x)
    return x if simnorm is None else simnorm(last.ln(x))


@pytest.mark.parametrize("layout", ["strided", "consecutive"])
def test_simnorm_groups_are_distributions(layout):
    z = SimNorm(8, layout)(torch.randn(5, 7, 64) * 3)
    groups = z.unflatten(-1, (8, -1)).sum(-2) if layout == "strided" else z.unflatten(-1, (-1, 8)).sum(-1)
    assert z.shape == (5, 7, 64) and (z > 0).all()
    assert_close(groups, torch.ones_like(groups))


def test_simnorm_layouts_are_permutations_of_each_other():
    x = torch.randn(4, 32)
    order = torch.arange(32).view(4, 8).T.flatten()  # strided place -> consecutive place
    assert_close(SimNorm(8, "strided")(x[:, order]), SimNorm(8, "consecutive")(x)[:, order])


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("simnorm", [None, SimNorm(4, "strided"), SimNorm(8, "consecutive")], ids=["linear", "strided", "consecutive"])
def test_mlp_is_its_layers_one_after_the_other(rows, simnorm, way):
    network, x = randomised(MLP(6, [17, 24], 16, simnorm)), torch.randn(*rows, 6)
    expected = layer_by_layer(network, x, simnorm)
    assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    assert_close(network(x[..., :4], x[..., 4:]), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(network(x[..., :4], x[..., 4:]).square().sum(), list(network.parameters()))
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), list(network.parameters())), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_parameters_of_an_mlp_have_the_names_of_its_layers():
    network = MLP(6, [17], 16, SimNorm())
    assert [type(layer) for layer in network] == [NormedLinear, NormedLinear]
    assert [type(layer) for layer in MLP(6, [17], 16)] == [NormedLinear, nn.Linear]
    assert list(network.state_dict()) == [f"{index}.{name}" for index in (0, 1) for name in ("weight", "bias", "ln.weight", "ln.bias")]
    assert network[1].weight.shape == (16, 17) and len(list(MLP(6, [], 16).parameters())) == 2


@pytest.mark.parametrize("steps", [1, 3])
def test_mlp_rolls_out_its_own_results(steps, way):
    network = randomised(MLP(18, [24], 16, SimNorm(8)))
    z, actions = torch.randn(3, 5, 16).softmax(-1).requires_grad_(), torch.randn(steps, 3, 5, 2)
    zs = [z]
    for action in actions:
        zs.append(network(zs[-1], action))
    found, expected = network.rollout(z, actions), torch.stack(zs)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs, grad = [z, *network.parameters()], torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def member(ensemble, index):
    """The same member as an ordinary MLP."""
    single = MLP(6, [16, 16], 5)
    single.load_state_dict({name.removeprefix("layers."): value[index] for name, value in ensemble.state_dict().items()})
    return single


def make_ensemble():
    return randomised(EnsembleMLP(3, 6, [16, 16], 5))


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_ensemble_equals_its_members(rows, way):
    ensemble, x = make_ensemble(), torch.randn(*rows, 6)
    outputs = ensemble(x)
    assert outputs.shape == (3, *rows, 5)
    for index in range(3):
        assert_close(outputs[index], member(ensemble, index)(x), rtol=1e-5, atol=1e-5)
    assert_close(ensemble(x[..., :5], x[..., 5:]), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_ensemble_evaluates_only_the_chosen_heads(rows, way):
    ensemble, x = make_ensemble(), torch.randn(*rows, 6)
    heads = torch.tensor([2, 0])
    assert_close(ensemble(x, heads=heads), ensemble(x)[heads], rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(ensemble(x, heads=heads).square().sum(), list(ensemble.parameters())):
        assert (gradient[1] == 0).all() and (gradient[0] != 0).any() and (gradient[2] != 0).any()


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_dropout_acts_before_the_first_norm(rows, way):
    ensemble, x = make_ensemble(), torch.randn(*rows, 6)
    keep = (torch.rand(3, *rows, 16) > 0.5).float() * 2
    outputs = ensemble(x, keep=keep)
    first, *rest = member(ensemble, 1)
    hidden = F.mish(first.ln(nn.Linear.forward(first, x) * keep[1]))
    assert_close(outputs[1], layer_by_layer(rest, hidden), rtol=1e-5, atol=1e-5)
    assert_close(ensemble(x, keep=torch.ones(3, *rows, 16)), ensemble(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_frozen_parameters_are_constants(rows, way):
    """The same numbers, and gradients that reach the input alone."""
    ensemble, z, action = make_ensemble(), torch.randn(*rows, 4), torch.randn(*rows, 2, requires_grad=True)
    heads = torch.tensor([1, 2])
    frozen, free = ensemble(z, action, heads=heads, frozen=True), ensemble(z, action, heads=heads)
    assert torch.equal(frozen, free)
    assert_close(
        torch.autograd.grad(frozen.square().sum(), action, retain_graph=True),
        torch.autograd.grad(free.square().sum(), action),
        rtol=1e-5,
        atol=1e-5,
    )
    frozen.sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in ensemble.parameters())
    assert not ensemble(z, action.detach(), frozen=True).requires_grad


def test_initial_weights():
    network = MLP(50, [200, 200], 10)
    init_weights(network, torch.Generator().manual_seed(0))
    assert abs(network[1].weight.std() - 0.02) < 1e-3
    assert all((layer.bias == 0).all() for layer in network)
    assert (network[0].ln.weight == 1).all() and (network[0].ln.bias == 0).all()
    ensemble = EnsembleMLP(3, 50, [200], 10)
    init_weights(randomised(ensemble), torch.Generator().manual_seed(0))
    assert abs(ensemble.layers[0].weight.std() - 0.02) < 1e-3 and (ensemble.layers[1].bias == 0).all()
    assert (ensemble.layers[0].ln.weight == 1).all() and (ensemble.layers[0].ln.bias == 0).all()
