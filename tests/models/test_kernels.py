"""The arithmetic of one layer: equal to plain PyTorch in double precision, for every path a shape can take."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from worldmpc.models import kernels
from worldmpc.models.kernels import linear, normed_mish


def plain_normed_mish(x, weight, bias, ln_weight, ln_bias, keep=None):
    hidden = F.linear(x, weight, bias)
    return F.mish(F.layer_norm(hidden if keep is None else hidden * keep, ln_weight.shape, ln_weight, ln_bias))


def layer(rows, inputs, outputs):
    """Input [*rows, in] and the parameters of a layer."""
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, inputs), (outputs, inputs), (outputs,), (outputs,), (outputs,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# Below and above the size from which oneDNN multiplies; the last has an inner size that is no multiple of anything.
SHAPES = [((), 5, 16), ((7,), 5, 16), ((2, 3), 16, 8), ((3, 128), 64, 128), ((2, 2, 96), 65, 101)]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dropout", [False, True])
def test_values_and_gradients_equal_plain_torch(rows, inputs, outputs, dropout):
    parts = layer(rows, inputs, outputs)
    keep = (torch.rand(*rows, outputs) > 0.3).float() / 0.7 if dropout else None
    for ours, plain, count in ((normed_mish, plain_normed_mish, 5), (linear, F.linear, 3)):
        single = [part.clone().requires_grad_() for part in parts[:count]]
        double = [part.double().requires_grad_() for part in parts[:count]]
        extra = (keep,) if count == 5 else ()
        value = ours(*single, *extra)
        expected = plain(*double, *(part if part is None else part.double() for part in extra))
        assert value.shape == (*rows, outputs)
        assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert_close(ours(*single, *extra), value.detach(), rtol=0, atol=0)
        grad = torch.randn_like(value)
        gradients = torch.autograd.grad(value, single, grad)
        for found, wanted in zip(gradients, torch.autograd.grad(expected, double, grad.double()), strict=True):
            assert_close(found.double(), wanted, rtol=1e-4, atol=2e-4)


def test_only_wanted_gradients_are_computed():
    x, weight, bias, ln_weight, ln_bias = layer((3, 128), 64, 128)
    x.requires_grad_()
    value = normed_mish(x, weight, bias, ln_weight, ln_bias)
    (found,) = torch.autograd.grad(value.sum(), x)
    (wanted,) = torch.autograd.grad(plain_normed_mish(x, weight, bias, ln_weight, ln_bias).sum(), x)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_expanded_inputs():
    x, *parameters = layer((1, 1), 64, 128)
    wide = x.expand(4, 200, -1)
    assert_close(normed_mish(wide, *parameters), normed_mish(x, *parameters).expand(4, 200, -1), rtol=1e-4, atol=1e-4)
    assert_close(linear(wide, *parameters[:2]), linear(x, *parameters[:2]).expand(4, 200, -1), rtol=1e-4, atol=1e-4)


def test_inputs_stay_as_they_are():
    parts = [part.requires_grad_() for part in layer((3, 128), 64, 128)]
    before = [part.detach().clone() for part in parts]
    normed_mish(*parts, torch.ones(3, 128, 128)).sum().backward()
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_map_over_a_batch_of_parameters():
    x, *parameters = layer((4, 9), 6, 8)
    weights = torch.randn(4, 8, 6)

    def loss(weight, x):
        return normed_mish(x, weight, *parameters[1:]).sum() + linear(x, weight, parameters[1]).sum()

    def plain(weight, x):
        return plain_normed_mish(x, weight, *parameters[1:]).sum() + F.linear(x, weight, parameters[1]).sum()

    found = torch.func.vmap(torch.func.grad(loss))(weights, x)
    for one, weight, rows in zip(found, weights, x, strict=True):
        weight = weight.clone().requires_grad_()
        assert_close(one, torch.autograd.grad(plain(weight, rows), weight)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(7,), (3, 128)])
def test_second_derivatives(rows):
    """A gradient penalty, whose outer loss has the layer's value in it as well."""
    keep = (torch.rand(*rows, 128) > 0.3).float() / 0.7
    for ours, plain, count in ((normed_mish, plain_normed_mish, 5), (linear, F.linear, 3)):
        found = []
        for function, dtype in ((ours, torch.float32), (plain, torch.float64)):
            parts = [part.to(dtype).requires_grad_() for part in layer(rows, 64, 128)[:count]]
            value = function(*parts, *((keep.to(dtype),) if count == 5 else ()))
            penalty = torch.autograd.grad(value.square().mean(), parts[0], create_graph=True)[0].square().sum()
            found.append(torch.autograd.grad(value.mean() + penalty, parts, allow_unused=True))
        for one, wanted in zip(*found, strict=True):
            assert (one is None) == (wanted is None)
            if one is not None:
                assert_close(one.double(), wanted, rtol=1e-3, atol=1e-5)


