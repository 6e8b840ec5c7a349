"""Optimisers of groups of parameters, against PyTorch's own."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.trees import differences
from worldmpc.config import OptimConfig
from worldmpc.functional import tree_where
from worldmpc.optim import GroupOptimizer

PREFIXES = {"slow.": 0.3, "first.": 1.0, "last.": 1.0}
NO = torch.zeros(())
YES = torch.ones(())


class Net(nn.Module):
    """Two groups, side by side in neither order nor memory, and a layer in none."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.slow, self.other, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.other(self.slow(self.first(x).tanh()).tanh()).tanh())


def make(seed=0, **config):
    net = Net(seed)
    return net, GroupOptimizer(net, PREFIXES, OptimConfig(**{"lr": 1e-2, "grad_clip_norm": 1.0} | config), eps=1e-6)


def batch(index):
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(index))


def loss_of(net, index):
    x = batch(index)
    return (net(x) - x.sum(-1, keepdim=True)).square().mean()


def train(net, optimizer, indices):
    for index in indices:
        optimizer.step(optimizer.gradients(loss_of(net, index)), NO)


def adam(net, lr=1e-2):
    rates = {"slow": 0.3 * lr, "first": lr, "last": lr}
    return torch.optim.Adam([{"params": getattr(net, name).parameters(), "lr": rate} for name, rate in rates.items()], eps=1e-6)


