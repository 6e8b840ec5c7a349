"""Building blocks of the networks."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from worldmpc.models.nets import EnsembleMLP, SimNorm, init_weights, mlp


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


def make_ensemble(members=3):
    ensemble = EnsembleMLP(members, 6, [16, 16], 5)
    init_weights(ensemble, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return ensemble


def member(ensemble, index):
    """The same member as an ordinary MLP."""
    single = mlp(6, [16, 16], 5)
    single.load_state_dict({name.removeprefix("layers."): value[index] for name, value in ensemble.state_dict().items()})
    return single


def test_ensemble_equals_its_members():
    ensemble, x = make_ensemble(), torch.randn(2, 4, 6)
    outputs = ensemble(x)
    assert outputs.shape == (3, 2, 4, 5)
    for index in range(3):
        assert_close(outputs[index], member(ensemble, index)(x))


def test_ensemble_evaluates_only_the_chosen_heads():
    ensemble, x = make_ensemble(), torch.randn(4, 6)
    heads = torch.tensor([2, 0])
    assert_close(ensemble(x, heads), ensemble(x)[heads])
    gradient = torch.autograd.grad(ensemble(x, heads).sum(), ensemble.layers[0].weight)[0]
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_dropout_acts_before_the_first_norm():
    ensemble, x = make_ensemble(), torch.randn(4, 6)
    keep = (torch.rand(3, 4, 16) > 0.5).float() * 2
    outputs = ensemble(x, keep=keep)
    first, *rest = member(ensemble, 1)
    assert_close(outputs[1], torch.nn.Sequential(*rest)(F.mish(first.ln(F.linear(x, first.weight, first.bias) * keep[1]))))
    assert_close(ensemble(x, keep=torch.ones(3, 4, 16)), ensemble(x))


def test_initial_weights():
    network = mlp(50, [200, 200], 10)
    init_weights(network, torch.Generator().manual_seed(0))
    assert abs(network[1].weight.std() - 0.02) < 1e-3
    assert all((layer.bias == 0).all() for layer in network)
    assert (network[0].ln.weight == 1).all() and (network[0].ln.bias == 0).all()
