"""Scalars as distributions over bins: the definition, and equal to it in double precision by every library and by none."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.testing import assert_close

from tests.libraries import TORCH, close, skipping, transposed
from worldmpc.models import kernels, native
from worldmpc.models.two_hot import TwoHot, symexp, symlog

BINS = [3, 16, 17, 33, 101]


# Definition -----------------------------------------------------------------------------------------------------------------


@given(st.floats(-20000, 20000))
@settings(deadline=None)
def test_symexp_inverts_symlog(x):
    value = torch.tensor(x, dtype=torch.float64)
    assert_close(symexp(symlog(value)), value, rtol=1e-9, atol=1e-9)


@given(st.floats(-20000, 20000), st.integers(3, 101))
@settings(deadline=None)
def test_two_hot_is_a_distribution_with_the_right_mean(x, num_bins):
    head = TwoHot(num_bins)
    target = head.encode(torch.tensor([x]))
    assert target.shape == (1, num_bins) and (target >= 0).all() and (target > 0).sum() <= 2
    assert_close(target.sum(), torch.tensor(1.0))
    assert_close((target @ head.bins)[0], symlog(torch.tensor(x)).clamp(-10, 10), rtol=1e-4, atol=1e-4)


def test_decode_inverts_encode():
    head, x = TwoHot(), torch.linspace(-300, 300, 77)
    assert_close(head.decode(head.encode(x).clamp(min=1e-30).log()), x, rtol=1e-3, atol=1e-4)


def test_uniform_logits_mean_zero():
    assert_close(TwoHot().decode(torch.zeros(3, 101)), torch.zeros(3), rtol=0, atol=1e-5)


def test_loss_is_the_cross_entropy_and_broadcasts_over_critics():
    head, logits, x = TwoHot(), torch.randn(4, 6, 101), torch.randn(6) * 50
    expected = -(head.encode(x) * logits.log_softmax(-1)).sum(-1)
    assert_close(head.loss(logits, x), expected)
    assert (head.loss(head.encode(x).clamp(min=1e-6).log(), x) < head.loss(logits, x).amin(0)).all()


def test_values_beyond_the_bins_saturate():
    head = TwoHot()
    for x in (1e9, math.inf):
        assert head.encode(torch.tensor([x, -x]))[0, -1] == 1 and head.encode(torch.tensor([x, -x]))[1, 0] == 1


# By the library and by PyTorch ----------------------------------------------------------------------------------------------


def double(head: TwoHot) -> TwoHot:
    """The same bins in double precision, which no library takes."""
    return TwoHot(head.num_bins, head.vmin, head.vmax).double()


def leaf(tensor, dtype=torch.float32):
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def results(head, logits, x, grad):
    """Values and losses of logits, with the gradients of both."""
    grad, found = grad.to(logits.dtype), {}
    for name, part in (("value", head.decode(logits)), ("loss", head.loss(logits, x))):
        found[name] = part.detach()
        found[f"gradient of the {name}"] = torch.autograd.grad(part, logits, grad)[0]
    return found


def check(head, logits, x, tolerance=2e-5):
    """Values grow exponentially with what softmax rounds, and their gradients with the values."""
    grad = torch.randn(logits.shape[:-1])
    wanted = results(double(head), leaf(logits, torch.float64), x.double(), grad)
    for name, part in results(head, leaf(logits), x, grad).items():
        scale = max(1.0, wanted["value"].abs().max().item()) if "value" in name else 1.0
        close(part, wanted[name], tolerance * scale, name)


def numbers(*lead, bins=101, scale=3.0):
    """Logits and scalars over the range of the bins."""
    return scale * torch.randn(*lead, bins), symexp(4 * torch.randn(lead))


@pytest.mark.parametrize("bins", BINS)
def test_values_and_losses_equal_their_definition(bins, every):
    for lead in ((), (1,), (7,), (100,), (3, 5), (2, 1, 4)):
        check(TwoHot(bins), *numbers(*lead, bins=bins))


@pytest.mark.parametrize(("low", "high"), [(-3.0, 3.0), (0.0, 5.0), (-20.0, -1.0)])
def test_any_range_of_bins(low, high, every):
    check(TwoHot(33, low, high), *numbers(40, bins=33), tolerance=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4, 1e20])
def test_logits_of_any_size(scale, every):
    check(TwoHot(33, -3, 3), *numbers(40, bins=33, scale=scale))


def test_certainties(every):
    """All weight in one bin, whatever the others are: the value is that bin's, and nothing changes it."""
    head = TwoHot(33, -3, 3)
    for rest in (-200.0, -1e30, -math.inf):
        logits = torch.full((33, 33), rest).fill_diagonal_(5.0).requires_grad_()
        value = head.decode(logits)
        close(value, symexp(head.bins), 1e-6)
        assert_close(torch.autograd.grad(value.sum(), logits)[0], torch.zeros(33, 33), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bins", BINS)
def test_losses_of_scalars_on_bins_and_beyond_them(bins, every):
    head = TwoHot(bins)
    for x in (symexp(head.bins), torch.tensor([1e9, -1e9, 3e38, -3e38, math.inf, -math.inf, 0.0, -0.0, 1e-30])):
        check(head, numbers(len(x), bins=bins)[0], x)


def test_losses_of_equal_logits_are_that_of_a_uniform_distribution(every):
    logits, x = torch.full((9, 101), 7.0), numbers(9)[1]
    close(TwoHot().loss(logits, x), torch.full((9,), math.log(101)), 1e-6)


@pytest.mark.parametrize("bins", [3, 17])
def test_a_value_of_zero_has_no_slope(bins, every):
    """As sign(x) has none; these bins sum up to 0 without rounding."""
    logits = torch.zeros(9, bins, requires_grad=True)
    value = TwoHot(bins).decode(logits)
    assert (value == 0).all()
    assert (torch.autograd.grad(value.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (1, 6), (4, 1), (1, 1, 1), ()], ids=str)
def test_scalars_are_shared_by_leading_dimensions(shape, every):
    head, (logits, _), x, grad = TwoHot(), numbers(3, 4, 6), symexp(3 * torch.randn(shape)), torch.randn(3, 4, 6)
    shared, apart = (results(head, leaf(logits), scalars, grad) for scalars in (x, x.expand(3, 4, 6).contiguous()))
    for name, part in apart.items():
        close(shared[name], part, 0 if every != TORCH else 1e-6, name)
    check(head, logits, x)


@pytest.mark.parametrize("laid", [skipping, transposed, lambda x: x[:1].expand_as(x)], ids=["skipping", "transposed", "expanded"])
def test_numbers_lie_in_memory_as_they_like(laid, every):
    head, (logits, x), grad = TwoHot(33), numbers(4, 9, bins=33), torch.randn(4, 9)
    strange = laid(logits).detach().requires_grad_()
    assert not strange.is_contiguous()
    expected = results(head, leaf(strange), laid(x).contiguous(), laid(grad).contiguous())
    for name, part in results(head, strange, laid(x), laid(grad)).items():
        close(part, expected[name], 1e-6, name)


@pytest.mark.parametrize("bins", [3, 17, 101])
@pytest.mark.parametrize("where", ["logits", "x", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_rows_do_not_infect_each_other(bins, where, bad, every):
    """The scalar inf is that of the last bin."""
    head, (logits, x), grad = TwoHot(bins), numbers(40, bins=bins), torch.randn(40)
    expected = results(head, leaf(logits), x, grad)
    row, others = 13, torch.arange(40) != 13
    if where != "x":
        logits[row, bins - 1] = bad
    if where != "logits":
        x[row] = bad
    for name, part in results(head, leaf(logits), x, grad).items():
        assert torch.equal(part[others], expected[name][others]), name
        infected = where != "x" or ("loss" in name and math.isnan(bad))
        assert bool(part[row].isnan().any()) == infected, name


def test_bad_logits_anywhere_show(every):
    """Also in what is left over behind whole vectors, and followed by good ones."""
    head = TwoHot(101)
    for place in (0, 7, 8, 15, 16, 63, 95, 96, 100):
        logits, x = numbers(9)
        logits[4, place] = math.nan
        assert head.decode(logits)[4].isnan() and head.loss(logits, x)[4].isnan(), place


@pytest.mark.parametrize("method", ["decode", "loss"])
def test_second_derivatives(method, every):
    found = []
    logits, x = numbers(9, bins=17, scale=1.0)
    for head, dtype in ((TwoHot(17, -2, 2), torch.float32), (double(TwoHot(17, -2, 2)), torch.float64)):
        own = leaf(logits, dtype)
        value = head.decode(own) if method == "decode" else head.loss(own, x.to(dtype))
        (slope,) = torch.autograd.grad(value.square().sum(), own, create_graph=True)
        found.append(torch.autograd.grad(value.sum() + slope.square().sum(), own)[0])
    close(*found, 2e-5)


@pytest.mark.parametrize("method", ["decode", "loss"])
def test_third_derivatives(method, either):
    found = []
    logits, x = numbers(9, bins=17, scale=1.0)
    for head, dtype in ((TwoHot(17, -2, 2), torch.float32), (double(TwoHot(17, -2, 2)), torch.float64)):
        own = leaf(logits, dtype)
        value = (head.decode(own) if method == "decode" else head.loss(own, x.to(dtype))).square().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, own, create_graph=True)
            value = slope.square().sum()
        found.append(slope.detach())
    close(*found, 1e-4)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 0), (2, 1)], ids=str)