def everything(net, optimizer):
    """Copies of parameters, moments and step counts."""
    return copy.deepcopy({"net": dict(net.state_dict()), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
def test_steps_equal_adam_with_a_clipped_norm(clip):
    """With two learning rates and one norm; what belongs to no group stays."""
    net, optimizer = make(grad_clip_norm=clip)
    theirs = copy.deepcopy(net)
    reference, before = adam(theirs), copy.deepcopy(net.other)
    grouped = [parameter for group in reference.param_groups for parameter in group["params"]]
    for index in range(10):
        norm, skipped = optimizer.step(optimizer.gradients(loss_of(net, index)), NO)
        reference.zero_grad()
        loss_of(theirs, index).backward()
        expected = nn.utils.clip_grad_norm_(grouped, clip)
        reference.step()
        assert_close(norm, expected, rtol=1e-5, atol=0)
        assert skipped == 0
        for ours, other in zip(net.parameters(), theirs.parameters(), strict=True):
            assert_close(ours, other, rtol=1e-5, atol=1e-6)
    state, names = optimizer.state_dict(), dict(theirs.named_parameters())
    assert len(state) == 3 * 6
    for name in optimizer.names:
        for part in ("step", "exp_avg", "exp_avg_sq"):
            assert_close(state[f"{part}.{name}"], reference.state[names[name]][part], rtol=1e-4, atol=1e-8)
    assert not differences(net.other.state_dict(), before.state_dict()) and all(part.grad is None for part in net.parameters())


@pytest.mark.parametrize("how", ["asked", "nan", "inf", "overflow"])
def test_skipped_steps_change_nothing(how):
    net, optimizer = make()
    train(net, optimizer, range(3))
    before = everything(net, optimizer)
    gradients = optimizer.gradients(loss_of(net, 3))
    if how != "asked":
        gradients[1].view(-1)[2] = {"nan": float("nan"), "inf": float("inf"), "overflow": 3e38}[how]
        gradients[0].view(-1)[1] = {"overflow": 3e38}.get(how, 0.0)
    norm, skipped = optimizer.step(gradients, YES if how == "asked" else NO)
    assert skipped == 1 and norm.isfinite() == (how == "asked")
    assert not differences(everything(net, optimizer), before)
    train(net, optimizer, range(3, 6))
    uninterrupted = make()
    train(*uninterrupted, range(6))
    assert not differences(everything(net, optimizer), everything(*uninterrupted))


def test_state_continues_exactly():
    net, optimizer = make()
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file)
    other_net, other_optimizer = make(seed=1)
    train(other_net, other_optimizer, range(2))
    other_net.load_state_dict(saved["net"])
    other_optimizer.load_state_dict(saved["optimizer"])
    train(other_net, other_optimizer, range(3, 6))
    assert not differences(everything(other_net, other_optimizer), everything(net, optimizer))


def test_an_empty_state_is_that_before_the_first_step():
    net, optimizer = make()
    train(net, optimizer, range(3))
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    optimizer.load_state_dict({})
    assert all((value == 0).all() for value in optimizer.state_dict().values())
    train(net, optimizer, range(3, 6))
    fresh_optimizer = GroupOptimizer(fresh, PREFIXES, optimizer.config, eps=1e-6)
    train(fresh, fresh_optimizer, range(3, 6))
    assert not differences(everything(net, optimizer), everything(fresh, fresh_optimizer))


def by_copying(net, optimizer):
    return copy.deepcopy((net, optimizer))


def by_loading(net, optimizer):
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    return net, optimizer


def by_assigning(net, optimizer):
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return net, optimizer


def by_data(net, optimizer):
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    return net, optimizer


def by_some_data(net, optimizer):
    net.last.weight.data = net.last.weight.data.clone()
    return net, optimizer


@pytest.mark.parametrize("change", [by_copying, by_loading, by_assigning, by_data, by_some_data])
def test_steps_reach_the_parameters_wherever_they_have_gone(change):
    net, optimizer = make()
    train(net, optimizer, range(3))
    net, optimizer = change(net, optimizer)
    train(net, optimizer, range(3, 6))
    expected = make()
    train(*expected, range(6))
    assert not differences(everything(net, optimizer), everything(*expected))


def test_copies_are_independent():
    net, optimizer = make()
    train(net, optimizer, range(3))
    other_net, other_optimizer = copy.deepcopy((net, optimizer))
    before = everything(net, optimizer)
    train(other_net, other_optimizer, range(3, 6))
    assert not differences(everything(net, optimizer), before)
    train(net, optimizer, range(3, 6))
    assert not differences(everything(net, optimizer), everything(other_net, other_optimizer))


def test_parameters_keep_their_values_and_their_identity():
    net = Net()
    before, parameters = copy.deepcopy(net.state_dict()), list(net.parameters())
    GroupOptimizer(net, PREFIXES, OptimConfig())
    assert not differences(net.state_dict(), before)
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert all(parameter.is_leaf and parameter.requires_grad and parameter.is_contiguous() for parameter in net.parameters())


class Seeds(NamedTuple):
    nets: list[Net]
    optimizers: list[GroupOptimizer]
    together: GroupOptimizer


def stacked(count=3, **config):
    nets, optimizers = zip(*(make(seed, **config) for seed in range(count)), strict=True)
    return Seeds(list(nets), list(optimizers), GroupOptimizer.stack(optimizers))


def train_together(seeds, indices, skip=None):
    """Each seed on its own batches, its loss being that of its own parameters."""
    results = []
    for index in indices:
        total = torch.zeros(())
        for place, net in enumerate(seeds.nets):
            own = {name: value[place] for name, value in zip(seeds.together.names, seeds.together.params, strict=True)}
            x = batch(100 * place + index)
            total = total + (torch.func.functional_call(net, own, (x,)) - x.sum(-1, keepdim=True)).square().mean()
        results.append(seeds.together.step(seeds.together.gradients(total), torch.zeros(len(seeds.nets)) if skip is None else skip))
    return results


def test_stacked_seeds_equal_each_one_alone():
    """Each has its own clip; the modules and optimisers of the seeds see what happens to them all."""
    seeds = stacked(grad_clip_norm=0.3)
    results = train_together(seeds, range(5))
    for place, (net, optimizer) in enumerate(zip(seeds.nets, seeds.optimizers, strict=True)):
        alone, own = make(place, grad_clip_norm=0.3)
        for index, (norm, skipped) in enumerate(results):
            expected, _ = own.step(own.gradients(loss_of(alone, 100 * place + index)), NO)
            assert_close(norm[place], expected, rtol=1e-4, atol=0)
            assert skipped[place] == 0
        ours, theirs = everything(net, optimizer), everything(alone, own)
        for part in ours:
            for name, value in theirs[part].items():
                assert_close(ours[part][name], value, rtol=1e-4, atol=1e-6)


def test_no_seed_goes_on_without_the_others():
    seeds = stacked()
    train_together(seeds, range(2))
    before = [everything(net, optimizer) for net, optimizer in zip(seeds.nets, seeds.optimizers, strict=True)]
    (_, skipped), *_ = train_together(seeds, range(2, 3), skip=torch.tensor([0.0, 1.0, 0.0]))
    assert skipped.tolist() == [0, 1, 0]
    after = [everything(net, optimizer) for net, optimizer in zip(seeds.nets, seeds.optimizers, strict=True)]
    assert not any(differences(one, other) for one, other in zip(after, before, strict=True))


def test_states_of_stacked_seeds_continue_alone():
    seeds = stacked()
    train_together(seeds, range(3))
    for place, optimizer in enumerate(seeds.optimizers):
        net, own = make(place + 10)
        net.load_state_dict(seeds.nets[place].state_dict())
        own.load_state_dict(optimizer.state_dict())
        assert not differences(everything(net, own), everything(seeds.nets[place], optimizer))
    states = copy.deepcopy([everything(net, optimizer) for net, optimizer in zip(seeds.nets, seeds.optimizers, strict=True)])
    train_together(seeds, range(3, 5))
    again = stacked()
    for net, optimizer, state in zip(again.nets, again.optimizers, states, strict=True):
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    train_together(again, range(3, 5))
    for place in range(3):
        assert not differences(
            everything(again.nets[place], again.optimizers[place]), everything(seeds.nets[place], seeds.optimizers[place])
        )


class Pair(NamedTuple):
    left: torch.Tensor
    right: tuple[torch.Tensor, ...]


@pytest.mark.parametrize("nested", [Pair, lambda *parts: parts], ids=["named", "plain"])
def test_tree_where_chooses_row_by_row(nested):
    mask = torch.tensor([True, False, True])
    yes, no = (Pair(value(3), nested(value(3, 2), value(3, 2, 4))) for value in (torch.ones, torch.zeros))
    chosen = tree_where(mask, yes, no)
    assert isinstance(chosen, Pair) and isinstance(chosen.right, type(yes.right))
    for part in (chosen.left, *chosen.right):
        assert torch.equal(part, mask.float().view(-1, *[1] * (part.dim() - 1)).expand(part.shape))
