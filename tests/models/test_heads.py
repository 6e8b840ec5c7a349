"""Gaussian policies: the definition, and the squashed one equal to it in double precision by every library and by none."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from tests.libraries import close, skipping, transposed
from worldmpc.models import kernels, native
from worldmpc.models.heads import clipped_gaussian, gaussian_log_prob, plain_squashed_gaussian, split_gaussian, squashed_gaussian

BOUNDS = (-3.0, 0.5)
DIMS = [1, 6, 16, 17, 38]
LEARNED = ("action", "mean", "log_std", "log_prob", "scaled_entropy")
"""What the library computes; the entropy is the log-density with another sign."""


# Definition -----------------------------------------------------------------------------------------------------------------


def test_log_density_integrates_to_one():
    raw = torch.tensor([[0.3, 0.2]], dtype=torch.float64)  # mean, unbounded log std of one action dimension
    mean, log_std = split_gaussian(raw, -2, 1)
    actions = torch.linspace(-0.9999, 0.9999, 20001, dtype=torch.float64)
    eps = ((torch.atanh(actions) - mean[0]) / log_std[0].exp())[:, None]
    sample = squashed_gaussian(raw.expand(len(eps), -1), eps, -2, 1)
    assert_close(sample.action.squeeze(-1), actions)
    assert torch.trapezoid(sample.log_prob.exp(), actions) == pytest.approx(1, abs=2e-3)


def test_scaled_entropy_gradient_reaches_log_std_alone():
    raw = torch.randn(5, 6, requires_grad=True)
    sample = squashed_gaussian(raw, torch.randn(5, 3), -10, 2)
    gradient = torch.autograd.grad(sample.scaled_entropy.sum(), raw)[0]
    assert gradient[:, :3].abs().max() < 1e-3 * gradient[:, 3:].abs().max()


def test_bounds_of_log_std():
    log_std = split_gaussian(torch.tensor([[0.0, -1e3], [0.0, 1e3]]), -10, 2)[1]
    assert_close(log_std.flatten(), torch.tensor([-10.0, 2.0]))


# By the library and by PyTorch ----------------------------------------------------------------------------------------------


def numbers(*lead, dims=6):
    """A policy network's output whose actions keep away from 1, and noise."""
    return torch.cat((0.4 * torch.randn(*lead, dims), torch.randn(*lead, dims) - 1), -1), 0.7 * torch.randn(*lead, dims)


def leaf(tensor, dtype=torch.float32):
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def plain(raw, eps):
    """The definition in double precision."""
    return plain_squashed_gaussian(raw.double(), eps.double(), *BOUNDS)


def sample(raw, eps):
    return squashed_gaussian(raw, eps, *BOUNDS)


def slopes(function, raw, eps, names, grads):
    """Gradients of some fields together."""
    fields = function(raw, eps)._asdict()
    return torch.autograd.grad([fields[name] for name in names], raw, [grads[name].to(raw.dtype) for name in names])[0]


def random_grads(raw, eps):
    return {name: torch.randn_like(part) for name, part in sample(raw, eps)._asdict().items()}


def check(raw, eps, tolerance=1e-5):
    """Fields, and gradients of each alone and of all together."""
    single, double, grads = leaf(raw), leaf(raw, torch.float64), random_grads(raw, eps)
    wanted = plain(double, eps)._asdict()
    for name, part in sample(single, eps)._asdict().items():
        close(part, wanted[name], tolerance, name)
    for names in (*((name,) for name in wanted), tuple(wanted)):
        expected = slopes(plain, double, eps, names, grads)
        close(slopes(sample, single, eps, names, grads), expected, 3 * tolerance, f"gradient of {names}")


@pytest.mark.parametrize("dims", DIMS)
def test_samples_equal_their_definition(dims, every):
    for lead in ((), (1,), (9,), (100,), (3, 5), (2, 1, 4)):
        check(*numbers(*lead, dims=dims))


def test_gradients_of_some_fields(every):
    """The others have none at all, not zeros."""
    raw, eps = numbers(9)
    grads, double, single = random_grads(raw, eps), leaf(raw, torch.float64), leaf(raw)
    for count in (2, 3, 4):
        for names in itertools.combinations(LEARNED, count):
            close(slopes(sample, single, eps, names, grads), slopes(plain, double, eps, names, grads), 3e-5, str(names))