def test_results_may_be_changed_in_place():
    parts = [part.requires_grad_() for part in layer((3, 128), 64, 128)]
    normed_mish(*parts).mul_(2).sum().backward()
    found, parts[1].grad = parts[1].grad, None
    (2 * normed_mish(*parts)).sum().backward()
    assert_close(found, parts[1].grad)


def test_mapped_parameters_alone():
    x, weight, bias, ln_weight, ln_bias = layer((9,), 6, 8)
    weights = torch.stack((weight, 2 * weight))
    for function, rest in ((linear, (bias,)), (normed_mish, (bias, ln_weight, ln_bias))):
        mapped = torch.vmap(lambda w, function=function, rest=rest: function(x, w, *rest))(weights)
        assert_close(mapped, torch.stack([function(x, w, *rest) for w in weights]), rtol=1e-5, atol=1e-5)
        gradient = torch.func.grad(lambda w, function=function, rest=rest: function(x, w, *rest).sum())(weight)
        own = weight.clone().requires_grad_()
        assert_close(gradient, torch.autograd.grad(function(x, own, *rest).sum(), own)[0], rtol=1e-4, atol=1e-4)


def test_autocast_is_left_to_torch():
    parts = [part.requires_grad_() for part in layer((3, 128), 64, 128)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = normed_mish(*parts)
    value.float().sum().backward()
    assert_close(value.float(), normed_mish(*parts), rtol=0.1, atol=0.2)


def test_wrong_shapes_are_named_by_torch():
    x, weight, bias, *_ = layer((3, 128), 64, 128)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[..., :60], weight, bias)


def test_without_onednn(monkeypatch):
    parts = layer((3, 128), 64, 128)
    expected = normed_mish(*parts), linear(*parts[:3])
    monkeypatch.setattr(kernels, "ONEDNN", False)
    monkeypatch.setattr(kernels, "onednn_product", None)
    assert_close(normed_mish(*parts), expected[0], rtol=1e-4, atol=1e-4)
    assert_close(linear(*parts[:3]), expected[1], rtol=1e-4, atol=1e-4)
    assert kernels.product(parts[0][0], parts[1]).shape == (128, 128)


def test_mish_far_from_zero():
    """With unit weight and no spread after the norm but what its own parameters say, the activation alone is left."""
    wanted = torch.linspace(-60, 60, 4001)
    x, weight = torch.zeros(1, 4), torch.zeros(4001, 4)
    found = normed_mish(x, weight, torch.zeros(4001), torch.ones(4001), wanted)
    assert_close(found, F.mish(wanted)[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [4, 200])
def test_product_by_either_library(size, monkeypatch):
    left, right, bias = torch.randn(size, size + 1), torch.randn(size + 2, size + 1), torch.randn(size + 2)
    expected = left.double() @ right.double().t() + bias.double()
    for threshold in (0, 1 << 60):
        monkeypatch.setattr(kernels, "ONEDNN_FROM", threshold)
        assert_close(kernels.product(left, right, bias).double(), expected, rtol=1e-4, atol=1e-4)
        assert_close(kernels.product(left, right).double(), expected - bias.double(), rtol=1e-4, atol=1e-4)
        assert_close(kernels.product(left.t(), right[:size].t()).double(), left.double().t() @ right[:size].double(), rtol=1e-4, atol=1e-4)


def test_products_do_not_depend_on_where_their_inputs_lie():
    """Bit for bit, or a resumed run could differ from an uninterrupted one."""

    def moved(x, offset):
        return torch.empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)

    left, right, bias = torch.randn(384, 65), torch.randn(128, 65), torch.randn(128)
    expected = kernels.product(left, right, bias)
    for offset in range(1, 17):
        assert torch.equal(kernels.product(moved(left, offset), moved(right, offset), moved(bias, offset)), expected)


@pytest.mark.parametrize("rows", [(9,), (3, 128)])
def test_compiled_as_one_graph(rows):
    parts = [part.requires_grad_() for part in layer(rows, 64, 128)]
    keep = torch.ones(*rows, 128)
    compiled = torch.compile(normed_mish, backend="aot_eager", fullgraph=True, dynamic=False)
    value, expected = compiled(*parts, keep), normed_mish(*parts, keep)
    assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(value.sum(), parts), torch.autograd.grad(expected.sum(), parts), strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert_close(torch.compile(linear, backend="aot_eager", fullgraph=True)(*parts[:3]), linear(*parts[:3]), rtol=1e-5, atol=1e-5)