def test_mapped_values_and_losses(dims, every):
    """Over logits, scalars or both, along any dimension."""
    head, count = TwoHot(33), 3
    (logits, x) = numbers(count, 5, bins=33)
    logits, x = (part if dim is not None else part[0] for part, dim in zip((logits, x), dims, strict=True))
    moved = [part if not dim else part.movedim(0, dim).contiguous() for part, dim in zip((logits, x), dims, strict=True)]
    own, grad = leaf(moved[0]), torch.randn(count, 5)
    wanted = leaf(logits, torch.float64)
    losses = torch.vmap(head.loss, in_dims=dims)(own, moved[1])
    expected = double(head).plain_loss(wanted.expand(count, 5, 33), x.double().expand(count, 5))
    close(losses, expected, 2e-5)
    slope = torch.autograd.grad(expected, wanted, grad.double())[0]
    close(torch.autograd.grad(losses, own, grad)[0], slope.movedim(0, dims[0]) if dims[0] else slope, 2e-5)
    if dims[0] is None:
        return
    values, expected = torch.vmap(head.decode, in_dims=dims[0])(own), double(head).plain_decode(wanted)
    close(values, expected, 2e-5)
    slope = torch.autograd.grad(expected, wanted, grad.double())[0]
    close(torch.autograd.grad(values, own, grad)[0], slope.movedim(0, dims[0]), 2e-5)


