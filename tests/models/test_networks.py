"""Networks of modules, found out about once: whatever happens to a module counts the next time."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from tests.libraries import close
from worldmpc.models import packing
from worldmpc.models.nets import MLP, EnsembleMLP, NormedLinear, SimNorm
from worldmpc.models.networks import Network, plain
from worldmpc.models.packing import constant_parameters

X = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MLP(24, [24, 24], 5, **options)


def make_ensemble(seed=0):
    torch.manual_seed(seed)
    ensemble = EnsembleMLP(3, 24, [24, 24], 5)
    for parameter in ensemble.parameters():
        nn.init.normal_(parameter, std=0.3)
    return ensemble


def layers_of(net):
    """Its parameters as they are now."""
    layers = net if isinstance(net, MLP) else net.layers
    norms = [getattr(layer, "ln", None) for layer in layers]
    return [
        (layer.weight, layer.bias, *((norm.weight, norm.bias) if norm else (None, None))) for layer, norm in zip(layers, norms, strict=True)
    ]


def expected(net, x=X):
    """What PyTorch makes of the present parameters in double precision."""
    layers = [tuple(None if part is None else part.double() for part in layer) for layer in layers_of(net)]
    return plain((x.double(),), Network(layers, getattr(net, "groups", 0), getattr(net, "strided", False)), None, None)


def check(net, x=X):
    close(net(x), expected(net, x), 5e-6)


def slopes(function, net):
    return torch.autograd.grad(function(net).square().sum(), list(net.parameters()))


# The same network as long as nothing is replaced ------------------------------------------------------------------------------


def test_the_same_network_on_a_second_use(either):
    net, ensemble = make(), make_ensemble()
    assert net.network() is net.network() and ensemble.network() is ensemble.network()
    check(net)
    with constant_parameters():
        assert net.network() is net.network()
    with constant_parameters():
        assert net.network() is net.network()
    assert make().network() is not net.network()


def test_packed_in_the_same_room_from_scope_to_scope(fast, monkeypatch):
    packs, net = [], make()
    monkeypatch.setattr(packing, "pack", lambda *args, pack=packing.pack: packs.append(args) or pack(*args))
    for _ in range(3):
        with constant_parameters():
            net(X)
            net(X).sum().backward()
        net(X)
    assert len(packs) == 1


# Changes ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(net):
    net[1].weight.mul_(2)
    net[2].bias.add_(1)


def by_loading(net):
    net.load_state_dict({name: value + 0.3 for name, value in net.state_dict().items()})


def by_assigning(net):
    net.load_state_dict({name: value + 0.3 for name, value in net.state_dict().items()}, assign=True)


def by_optimiser(net):
    net(X).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()


def by_new_parameter(net):
    net[1].weight = nn.Parameter(torch.randn(24, 24))


def by_new_first_parameter(net):
    net[0].weight = nn.Parameter(torch.randn(24, 24))


def by_new_norm(net):
    net[1].ln = nn.LayerNorm(24)
    nn.init.constant_(net[1].ln.bias, 0.5)


def by_new_layer(net):
    net[1] = NormedLinear(24, 24)


def by_more_layers(net):
    net.insert(1, NormedLinear(24, 24))


def by_fewer_layers(net):
    del net[1]


def by_exchanging_layers(net):
    first, second = net[0], net[1]
    net[0], net[1] = second, first


def by_data(net):
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.3


def by_data_of_one(net):
    net[1].ln.bias.data = net[1].ln.bias.data + 0.3


def by_transposing(net):
    net[1].weight.data = net[1].weight.data.t()


def by_cutting(net):
    net[2].weight.data, net[2].bias.data = net[2].weight.data[:3], net[2].bias.data[:3]


def by_strides(net):
    net[1].weight.data = torch.randn(24, 48)[:, ::2]


REPLACED = [by_new_parameter, by_new_first_parameter, by_new_norm, by_new_layer, by_more_layers, by_fewer_layers, by_exchanging_layers]
REPLACED += [by_assigning, by_data, by_data_of_one]
STRANGE = [by_transposing, by_cutting, by_strides]
"""Those for which there may be no room to keep."""


@pytest.mark.parametrize("change", [in_place, by_loading, by_optimiser, *REPLACED, *STRANGE])
@pytest.mark.parametrize("scoped", [False, True])
def test_changes_are_seen(change, scoped, either):
    """Outside of scopes, and in a new one, with their gradients; those of second uses as well."""
    net = make()

    def scope():
        return constant_parameters() if scoped else nullcontext()

    with scope():
        net(X).sum().backward()
        before = net(X).detach()
    net.zero_grad()
    change(net)
    for _ in range(2):
        with scope():
            check(net)
            found = slopes(lambda net: net(X), net)
            for one, other in zip(found, slopes(expected, net), strict=True):
                close(one, other, 1e-5)
    after = net(X).detach()
    assert after.shape != before.shape or (after - before).abs().max() > 0.05


@pytest.mark.parametrize("change", REPLACED)
def test_a_new_network_where_something_was_replaced(change):
    net = make()
    before = net.network()
    change(net)
    assert net.network() is not before
    assert net.network() is net.network()


@pytest.mark.parametrize("change", [in_place, by_loading, by_optimiser])
def test_the_same_network_where_numbers_have_changed(change):
    net = make()
    before = net.network()
    change(net)
    assert net.network() is before


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, weight):
        return weight * self.scale


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("scoped", [False, True])
def test_parameters_computed_from_others(layer, scoped, either):
    """By a parametrisation, whose own parameters an optimiser changes in place."""
    net = make()
    parametrize.register_parametrization(net[layer], "weight", Scaled())
    for _ in range(2):
        with constant_parameters() if scoped else nullcontext():
            check(net)
            for one, other in zip(slopes(lambda net: net(X), net), slopes(expected, net), strict=True):
                close(one, other, 1e-5)
        with torch.no_grad():
            net[layer].parametrizations.weight[0].scale.sub_(2)


def test_another_simnorm(either):
    net = make(simnorm=SimNorm(5))
    check(net)
    net.groups = 1
    check(net)


def test_gradients_taken_away_and_given_back(either):
    net, x = make(), X.clone().requires_grad_()
    check(net)
    for wanted in (False, True):
        net.requires_grad_(wanted)
        net(x).sum().backward()
        assert all((parameter.grad is not None) == wanted for parameter in net.parameters())
    net[1].weight.requires_grad_(False)
    net.zero_grad()
    net(x).sum().backward()
    assert net[1].weight.grad is None and net[0].weight.grad is not None


def test_a_first_use_in_inference_mode(either):
    net, ensemble, x = make(), make_ensemble(), X.clone().requires_grad_()
    with torch.inference_mode():
        net(X), ensemble(X), ensemble(X, frozen=True)
    check(net)
    close(torch.autograd.grad(net(x).sum(), x)[0], torch.autograd.grad(expected(net, x).sum(), x)[0].double(), 5e-6)
    for frozen in (False, True):
        found = torch.autograd.grad(ensemble(x, frozen=frozen).sum(), x)[0]
        close(found, torch.autograd.grad(expected(ensemble, x).sum(), x)[0], 5e-6)


# Other modules and other precisions ---------------------------------------------------------------------------------------------


def test_copies_have_their_own(either):
    net = make()
    before = net(X).detach()
    other = copy.deepcopy(net)
    assert other.network() is not net.network()
    in_place(other)
    check(other)
    assert torch.equal(net(X), before)


def test_modules_that_share_parameters(either):
    net, other = make(), make(1)
    other[0].weight = net[0].weight
    with constant_parameters():
        for one in (net, other, net):
            check(one)


def test_frozen_parameters_are_constants(either):
    ensemble, x = make_ensemble(), X.clone().requires_grad_()
    frozen, learned = ensemble.network(frozen=True), ensemble.network()
    assert frozen is not learned and frozen is ensemble.network(True) and learned is ensemble.network()
    assert not any(part.requires_grad for layer in frozen.layers for part in layer if part is not None)
    assert all(one is other for one, other in zip(learned.params[:2], (ensemble.layers[0].weight, ensemble.layers[0].bias), strict=True))
    for scoped in (False, True):
        with constant_parameters() if scoped else nullcontext():
            for is_frozen in (True, False, True):
                ensemble.zero_grad()
                ensemble(x, frozen=is_frozen).sum().backward()
                assert all((parameter.grad is None) == is_frozen for parameter in ensemble.parameters())


@pytest.mark.parametrize("how", ["in place", "data", "new"])
def test_frozen_parameters_follow_those_that_learn(how, either):
    ensemble = make_ensemble()
    ensemble(X, frozen=True)
    weight = ensemble.layers[1].weight
    if how == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif how == "data":
        weight.data = 2 * weight.data
    else:
        ensemble.layers[1].weight = nn.Parameter(2 * weight.detach())
    close(ensemble(X, frozen=True), expected(ensemble), 5e-6)


def test_double_precision_and_back(either):
    net = make()
    check(net)
    assert net.double()(X.double()).dtype == torch.float64
    check(net.float())


def test_half_precision_and_back(either):
    net = make()
    single = net(X)
    with constant_parameters():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = net(X)
        assert torch.equal(net(X), single) and not torch.equal(half, single)


# Life and death -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [False, True])
def test_dropped_modules_are_freed(scoped, best):
    net, ensemble = make(), make_ensemble()
    with constant_parameters() if scoped else nullcontext():
        net(X).sum().backward()
        ensemble(X).sum().backward()
        ensemble(X, frozen=True)
    dead = [weakref.ref(one) for one in (net, net[0].weight, ensemble, ensemble.layers[0].weight)]
    del net, ensemble
    gc.collect()
    assert [one() for one in dead] == [None] * 4


def test_replaced_parameters_are_freed(best):
    net = make()
    net(X)
    dead = weakref.ref(net[1].weight)
    by_new_parameter(net)
    net(X)
    gc.collect()
    assert dead() is None


# Calls with other parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [False, True])
def test_functional_calls(scoped, either):
    """And the module's own parameters before and after them."""
    net, other = make(), make(1)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in other.named_parameters()}
    with constant_parameters() if scoped else nullcontext():
        check(net)
        value = torch.func.functional_call(net, parameters, (X,))
        close(value, expected(other), 5e-6)
        check(net)
        found = torch.autograd.grad(value.square().sum(), list(parameters.values()))
    for one, wanted in zip(found, slopes(expected, other), strict=True):
        close(one, wanted, 1e-5)


