"""Optimisers of groups of parameters: against PyTorch's own, by every library and by none."""

import copy
import io
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.libraries import TORCH, close, loaded, use
from tests.trees import differences
from worldmpc.config import OptimConfig
from worldmpc.models import native
from worldmpc.models.nets import MLP, EnsembleMLP, SimNorm
from worldmpc.optim import GroupOptimizer, _joined

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
        optimizer.begin(index)
        optimizer.step(optimizer.gradients(loss_of(net, index)), NO)


def adam(net, lr=1e-2):
    rates = {"slow": 0.3 * lr, "first": lr, "last": lr}
    return torch.optim.Adam([{"params": getattr(net, name).parameters(), "lr": rate} for name, rate in rates.items()], eps=1e-6)


def everything(net, optimizer):
    """Copies of parameters, moments and step counts."""
    return copy.deepcopy({"net": dict(net.state_dict()), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
def test_steps_equal_adam_with_a_clipped_norm(clip, every):
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
def test_skipped_steps_change_nothing(how, every):
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


def test_state_continues_exactly(either):
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
def test_steps_reach_the_parameters_wherever_they_have_gone(change, either):
    net, optimizer = make()
    train(net, optimizer, range(3))
    net, optimizer = change(net, optimizer)
    train(net, optimizer, range(3, 6))
    expected = make()
    train(*expected, range(6))
    assert not differences(everything(net, optimizer), everything(*expected))


def test_parameters_that_move_under_a_loss_are_refused(either):
    """The backward pass would read memory that is gone."""
    net, optimizer = make()
    train(net, optimizer, range(2))
    loss = loss_of(net, 2)
    by_some_data(net, optimizer)
    with pytest.raises(RuntimeError, match="within an update"):
        optimizer.gradients(loss)


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


def test_stacked_seeds_equal_each_one_alone(every):
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


def test_no_seed_goes_on_without_the_others(every):
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


# By the library and by PyTorch ----------------------------------------------------------------------------------------------


class Sized(nn.Module):
    """Parameters of given sizes, each a group with a learning rate of its own."""

    def __init__(self, sizes):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.parts = nn.ParameterList(torch.randn(size, generator=generator) for size in sizes)


SIZES = (1, 17, 4095, 4097, 20000)
"""One number, and parts of sums that are and are not full."""


def sized(sizes=SIZES, seeds=None, eps=1e-8, **config):
    rates = {f"parts.{index}": 1.0 / (index + 1) for index in range(len(sizes))}
    config = OptimConfig(**{"lr": 1e-2, "grad_clip_norm": 1.0} | config)
    optimizers = [GroupOptimizer(Sized(sizes), rates, config, eps=eps) for _ in range(seeds or 1)]
    return optimizers[0] if seeds is None else GroupOptimizer.stack(optimizers)


def random_gradients(optimizer, index=0, scale=1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return [scale * torch.randn(flat.shape, generator=generator) for flat in optimizer.flats]


def state_of(optimizer) -> dict[str, Tensor]:
    groups = {"param": optimizer.flats, "exp_avg": optimizer.exp_avgs, "exp_avg_sq": optimizer.exp_avg_sqs, "step": optimizer.steps}
    return {f"{name}.{index}": value for name, values in groups.items() for index, value in enumerate(values)}


def copied(gradients):
    """The plain step scales them in place."""
    return [gradient.clone() for gradient in gradients]


def skip_of(optimizer):
    return torch.zeros(optimizer.flats[0].shape[:-1])


def agree(one, other, results, wanted):
    """Norms, what was skipped, and everything that is kept."""
    assert torch.equal(results[1], wanted[1])
    assert_close(results[0], wanted[0], rtol=2e-6, atol=0, equal_nan=True)
    theirs = state_of(other)
    for name, value in state_of(one).items():
        assert_close(value, theirs[name], rtol=2e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("seeds", [None, 1, 3])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_steps_of_both_kinds_agree(seeds, clip, calls):
    """Through several, with gradients of all sizes, and learning rates that change."""
    ours = sized(seeds=seeds, grad_clip_norm=clip)
    theirs = copy.deepcopy(ours)
    for index, scale in enumerate((1.0, 1e-3, 100.0, 1e-12, 1.0)):
        for optimizer in (ours, theirs):
            optimizer.lrs[1].mul_(1.1)
        gradients = random_gradients(ours, index, scale)
        results = ours.step(copied(gradients), skip_of(ours))
        agree(ours, theirs, results, theirs._plain_step(copied(gradients), skip_of(theirs)))
    assert calls == ["adam"] * 5 and all(step == 5 for step in ours.steps)


def test_steps_equal_the_formulas_of_adam(every):
    """In double precision, with a clip that is active in half of the steps."""
    optimizer = sized(grad_clip_norm=150.0)
    params = [flat.double() for flat in optimizer.flats]
    means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
    for index in range(1, 7):
        gradients = random_gradients(optimizer, index, 2.0 if index % 2 else 0.5)
        wanted = torch.cat(gradients).double().norm()
        norm, skipped = optimizer.step(copied(gradients), NO)
        assert (wanted > 150) == (index % 2) and skipped == 0
        assert_close(norm.double(), wanted, rtol=1e-6, atol=0)
        for place, gradient in enumerate(gradients):
            gradient = gradient.double() * min(1.0, 150 / wanted.item())
            means[place] = 0.9 * means[place] + 0.1 * gradient
            squares[place] = 0.999 * squares[place] + 0.001 * gradient.square()
            root = (squares[place] / (1 - 0.999**index)).sqrt()
            params[place] -= 1e-2 / (place + 1) * means[place] / (1 - 0.9**index) / (root + 1e-8)
            close(optimizer.flats[place], params[place], 2e-6)
            close(optimizer.exp_avgs[place], means[place], 2e-6)
            close(optimizer.exp_avg_sqs[place], squares[place], 2e-6)


BAD = {
    "asked for": (0.0, 1.0),
    "nan": (math.nan, 0.0),
    "inf": (math.inf, 0.0),
    "-inf": (-math.inf, 0.0),
    "overflow": (1e25, 0.0),
    "nan and asked for": (math.nan, 1.0),
}


@pytest.mark.parametrize(("bad", "asked"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("place", [(0, 0), (1, 16), (3, 4096), (4, 8191)], ids=str)
def test_bad_gradients_are_not_applied(bad, asked, place, every):
    """Wherever they are; the next good ones are as if nothing had happened."""
    ours, undisturbed = sized(), sized()
    for optimizer in (ours, undisturbed):
        optimizer.step(random_gradients(optimizer), NO)
    before, gradients = copy.deepcopy(state_of(ours)), random_gradients(ours, 1)
    if bad:
        gradients[place[0]][place[1]] = bad
    norm, skipped = ours.step(gradients, torch.tensor(asked))
    assert skipped == 1 and norm.isfinite() == (bad == 0)
    assert not differences(state_of(ours), before)
    for optimizer in (ours, undisturbed):
        optimizer.step(random_gradients(optimizer, 2), NO)
    assert not differences(state_of(ours), state_of(undisturbed))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_bad_seed_stops_all_and_is_named(bad, seed, every):
    ours = sized(seeds=3)
    ours.step(random_gradients(ours), torch.zeros(3))
    before, gradients = copy.deepcopy(state_of(ours)), random_gradients(ours, 1)
    wanted = torch.cat(gradients, -1).norm(dim=-1)
    gradients[2][seed, 77] = bad
    norm, skipped = ours.step(gradients, torch.zeros(3))
    expected = torch.zeros(3)
    expected[seed] = 1
    assert torch.equal(skipped, expected) and torch.equal(norm.isfinite(), expected == 0)
    assert_close(norm[expected == 0], wanted[expected == 0], rtol=1e-5, atol=0)
    assert not differences(state_of(ours), before)


def test_each_seed_has_its_own_clip(every):
    ours = sized(seeds=2, grad_clip_norm=1.0)
    gradients = random_gradients(ours)
    for gradient in gradients:
        gradient[1] = 1e-4 * gradient[0]
    unclipped = [gradient[1].clone() for gradient in gradients]
    norm, _ = ours.step(gradients, torch.zeros(2))
    assert norm[0] > 1 > norm[1]
    for mean, gradient in zip(ours.exp_avgs, unclipped, strict=True):
        assert_close(mean[0], 0.1 * gradient / norm[1] * (norm[1] * 1e4 / norm[0]), rtol=1e-4, atol=1e-10)
        assert_close(mean[1], 0.1 * gradient, rtol=1e-5, atol=1e-12)


def test_gradients_of_zero(every):
    """At first they change nothing but the count; later the means go on."""
    ours = sized()
    before = [flat.clone() for flat in ours.flats]
    norm, skipped = ours.step([torch.zeros_like(flat) for flat in ours.flats], NO)
    assert norm == 0 and skipped == 0 and all(step == 1 for step in ours.steps)
    assert all(torch.equal(flat, was) for flat, was in zip(ours.flats, before, strict=True))
    assert all((moment == 0).all() for moment in (*ours.exp_avgs, *ours.exp_avg_sqs))
    ours.step(random_gradients(ours), NO)
    means, before = [mean.clone() for mean in ours.exp_avgs], [flat.clone() for flat in ours.flats]
    ours.step([torch.zeros_like(flat) for flat in ours.flats], NO)
    for mean, was, flat, old in zip(ours.exp_avgs, means, ours.flats, before, strict=True):
        assert_close(mean, 0.9 * was)
        assert (flat != old).any()


def test_a_rate_of_zero_changes_moments_alone(every):
    ours = sized()
    ours.lrs[2].zero_()
    before = [flat.clone() for flat in ours.flats]
    ours.step(random_gradients(ours), NO)
    changed = [not torch.equal(flat, was) for flat, was in zip(ours.flats, before, strict=True)]
    assert changed == [True, True, False, True, True] and (ours.exp_avgs[2] != 0).all()


@pytest.mark.parametrize("seeds", [None, 3])
def test_any_number_of_threads(seeds, calls):
    """Norms and parameters are the same bits."""
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        optimizer = sized((3, 30001, 50000), seeds, grad_clip_norm=0.3)
        norms = [optimizer.step(random_gradients(optimizer, index), skip_of(optimizer))[0] for index in range(3)]
        found.append({**state_of(optimizer), "norm": torch.stack(norms)})
    assert not differences(found[0], found[1]) and not differences(found[0], found[2])
    assert len(calls) == 9


def test_addresses_have_no_influence_on_steps(calls):
    found = []
    for offset in (0, 1, 7):
        optimizer = sized()
        moved = [torch.empty(part.numel() + offset)[offset:].copy_(part) for part in random_gradients(optimizer)]
        optimizer.step(moved, NO)
        found.append(state_of(optimizer))
    assert not differences(found[0], found[1]) and not differences(found[0], found[2])


def test_gradients_and_requests_stay_as_they_are(calls):
    optimizer, skip = sized(seeds=2, grad_clip_norm=0.1), torch.tensor([0.0, 1.0])
    gradients = random_gradients(optimizer)
    before = copied(gradients)
    _, skipped = optimizer.step(gradients, skip)
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))
    assert skip.tolist() == skipped.tolist() == [0, 1] and skipped.data_ptr() != skip.data_ptr()


def test_requests_lie_in_memory_as_they_like(every):
    optimizer = sized(seeds=3)
    before = copy.deepcopy(state_of(optimizer))
    for skip in (torch.tensor([0.0, 9, 1, 9, 0, 9])[::2], torch.ones(()).expand(3)):
        _, skipped = optimizer.step(random_gradients(optimizer), skip)
        assert torch.equal(skipped, skip)
    assert not differences(state_of(optimizer), before)


def test_many_groups_are_left_to_torch(best):
    """And are the same to the user."""
    sizes = (5,) * (native.MAX_GROUPS + 1)
    optimizer = sized(sizes)
    theirs = copy.deepcopy(optimizer)
    gradients = random_gradients(optimizer)
    agree(optimizer, theirs, optimizer.step(copied(gradients), NO), theirs._plain_step(copied(gradients), NO))
    assert not best
    sized(sizes[1:]).step(gradients[1:], NO)
    assert len(best) == (0 if isinstance(native.library(), str) else 1)


def test_double_precision_is_left_to_torch(best, monkeypatch):
    optimizer = sized((5, 17))
    asked = []
    monkeypatch.setattr(GroupOptimizer, "_plain_step", lambda self, gradients, skip: asked.append(gradients))
    for gradients, skip in ((random_gradients(optimizer), NO.double()), ([part.double() for part in random_gradients(optimizer)], NO)):
        optimizer.step(gradients, skip)
    optimizer.exp_avgs[1] = optimizer.exp_avgs[1].double()
    optimizer.step(random_gradients(optimizer), NO)
    assert len(asked) == 3 and not best


def test_steps_change_from_one_kind_to_the_other(fast):
    """A run goes on where there is no library."""
    ours, theirs = sized(), sized()
    for index in range(4):
        with pytest.MonkeyPatch.context() as patch:
            if index % 2:
                use(patch, TORCH)
            results = ours.step(random_gradients(ours, index), NO)
        agree(ours, theirs, results, theirs._plain_step(random_gradients(theirs, index), NO))


def test_libraries_take_the_same_steps():
    found = []
    for variant in native.VARIANTS:
        if not isinstance(loaded(variant), str):
            optimizer = sized()
            with pytest.MonkeyPatch.context() as patch:
                use(patch, variant)
                for index in range(3):
                    optimizer.step(random_gradients(optimizer, index), NO)
            found.append(state_of(optimizer))
    for other in found[1:]:
        for name, value in other.items():
            assert_close(value, found[0][name], rtol=2e-5, atol=1e-7)


# Gradients behind each other --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Networks of the library between ordinary modules."""

    def __init__(self):
        super().__init__()
        self.before, self.encoder, self.between = nn.Linear(7, 9), MLP(9, [17, 17], 16, SimNorm(8)), nn.Linear(16, 12, bias=False)
        self.critics, self.scale, self.convolution = EnsembleMLP(3, 12, [19, 19], 5), nn.Parameter(torch.tensor([0.7])), nn.Conv1d(3, 4, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        z = self.between(self.encoder(self.before(x)))
        return self.scale * self.convolution(self.critics(z).transpose(0, 1))


@pytest.mark.parametrize(
    "groups",
    [{"": 1.0}, {"encoder.": 0.3, "before.": 1.0, "between.": 1.0, "critics.": 1.0}, {"scale": 0.3, "convolution.": 0.5, "critics.": 0.1}],
    ids=["all", "two", "three"],
)
@pytest.mark.parametrize("total", [lambda y: y.square().sum(), lambda y: y.sum(), lambda y: y[:0].sum()], ids=["square", "sum", "none"])
def test_gradients_are_those_of_each_parameter_in_order(groups, total, every):
    net, x = Mixed(), torch.randn(20, 7)
    optimizer = GroupOptimizer(net, groups, OptimConfig())
    found = optimizer.gradients(total(net(x)))
    assert [gradient.shape for gradient in found] == [flat.shape for flat in optimizer.flats]
    wanted = torch.autograd.grad(total(net(x)), [net.get_parameter(name) for name in optimizer.names])
    for one, other in zip(optimizer.split(found), wanted, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_a_step_within_a_network(every):
    """Of some of its parameters, between which there are others."""
    net, x = Mixed(), torch.randn(20, 7)
    optimizer = GroupOptimizer(net, {"encoder.0.": 1.0, "encoder.2.": 1.0, "critics.layers.1.ln": 1.0}, OptimConfig())
    found = optimizer.gradients(net(x).square().sum())
    wanted = torch.autograd.grad(net(x).square().sum(), [net.get_parameter(name) for name in optimizer.names])
    for one, other in zip(optimizer.split(found), wanted, strict=True):
        close(one, other, 1e-6)


ROOM = torch.arange(24.0)
ARRAY = np.arange(10, dtype=np.float32)
JOINED = {
    "one": ([ROOM[3:9]], 1),
    "neighbours": ([ROOM[3:9], ROOM[9:15].view(2, 3), ROOM[15:16]], 1),
    "neighbours of one number": ([ROOM[3], ROOM[4], ROOM[5]], 1),
    "with a gap": ([ROOM[3:9], ROOM[10:15]], 2),
    "overlapping": ([ROOM[3:9], ROOM[8:15]], 2),
    "in another order": ([ROOM[9:15], ROOM[3:9]], 2),
    "twice": ([ROOM[3:9], ROOM[3:9]], 2),
    "a column behind": ([ROOM[:4], ROOM[4:].view(4, 5)[:, 0]], 2),
    "something behind a column": ([ROOM[4:].view(4, 5)[:, 0], ROOM[8:12]], 2),
    "transposed": ([ROOM[:12].view(3, 4), ROOM[12:].view(3, 4).t(), ROOM[12:]], 3),
    "expanded": ([ROOM[:4], ROOM[4:5].expand(3), ROOM[5:9]], 3),
    "others between": ([ROOM[:4], torch.ones(2, 2), ROOM[4:8], ROOM[8:9]], 3),
    "nothing between": ([ROOM[:4], torch.ones(0), ROOM[4:8]], 3),
    "neighbours that do not belong together": ([torch.from_numpy(ARRAY[:4]), torch.from_numpy(ARRAY[4:])], 2),
}


@pytest.mark.parametrize(("tensors", "pieces"), JOINED.values(), ids=JOINED)
def test_tensors_that_lie_behind_each_other_are_one(tensors, pieces):
    joined = _joined(tensors)
    assert torch.equal(torch.cat(joined), torch.cat([tensor.reshape(-1) for tensor in tensors]))
    assert len(joined) == pieces and all(part.dim() == 1 for part in joined)


def test_a_parameter_of_one_number():
    net = nn.ParameterDict({"scale": torch.tensor(0.7), "others": torch.ones(3)})
    optimizer = GroupOptimizer(net, {"": 1.0}, OptimConfig(lr=0.1))
    optimizer.step(optimizer.gradients(net["scale"] * net["others"].sum()), NO)
    assert_close(net["scale"].detach(), torch.tensor(0.6), rtol=1e-4, atol=0)


def test_gradients_of_a_network_are_one_piece(fast):
    net = MLP(9, [17, 17], 16, SimNorm(8))
    found = torch.autograd.grad(net(torch.randn(20, 9)).square().sum(), list(net.parameters()))
    assert len(_joined(found)) == 1