def test_mapped_values_and_losses_are_one_call_each(fast):
    head, (logits, x) = TwoHot(33), numbers(3, 5, bins=33)
    logits.requires_grad_()
    torch.vmap(head.decode)(logits).sum().backward()
    torch.vmap(head.loss)(logits, x).sum().backward()
    assert fast == ["two_hot_values", "two_hot_values_back", "two_hot_losses", "two_hot_losses_back"]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("method", ["decode", "loss"])
def test_what_is_not_mapped_within_a_mapped_function(method, learned, either):
    """Another argument is; the logits are the same for all."""
    head, (logits, x), factors = TwoHot(33), numbers(5, bins=33), torch.randn(3)
    logits.requires_grad_(learned)
    function = head.decode if method == "decode" else partial(head.loss, x=x)
    found = torch.vmap(lambda factor: function(logits) * factor)(factors)
    close(found, function(logits.detach()) * factors[:, None], 1e-6)


@pytest.mark.parametrize("method", ["decode", "loss"])
def test_transforms(method, either):
    """Derivatives of functions, and functions mapped twice."""
    head, (logits, x) = TwoHot(17), numbers(5, bins=17)
    several = torch.stack((logits, 0.5 * logits))

    def function(logits, head=head):
        return head.decode(logits) if method == "decode" else head.loss(logits, x.to(logits.dtype))

    expected = torch.autograd.functional.jacobian(lambda own: function(own, double(head)), logits.double())
    tolerance = 2e-5 * expected.abs().max().item()
    for jacobian in (torch.func.jacrev, torch.func.jacfwd, lambda function: partial(torch.autograd.functional.jacobian, function)):
        close(jacobian(function)(logits), expected, tolerance)
    slopes = torch.func.vmap(torch.func.grad(lambda own: function(own).sum()))(several)
    close(slopes[0], expected.sum(0), tolerance)
    twice = torch.vmap(torch.vmap(function))(torch.stack((several, several + 1)))
    close(twice[0, 1], function(several[1].double(), double(head)), tolerance)