def test_functional_calls_with_some_other_parameters(either):
    net = make()
    check(net)
    other = copy.deepcopy(net)
    in_place(other)
    value = torch.func.functional_call(net, {"1.weight": other[1].weight, "2.bias": other[2].bias}, (X,))
    close(value, expected(other), 5e-6)
    check(net)


@pytest.mark.parametrize("names", ["", "1.weight", "0.weight"])
@pytest.mark.parametrize("scoped", [False, True])
def test_mapped_functional_calls(names, scoped, either):
    net, others = make(), [make(seed) for seed in (1, 2)]
    own = dict(net.named_parameters())
    stacked = {name: torch.stack([other.get_parameter(name).detach() for other in others]) for name in own if name.startswith(names)}
    net(X)
    with constant_parameters() if scoped and not names else nullcontext():
        value = torch.vmap(lambda parameters: torch.func.functional_call(net, parameters, (X,)))(stacked)
        check(net)
    for index, one in enumerate(value):
        alone = copy.deepcopy(net)
        alone.load_state_dict({name: value[index] for name, value in stacked.items()}, strict=False)
        close(one, expected(alone), 5e-6)


# Threads ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [False, True])
def test_two_threads_evaluate_one_module(scoped, either):
    """At the same time, each with inputs of its own, with gradients."""
    net, inputs = make(), [torch.randn(rows, 24) for rows in (20, 33)]

    def work(x):
        torch.set_num_threads(1)
        results = []
        for _ in range(10):
            with constant_parameters() if scoped else nullcontext():
                results += [(net(x).detach(), slopes(lambda net: net(x), net)) for _ in range(3)]
        return results

    wanted = [work(x)[0] for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for (value, gradients), results in zip(wanted, pool.map(work, inputs), strict=True):
            for found, others in results:
                assert torch.equal(found, value)
                assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def test_changes_are_seen_by_other_threads(either):
    net = make()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check, net).result()
        in_place(net)
        pool.submit(check, net).result()
        by_data(net)
        pool.submit(check, net).result()
    check(net)


def test_gradients_in_another_thread(either):
    net = make()
    wanted = slopes(lambda net: net(X), net)
    value = net(X)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: slopes(lambda net: value, net)).result()
    for one, other in zip(found, wanted, strict=True):  # PyTorch may sum in another order there
        assert_close(one, other, rtol=1e-5, atol=1e-6)
    check(net)