@pytest.mark.parametrize("dims", DIMS)
def test_saturated_samples(dims, every):
    """The log-density is that of the actions as they are rounded: near 1 few digits of 1 - a^2 are left, by any way to compute it."""
    mean, log_std = torch.linspace(-20, 20, 81)[:, None].expand(81, dims), 4 * torch.randn(81, dims)
    raw, eps = torch.cat((mean, log_std), -1), torch.randn(81, dims)
    single = leaf(raw)
    found, wanted = squashed_gaussian(single, eps, -10, 2), plain_squashed_gaussian(raw.double(), eps.double(), -10, 2)
    for name, tolerance in (("action", 2e-5), ("mean", 2e-6), ("log_std", 2e-6)):
        close(getattr(found, name), getattr(wanted, name), tolerance, name)
    assert found.action.abs().max() == 1
    room = (1 - found.action.detach().double().square()).relu()
    density = (-0.5 * eps.double().square() - wanted.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    log_prob = density - torch.log(room + 1e-6).sum(-1)
    assert_close(found.log_prob.double(), log_prob, rtol=1e-5, atol=0.05 * dims)
    assert_close(found.scaled_entropy.double(), -density * dims, rtol=1e-4, atol=1e-3 * dims)
    (slope,) = torch.autograd.grad(found.log_prob.sum(), single, retain_graph=True)
    expected = 2 * found.action.detach().double() * room / (room + 1e-6)
    assert_close(slope[:, :dims].double(), expected, rtol=0, atol=0.1)
    (slope,) = torch.autograd.grad(found.action.sum(), single)
    assert_close(slope[:, :dims].double(), 1 - found.action.detach().double().square(), rtol=1e-5, atol=3e-7)


def test_actions_of_1_have_no_slope(every):
    raw, eps = torch.cat((torch.full((9, 6), 30.0), torch.zeros(9, 6)), -1).requires_grad_(), torch.zeros(9, 6)
    found = sample(raw, eps)
    assert (found.action == 1).all()
    (slope,) = torch.autograd.grad(found.action.sum() + found.mean.sum() + found.log_prob.sum(), raw)
    assert (slope[:, :6] == 0).all() and slope.isfinite().all()


@pytest.mark.parametrize("bounds", [(-10.0, 2.0), (-1.0, -1.0), (-20.0, -15.0)])
def test_any_bounds(bounds, every):
    raw, eps = numbers(40)
    raw[:, 6:] -= 1
    found, wanted = squashed_gaussian(raw, eps, *bounds), plain_squashed_gaussian(raw.double(), eps.double(), *bounds)
    for name in LEARNED:
        close(getattr(found, name), getattr(wanted, name), 1e-5, name)


def test_raw_numbers_far_out(every):
    """Standard deviations stay within their bounds, and actions within 1."""
    for size in (100.0, 1e10, 1e38, math.inf):
        raw = size * torch.tensor([1.0, -1, 1, -1]).expand(9, 4)
        found = sample(raw, torch.randn(9, 2))
        close(found.log_std, torch.tensor(BOUNDS[::-1]).expand(9, 2), 1e-6)
        assert torch.equal(found.action, torch.tensor([1.0, -1]).expand(9, 2)) and found.log_prob.isfinite().all()


@pytest.mark.parametrize("laid", [skipping, transposed, lambda x: x[:1].expand_as(x)], ids=["skipping", "transposed", "expanded"])
def test_numbers_lie_in_memory_as_they_like(laid, every):
    raw, eps = numbers(4, 9)
    strange, grads = laid(raw).detach().requires_grad_(), random_grads(raw, eps)
    assert not strange.is_contiguous()
    expected = sample(leaf(strange), laid(eps).contiguous())._asdict()
    for name, part in sample(strange, laid(eps))._asdict().items():
        close(part, expected[name], 1e-6, name)
    expected = slopes(sample, leaf(strange), laid(eps).contiguous(), LEARNED, grads)
    laid_grads = {name: transposed(grad) for name, grad in grads.items()}
    close(slopes(sample, strange, laid(eps), LEARNED, laid_grads), expected, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["mean", "log_std", "eps"])
def test_rows_do_not_infect_each_other(where, bad, every):
    """Within its row, NaN is in what depends on it."""
    raw, eps = numbers(40, dims=17)
    grads = random_grads(raw, eps)
    fields, gradient = sample(raw, eps)._asdict(), slopes(sample, leaf(raw), eps, LEARNED, grads)
    row, others = 13, torch.arange(40) != 13
    (eps if where == "eps" else raw)[row, 20 if where == "log_std" else 5] = bad
    found = sample(raw, eps)._asdict()
    for name, part in found.items():
        assert torch.equal(part[others], fields[name][others]), name
    found_gradient = slopes(sample, leaf(raw), eps, LEARNED, grads)
    assert torch.equal(found_gradient[others], gradient[others])
    if math.isnan(bad):
        assert found["action"][row].isnan().any() and found["log_prob"][row].isnan() and found["scaled_entropy"][row].isnan()
        assert found["mean"][row].isnan().any() == (where == "mean") and found["log_std"][row].isnan().any() == (where == "log_std")
        assert found_gradient[row].isnan().any()


@pytest.mark.parametrize("names", [("action",), ("log_prob",), ("scaled_entropy",), ("mean", "log_std", "log_prob")], ids=str)
def test_second_derivatives(names, every):
    found = []
    raw, eps = numbers(9)
    for function, dtype in ((sample, torch.float32), (plain, torch.float64)):
        own = leaf(raw, dtype)
        fields = function(own, eps)._asdict()
        value = sum(fields[name].square().sum() for name in names)
        (slope,) = torch.autograd.grad(value, own, create_graph=True)
        found.append(torch.autograd.grad(value + slope.square().sum(), own)[0])
    close(*found, 1e-4)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 0), (0, 1), (2, 1)], ids=str)