@pytest.mark.parametrize("method", ["decode", "loss"])
@pytest.mark.parametrize("recorded", [False, True])
def test_forward_derivatives(method, recorded, either):
    head, (logits, x), tangent = TwoHot(17), numbers(5, bins=17), torch.randn(5, 17)
    with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
        dual = forward_ad.make_dual(logits, tangent)
        value = head.decode(dual) if method == "decode" else head.loss(dual, x)
        expected = head.plain_decode(dual) if method == "decode" else head.plain_loss(dual, x)
        assert_close(forward_ad.unpack_dual(value).tangent, forward_ad.unpack_dual(expected).tangent)


@pytest.mark.parametrize("method", ["decode", "loss"])
def test_batches_of_gradients(method, every):
    head, (logits, x), grads = TwoHot(33), numbers(9, bins=33), torch.randn(4, 9)
    logits.requires_grad_()
    value = head.decode(logits) if method == "decode" else head.loss(logits, x)
    one_by_one = torch.stack([torch.autograd.grad(value, logits, grad, retain_graph=True)[0] for grad in grads])
    close(torch.autograd.grad(value, logits, grads, is_grads_batched=True)[0], one_by_one, 1e-5)


def test_scalars_with_a_gradient_are_left_to_torch(best):
    head, (logits, x) = TwoHot(33), numbers(40, bins=33)
    own, wanted = leaf(x), leaf(x, torch.float64)
    (found,) = torch.autograd.grad(head.loss(logits, own).sum(), own)
    (expected,) = torch.autograd.grad(double(head).plain_loss(logits.double(), wanted).sum(), wanted)
    assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    assert not best and found.abs().max() > 0


def test_one_call_each(calls):
    head, (logits, x) = TwoHot(33), numbers(40, bins=33)
    with torch.no_grad():
        head.decode(logits), head.loss(logits, x)
    head.decode(logits)
    assert calls == ["two_hot_values", "two_hot_losses", "two_hot_values"]
    calls.clear()
    logits.requires_grad_()
    (head.decode(logits) + head.loss(logits, x)).sum().backward()
    assert calls[:2] == ["two_hot_values", "two_hot_losses"]
    assert sorted(calls[2:]) == ["two_hot_losses_back", "two_hot_values_back"]


def test_double_precision_stays_double(best):
    head, (logits, x) = double(TwoHot(33)), numbers(40, bins=33)
    assert_close(head.decode(logits.double()), symexp((logits.double().softmax(-1) * head.bins).sum(-1)))
    assert_close(head.loss(logits.double(), x.double()), -(head.encode(x.double()) * logits.double().log_softmax(-1)).sum(-1))
    assert not best


def test_few_rows_are_left_to_torch(best, monkeypatch):
    monkeypatch.setattr(kernels, "NATIVE_FROM", 8)
    head, (logits, x) = TwoHot(33), numbers(8, bins=33)
    head.decode(logits[:7]), head.loss(logits[:7], x[:7])
    assert not best
    head.decode(logits), head.loss(logits, x)
    assert len(best) == (0 if isinstance(native.library(), str) else 2)


def test_no_rows(either):
    head, logits = TwoHot(33), torch.zeros(4, 0, 33, requires_grad=True)
    assert head.decode(logits).shape == head.loss(logits, torch.zeros(4, 0)).shape == (4, 0)


def test_compiled_as_one_graph(best):
    head, (logits, x) = TwoHot(33), numbers(9, bins=33)
    compiled = torch.compile(lambda own: head.decode(own) + head.loss(own, x), backend="aot_eager", fullgraph=True, dynamic=False)
    own, wanted = leaf(logits), leaf(logits, torch.float64)
    value = compiled(own)
    (found,) = torch.autograd.grad(value.sum(), own)
    assert not best
    expected = double(head).plain_decode(wanted) + double(head).plain_loss(wanted, x.double())
    close(value, expected, 2e-5)
    close(found, torch.autograd.grad(expected.sum(), wanted)[0], 2e-5)


def test_threads(calls):
    head, (logits, x), grad = TwoHot(), numbers(1000), torch.randn(1000)
    expected = results(head, leaf(logits), x, grad)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, part in results(head, leaf(logits), x, grad).items():
            assert torch.equal(part, expected[name]), (threads, name)


def test_addresses_have_no_influence(calls):
    """Bit for bit, or a resumed run could differ from an uninterrupted one."""
    head, (logits, x), grad = TwoHot(), numbers(9), torch.randn(9)
    expected = results(head, leaf(logits), x, grad)
    for offset in (1, 3, 8, 15):
        room = torch.empty(9 * 101 + offset)
        moved = room[offset:].view(9, 101).copy_(logits).requires_grad_()
        assert all(torch.equal(part, expected[name]) for name, part in results(head, moved, x, grad).items()), offset


def test_arguments_stay_as_they_are_and_results_may_be_changed(either):
    head, (logits, x), grad = TwoHot(33), numbers(9, bins=33), torch.randn(9)
    own, kept = leaf(logits), (logits.clone(), x.clone(), grad.clone())
    expected = results(head, own, x, 2 * grad)
    for name, part in (("value", head.decode(own)), ("loss", head.loss(own, x))):
        close(torch.autograd.grad(part.mul_(2), own, grad)[0], expected[f"gradient of the {name}"], 1e-6)
    assert all(torch.equal(one, other) for one, other in zip((own.detach(), x, grad), kept, strict=True))


def test_two_backward_passes(either):
    head, (logits, x), grad = TwoHot(33), numbers(9, bins=33), torch.randn(9)
    own = leaf(logits)
    for part in (head.decode(own), head.loss(own, x)):
        first, second = (torch.autograd.grad(part, own, grad, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_scalars_of_inference_mode(either):
    """Nothing in a loss keeps those that PyTorch would not let it keep."""
    head, (logits, x) = TwoHot(33), numbers(9, bins=33)
    with torch.inference_mode():
        inferred, value = x.clone(), head.decode(logits)
        assert torch.equal(head.loss(logits, inferred), head.loss(logits, x)) and torch.equal(value, head.decode(logits))
    own = leaf(logits)
    (found,) = torch.autograd.grad(head.loss(own, inferred).sum(), own)
    assert torch.equal(found, torch.autograd.grad(head.loss(own, x).sum(), own)[0])


# What is refused, or left to PyTorch ------------------------------------------------------------------------------------------


WRONG = {
    "fewer bins": lambda head, logits, x: head.decode(logits[:, :20]),
    "more bins": lambda head, logits, x: head.decode(torch.cat((logits, logits), -1)),
    "bins elsewhere": lambda head, logits, x: head.to("meta").decode(logits),
    "fewer scalars": lambda head, logits, x: head.loss(logits, x[:7]),
    "more scalars": lambda head, logits, x: head.loss(logits[:1], x),
    "scalars in a column": lambda head, logits, x: head.loss(logits, x[:, None]),
    "scalars in double precision": lambda head, logits, x: head.loss(logits, x.double()),
    "scalars elsewhere": lambda head, logits, x: head.loss(logits, x.to("meta")),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_by_torch(call, refusing):
    """The library reads memory unasked: it must not be called with anything but what it expects."""
    with pytest.raises((RuntimeError, IndexError)):
        call(TwoHot(33), *numbers(40, bins=33))


def test_bins_of_another_precision_are_left_to_torch(refusing):
    logits, _ = numbers(40, bins=33)
    value = double(TwoHot(33)).decode(logits)
    assert value.dtype == torch.float64
    assert_close(value.float(), TwoHot(33).plain_decode(logits), rtol=1e-4, atol=1e-4)


def test_logits_far_from_zero_keep_their_digits(every):
    """A softmax does not change when all logits grow by as much."""
    near = torch.linspace(-3, 3, 101).expand(9, -1).contiguous()
    x = torch.linspace(-50, 50, 9)
    far = near + 2.0**17  # a multiple of the spacing of floats there is added, and the logits below are those that are left
    near = far - 2.0**17
    head, found = TwoHot(), []
    for logits in (near, far):
        leaf = logits.clone().requires_grad_()
        losses, values = head.loss(leaf, x), head.decode(leaf)
        found.append((losses, values, *torch.autograd.grad(losses.sum() + values.sum(), leaf)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)