def test_mapped_samples(dims, every):
    """Over the network's output, the noise or both, along any dimension."""
    parts = [part if dim is not None else part[0] for part, dim in zip(numbers(3, 5), dims, strict=True)]
    moved = [part if not dim else part.movedim(0, dim).contiguous() for part, dim in zip(parts, dims, strict=True)]
    own, wanted = leaf(moved[0]), leaf(parts[0], torch.float64)
    found = torch.vmap(sample, in_dims=dims)(own, moved[1])
    expected = plain(wanted.expand(3, 5, 12), parts[1].expand(3, 5, 6))
    total = [0, 0]
    for name in expected._fields:
        close(getattr(found, name), getattr(expected, name), 1e-5, name)
        for place, fields in enumerate((found, expected)):
            total[place] = total[place] + getattr(fields, name).square().sum()
    slope = torch.autograd.grad(total[1], wanted)[0]
    close(torch.autograd.grad(total[0], own)[0], slope.movedim(0, dims[0]) if dims[0] else slope, 5e-5)


def test_mapped_samples_are_one_call(fast):
    raw, eps = numbers(3, 5)
    torch.vmap(sample)(raw.requires_grad_(), eps).log_prob.sum().backward()
    assert fast == ["gaussian", "gaussian_back"]


@pytest.mark.parametrize("learned", [False, True])
def test_what_is_not_mapped_within_a_mapped_function(learned, either):
    """Another argument is; output and noise are the same for all."""
    raw, eps = numbers(5)
    raw.requires_grad_(learned)
    factors = torch.randn(3)
    found = torch.vmap(lambda factor: sample(raw, eps).log_prob * factor)(factors)
    close(found, sample(raw.detach(), eps).log_prob * factors[:, None], 1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_transforms(name, either):
    """Derivatives of functions, and functions mapped twice."""
    raw, eps = numbers(5)

    def function(raw, of=sample):
        return getattr(of(raw, eps), name)

    expected = torch.autograd.functional.jacobian(partial(function, of=plain), raw.double())
    for jacobian in (torch.func.jacrev, torch.func.jacfwd, lambda function: partial(torch.autograd.functional.jacobian, function)):
        close(jacobian(function)(raw), expected, 3e-5)
    several = torch.stack((raw, 0.5 * raw))
    twice = torch.vmap(torch.vmap(function))(torch.stack((several, several + 0.1)))
    close(twice[0, 1], function(several[1], of=plain), 1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_forward_derivatives(recorded, either):
    raw, eps = numbers(5)
    tangent = torch.randn_like(raw)
    with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
        dual = forward_ad.make_dual(raw, tangent)
        for one, other in zip(sample(dual, eps), plain_squashed_gaussian(dual, eps, *BOUNDS), strict=True):
            assert_close(forward_ad.unpack_dual(one).tangent, forward_ad.unpack_dual(other).tangent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_batches_of_gradients(name, every):
    raw, eps = numbers(9)
    value = getattr(sample(raw.requires_grad_(), eps), name)
    grads = torch.randn(4, *value.shape)
    one_by_one = torch.stack([torch.autograd.grad(value, raw, grad, retain_graph=True)[0] for grad in grads])
    close(torch.autograd.grad(value, raw, grads, is_grads_batched=True)[0], one_by_one, 2e-5)


def test_noise_with_a_gradient_is_left_to_torch(best):
    raw, eps = numbers(9)
    found, wanted = leaf(eps), leaf(eps, torch.float64)
    assert_close(
        torch.autograd.grad(sample(raw, found).log_prob.sum(), found)[0].double(),
        torch.autograd.grad(plain(raw, wanted).log_prob.sum(), wanted)[0],
        rtol=1e-5,
        atol=1e-5,
    )
    assert not best


def test_one_call_each(calls):
    raw, eps = numbers(9)
    with torch.no_grad():
        sample(raw, eps)
    assert calls == ["gaussian"]
    found = sample(raw.requires_grad_(), eps)
    (found.log_prob.sum() + found.action.sum() + found.entropy.sum()).backward()
    assert calls == ["gaussian", "gaussian", "gaussian_back"]


def test_double_precision_stays_double(best):
    raw, eps = (part.double() for part in numbers(9))
    for one, other in zip(sample(raw, eps), plain(raw, eps), strict=True):
        assert torch.equal(one, other)
    assert not best


def test_few_rows_are_left_to_torch(best, monkeypatch):
    monkeypatch.setattr(kernels, "NATIVE_FROM", 8)
    raw, eps = numbers(8)
    sample(raw[:7], eps[:7])
    assert not best
    sample(raw, eps)
    assert len(best) == (0 if isinstance(native.library(), str) else 1)


def test_no_rows(either):
    found = sample(torch.zeros(4, 0, 12), torch.zeros(4, 0, 6))
    assert found.action.shape == (4, 0, 6) and found.log_prob.shape == (4, 0)


def test_compiled_as_one_graph(best):
    raw, eps = numbers(9)
    compiled = torch.compile(sample, backend="aot_eager", fullgraph=True, dynamic=False)
    own, wanted = leaf(raw), leaf(raw, torch.float64)
    value = compiled(own, eps)
    (found,) = torch.autograd.grad(value.log_prob.sum(), own)
    assert not best
    close(value.action, plain(wanted, eps).action, 1e-5)
    close(found, torch.autograd.grad(plain(wanted, eps).log_prob.sum(), wanted)[0], 3e-5)


def test_threads(calls):
    raw, eps = numbers(2000)
    raw.requires_grad_()
    grads = random_grads(raw, eps)
    expected, gradient = sample(raw, eps), slopes(sample, raw, eps, LEARNED, grads)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for one, other in zip(sample(raw, eps), expected, strict=True)), threads
        assert torch.equal(slopes(sample, raw, eps, LEARNED, grads), gradient), threads


def test_addresses_have_no_influence(calls):
    """Bit for bit, or a resumed run could differ from an uninterrupted one."""
    raw, eps = numbers(9, dims=17)
    expected = sample(raw, eps)
    for offset in (1, 3, 8, 15):
        moved = [torch.empty(part.numel() + offset)[offset:].view(part.shape).copy_(part) for part in (raw, eps)]
        assert all(torch.equal(one, other) for one, other in zip(sample(*moved), expected, strict=True)), offset


def test_two_backward_passes(either):
    raw, eps = numbers(9)
    found = sample(raw.requires_grad_(), eps)
    value = found.action.sum() + found.scaled_entropy.sum()
    first, second = (torch.autograd.grad(value, raw, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_arguments_stay_as_they_are(either):
    raw, eps = numbers(9)
    own, noise = leaf(raw), eps.clone()
    found = sample(own, noise)
    (found.action.sum() + found.log_prob.sum()).backward()
    assert torch.equal(own.detach(), raw) and torch.equal(noise, eps)


def test_changed_actions_are_noticed(either):
    """They are part of their gradient, as that of a tanh is."""
    found = sample(numbers(9)[0].requires_grad_(), numbers(9)[1])
    found.action.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.action.sum().backward()


def test_inference_mode_leaves_nothing_behind(either):
    raw, eps = numbers(9)
    with torch.inference_mode():
        inside = sample(raw, eps)
    assert all(torch.equal(one, other) for one, other in zip(sample(raw, eps), inside, strict=True))
    check(raw, eps)


# What is refused, or left to PyTorch ------------------------------------------------------------------------------------------


DRAW = torch.Generator().manual_seed(1)  # the same numbers whatever other modules drew when they were imported
RAW, NOISE = torch.randn(20, 12, generator=DRAW), torch.randn(20, 6, generator=DRAW)
SHARED = {
    "one noise for all": (RAW, NOISE[0]),
    "one output for all": (RAW[:1], NOISE),
    "several noises": (RAW, torch.randn(3, 20, 6, generator=DRAW)),
    "one number of noise": (RAW, NOISE[:, :1]),
}


@pytest.mark.parametrize(("raw", "eps"), SHARED.values(), ids=SHARED)
def test_shapes_that_broadcast_are_left_to_torch(raw, eps, refusing):
    for one, other in zip(sample(raw, eps), plain(raw, eps), strict=True):
        close(one, other, 2e-3)


WRONG = {
    "fewer noises": (RAW, NOISE[:7]),
    "narrow noise": (RAW, NOISE[:, :5]),
    "wide noise": (RAW, torch.randn(20, 7)),
    "noise elsewhere": (RAW, NOISE.to("meta")),
}


@pytest.mark.parametrize(("raw", "eps"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_by_torch(raw, eps, refusing):
    """The library reads memory unasked: it must not be called with anything but what it expects."""
    with pytest.raises((RuntimeError, IndexError)):
        sample(raw, eps)


# The clipped Gaussian, and densities of given actions -------------------------------------------------------------------------------


def distribution(raw, clipped, bounds=BOUNDS):
    """The policy as PyTorch has it, before clipping."""
    mean, log_std = split_gaussian(raw, *bounds)
    if clipped:
        return Normal(torch.tanh(mean), log_std.exp())
    return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())


@pytest.mark.parametrize("lead", [(), (9,), (3, 5)], ids=str)
def test_clipped_samples(lead):
    raw, eps = numbers(*lead)
    found, normal = clipped_gaussian(raw, eps, *BOUNDS), distribution(raw, True)
    place = normal.mean + eps * normal.stddev
    density = normal.log_prob(place).sum(-1)
    expected = (place.clamp(-1, 1), normal.mean, normal.stddev.log(), density, -density, -6 * density)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert [part.shape for part in found] == [part.shape for part in sample(raw, eps)]


def test_clipped_samples_have_no_slope_beyond_1():
    """Their densities do not know of it."""
    raw = torch.tensor([[2.0, 0.0, -2.0, 0.0, 0.0, 0.0]], requires_grad=True)  # means near 1, 0, near -1
    found = clipped_gaussian(raw, torch.tensor([[2.0, 0.5, -2.0]]), *BOUNDS)
    assert found.action[0].tolist() == pytest.approx([1, 0.5 * math.exp(-1.25), -1])
    (slope,) = torch.autograd.grad(found.action.sum(), raw, retain_graph=True)
    assert (slope[0, [0, 2, 3, 5]] == 0).all() and (slope[0, [1, 4]] != 0).all()
    (slope,) = torch.autograd.grad(found.scaled_entropy.sum(), raw)
    half = 0.5 * (BOUNDS[1] - BOUNDS[0])
    assert_close(slope, torch.tensor([[0, 0, 0, 3 * half, 3 * half, 3 * half]]))


@pytest.mark.parametrize("clipped", [False, True])
def test_densities_of_actions_are_those_of_torch(clipped):
    raw, _ = numbers(200)
    action = torch.rand(200, 6, dtype=torch.float64) * 1.98 - 0.99
    found = gaussian_log_prob(raw.double(), action, *BOUNDS, clipped)
    assert_close(found, distribution(raw.double(), clipped).log_prob(action).sum(-1), rtol=0, atol=1e-3)  # 1e-6 beside 1 - a^2
    leaf_one, leaf_other = leaf(raw), leaf(raw, torch.float64)
    gaussian_log_prob(leaf_one, action.float(), *BOUNDS, clipped).sum().backward()
    distribution(leaf_other, clipped).log_prob(action).sum().backward()
    close(leaf_one.grad, leaf_other.grad, 1e-3)


@pytest.mark.parametrize("clipped", [False, True])
def test_densities_of_a_samples_own_action(clipped):
    raw, eps = numbers(200)
    found = (clipped_gaussian if clipped else plain_squashed_gaussian)(raw.double(), eps.double(), *BOUNDS)
    inside = found.action.abs().amax(-1) < 0.999
    assert inside.sum() > 100
    assert_close(gaussian_log_prob(raw.double(), found.action, *BOUNDS, clipped)[inside], found.log_prob[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bounds", [BOUNDS, (-10.0, 2.0)], ids=str)
def test_densities_at_the_bounds(clipped, bounds):
    """Replayed actions are often exactly 1."""
    action = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0]).expand(50, 6)
    raw = (5 * torch.randn(50, 12)).requires_grad_()
    found = gaussian_log_prob(raw, action, *bounds, clipped)
    (slope,) = torch.autograd.grad(found.sum(), raw)
    assert found.isfinite().all() and slope.isfinite().all()
    nearer, farther = (torch.tensor([[mean, 0.0]]) for mean in (1.0, 0.0))
    one = torch.ones(1, 1)
    assert gaussian_log_prob(nearer, one, *BOUNDS, clipped) > gaussian_log_prob(farther, one, *BOUNDS, clipped)
