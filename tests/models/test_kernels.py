"""Whole networks: equal to plain PyTorch in double precision, by every library that this processor can run and by none."""

import copy
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.libraries import TORCH, close, loaded, skipping, transposed, use
from worldmpc.config import ModelConfig
from worldmpc.models import kernels, native, packing
from worldmpc.models.networks import Layer, Network, simnorm
from worldmpc.models.packing import constant_parameters
from worldmpc.models.world_model import WorldModel
from worldmpc.planners import rollout_return
from worldmpc.types import ModelStep

NAMES = ("weight", "bias", "ln_weight", "ln_bias")


# Networks -------------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Arguments of ``kernels.mlp``."""

    parts: list[Tensor]
    layers: list[Layer]
    heads: Tensor | None = None
    keep: Tensor | None = None
    groups: int = 0
    strided: bool = False


def make(lead, widths, *, members=None, heads=None, dropout=False, groups=0, strided=False, linear=True, seed=0) -> Case:
    """A random network and its input.

    Args:
        lead: leading dimensions of the input.
        widths: those of its parts as a tuple, then those of the layers.
        members: how many networks, or None for one without that dimension.
        heads: indices of those to evaluate.
        dropout: with factors for the first layer.
        groups: width of the groups of a SimNorm at the end.
        strided: its layout.
        linear: the last layer is linear where there is no SimNorm.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, *outs = widths
    q = () if members is None else (members,)

    def normal(*shape, mean=0.0, std=1.0):
        return mean + std * torch.randn(shape, generator=generator)

    layers = []
    for index, (before, after) in enumerate(itertools.pairwise([sum(parts), *outs])):
        norm = index < len(outs) - 1 or groups or not linear
        norms = (normal(*q, after, mean=1.0, std=0.3), normal(*q, after, std=0.3)) if norm else (None, None)
        layers.append((normal(*q, after, before, std=before**-0.5), normal(*q, after, std=0.3), *norms))
    keep = None
    if dropout:
        chosen = () if members is None else (members if heads is None else len(heads),)
        keep = (torch.rand(*chosen, *lead, outs[0], generator=generator) > 0.3).float() / 0.7
    indices = None if heads is None else torch.tensor(heads)
    return Case([normal(*lead, width) for width in parts], layers, indices, keep, groups, strided)


def evaluate(case: Case) -> Tensor:
    return kernels.mlp(case.parts, case.layers, heads=case.heads, keep=case.keep, groups=case.groups, strided=case.strided)


def plain(case: Case) -> Tensor:
    """The definition, in the precision of its arguments."""
    x = torch.cat(case.parts, -1)
    weight = case.layers[0][0]
    if weight.dim() == 2:
        return plain_member(case, x, case.layers, case.keep)
    heads = range(len(weight)) if case.heads is None else case.heads.tolist()
    outputs = []
    for place, head in enumerate(heads):
        own = [tuple(part if part is None else part[head] for part in layer) for layer in case.layers]
        outputs.append(plain_member(case, x, own, None if case.keep is None else case.keep[place]))
    return torch.stack(outputs)


def plain_member(case, x, layers, keep):
    for index, (weight, bias, ln_weight, ln_bias) in enumerate(layers):
        x = F.linear(x, weight, bias)
        if index == 0 and keep is not None:
            x = x * keep
        if ln_weight is None:
            continue
        x = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias)
        if index < len(layers) - 1 or not case.groups:
            x = F.mish(x)
        elif case.strided:
            x = x.unflatten(-1, (case.groups, -1)).softmax(-2).flatten(-2)
        else:
            x = x.unflatten(-1, (-1, case.groups)).softmax(-1).flatten(-2)
    return x


def named(case: Case) -> dict[str, Tensor]:
    """What can have gradients: x1, x2, 0.weight, 0.bias, 0.ln_weight, ..."""
    found = {f"x{index}": part for index, part in enumerate(case.parts, start=1)}
    for index, layer in enumerate(case.layers):
        found |= {f"{index}.{name}": part for name, part in zip(NAMES, layer, strict=True) if part is not None}
    return found


def fresh(case: Case, dtype=torch.float32, wanted=".*") -> Case:
    """Copies of everything in a precision; gradients for the names that match."""

    def copied(part):
        return None if part is None else part.detach().to(dtype, copy=True)

    layers = [tuple(copied(part) for part in layer) for layer in case.layers]
    case = case._replace(parts=[copied(part) for part in case.parts], layers=layers, keep=copied(case.keep))
    for name, part in named(case).items():
        part.requires_grad_(re.fullmatch(wanted, name) is not None)
    return case


def learned(case: Case) -> dict[str, Tensor]:
    return {name: part for name, part in named(case).items() if part.requires_grad}


def gradients(function, case: Case, grad: Tensor) -> dict[str, Tensor]:
    found = learned(case)
    return dict(zip(found, torch.autograd.grad(function(case), list(found.values()), grad.to(case.parts[0].dtype)), strict=True))


def check(case: Case, wanted=".*", tolerance=2e-6):
    """Values and gradients equal the definition's in double precision."""
    single, double = fresh(case, torch.float32, wanted), fresh(case, torch.float64, wanted)
    value, expected = evaluate(single), plain(double)
    close(value, expected, tolerance)
    with torch.no_grad():
        assert torch.equal(evaluate(single), value)
    if wanted:
        grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        found, expected = gradients(evaluate, single, grad), gradients(plain, double, grad)
        for name, gradient in expected.items():
            close(found[name], gradient, 2 * tolerance, name)


# Values and gradients -------------------------------------------------------------------------------------------------------


ROWS = [*range(1, 41), 95, 96, 97, 1000]


def test_any_number_of_rows(calls):
    for rows in ROWS:
        check(make((rows,), ((19, 2), 24, 101)))
    assert set(calls) == {"forward", "backward_rows", "backward_weights"}


SHAPES = {
    "one linear layer": {"widths": ((7,), 5)},
    "one layer of two parts": {"widths": ((130, 3), 101)},
    "one wide layer": {"widths": ((7,), 530)},
    "two layers": {"widths": ((7,), 24, 5)},
    "narrow second part": {"widths": ((64, 1), 130, 5)},
    "wide second part": {"widths": ((5, 65), 24, 101)},
    "three layers": {"widths": ((24, 6), 130, 130, 101)},
    "five layers": {"widths": ((7,), 24, 33, 130, 16, 5)},
    "eight layers": {"widths": ((7, 2), 24, 16, 33, 24, 16, 33, 24, 5)},
    "width of panels": {"widths": ((32, 32), 64, 32, 96)},
    "normalised end": {"widths": ((24, 6), 130, 40), "linear": False},
    "few small groups": {"widths": ((7,), 24, 6), "groups": 2},
    "few wide groups": {"widths": ((7,), 24), "groups": 8},
    "groups of five": {"widths": ((7, 3), 33, 24, 35), "groups": 5},
    "many small groups": {"widths": ((24, 6), 130, 140), "groups": 2},
    "many wide groups": {"widths": ((7,), 24, 536), "groups": 8},
    "one group": {"widths": ((7,), 24, 12), "groups": 12},
    "groups of one": {"widths": ((7,), 24, 12), "groups": 1},
}
SHAPES |= {f"{name}, strided": shape | {"strided": True} for name, shape in SHAPES.items() if "groups" in shape}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_shape(shape, every):
    for rows, dropout in ((4, False), (29, True), (300, False)):
        check(make((rows,), dropout=dropout, **shape))


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (3, 5), (2, 3, 4), (5, 1, 7)], ids=str)
def test_any_leading_dimensions(lead, every):
    check(make(lead, ((7, 2), 24, 24, 5), dropout=True))
    check(make(lead, ((7, 2), 24, 24, 5), members=3, heads=[2, 0], dropout=True))
    check(make(lead, ((7,), 24, 16), groups=8))


@pytest.mark.parametrize("heads", [None, [1], [3, 0], [4, 1, 0, 3, 2]], ids=str)
@pytest.mark.parametrize("dropout", [False, True])
def test_ensembles(heads, dropout, every):
    """Members that are not evaluated have gradients of zero."""
    for rows in (25, 280):
        check(make((rows,), ((130, 3), 130, 24, 101), members=5, heads=heads, dropout=dropout))
    check(make((40,), ((7,), 24, 16), members=5, heads=heads, dropout=dropout, groups=8))


@pytest.mark.parametrize("wanted", ["", "x1", ".*"])
def test_a_member_evaluated_twice(wanted, every):
    check(make((40,), ((24, 3), 33, 24, 5), members=3, heads=[2, 2]), wanted)
    check(make((40,), ((24, 3), 33, 24, 5), members=3, heads=[1, 1, 0], dropout=True), wanted)


def test_members_alone_in_their_ensemble(every):
    check(make((20,), ((7,), 24, 5), members=1))
    check(make((20,), ((7,), 24, 5), members=1, heads=[0], dropout=True))


WANTED = {
    "input": (r"x\d", {"forward", "backward_rows"}),
    "first part": ("x1", {"forward", "backward_rows"}),
    "second part": ("x2", {"forward", "backward_rows"}),
    "parameters": (r"\d\..*", {"forward", "backward_rows", "backward_weights"}),
    "weights": (r"\d\.weight", {"forward", "backward_rows", "backward_weights"}),
    "biases": (r"\d\.bias", {"forward", "backward_rows"}),
    "norms": (r"\d\.ln_.*", {"forward", "backward_rows"}),
    "middle layer": (r"1\..*", {"forward", "backward_rows", "backward_weights"}),
    "one weight and one part": ("x1|2.weight", {"forward", "backward_rows", "backward_weights"}),
    "nothing": ("", {"forward"}),
}


@pytest.mark.parametrize(("wanted", "expected"), WANTED.values(), ids=WANTED)
def test_only_wanted_gradients_are_computed(wanted, expected, calls):
    check(make((50,), ((24, 3), 33, 24, 5)), wanted)
    check(make((50,), ((24, 3), 33, 24, 5), members=4, heads=[3, 1], dropout=True), wanted)
    check(make((50,), ((24, 3), 33, 24, 16), groups=8, strided=True), wanted)
    assert set(calls) == expected


@st.composite
def cases(draw):
    lead = draw(st.sampled_from([(), (1,), (5,), (12,), (13,), (37,), (3, 4), (2, 3, 5), (2, 97)]))
    parts = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=2)))
    groups, strided = draw(st.sampled_from([0, 0, 2, 3, 8])), draw(st.booleans())
    hidden = draw(st.lists(st.integers(3, 70), max_size=4))
    members = draw(st.sampled_from([None, 1, 2, 5]))
    heads = draw(st.none() | st.lists(st.integers(0, members - 1), min_size=1, max_size=3, unique=True)) if members else None
    last = groups * draw(st.integers(1 + (groups == 2), 70)) if groups else draw(st.integers(1, 110))
    dropout, seed = draw(st.booleans()), draw(st.integers(0, 99))
    return make(lead, (parts, *hidden, last), members=members, heads=heads, dropout=dropout, groups=groups, strided=strided, seed=seed)


@pytest.mark.parametrize("variant", native.VARIANTS)
def test_anything(variant):
    """The tolerance is that of badly conditioned norms over very few numbers."""

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(cases())
    def holds(case):
        check(case, tolerance=3e-5)

    with pytest.MonkeyPatch.context() as patch:
        use(patch, variant)
        holds()


def test_libraries_agree_with_each_other(monkeypatch):
    case = fresh(make((97,), ((33, 3), 130, 24, 24), members=3, heads=[2, 1], dropout=True, groups=8))
    grad = torch.randn(2, 97, 24)
    results = []
    for variant in native.VARIANTS:
        if not isinstance(loaded(variant), str):
            use(monkeypatch, variant)
            results.append({"value": evaluate(case), **gradients(evaluate, case, grad)})
    for other in results[1:]:
        for name, value in other.items():
            close(value, results[0][name], 2e-6, name)


# What inputs may look like --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 37), (1, 60), (2, 3, 31), (30, 37)], ids=str)
@pytest.mark.parametrize("members", [None, 3])
def test_candidates_that_share_their_latent(shape, members, calls):
    """Expanded latents of several environments are multiplied once each, where nothing is learned."""
    case = make(shape, ((130, 3), 130, 24, 5), members=members, heads=members and [2, 0])
    latents = case.parts[0][..., :1, :].expand_as(case.parts[0])
    with torch.no_grad():
        value = evaluate(case._replace(parts=[latents, case.parts[1]]))
        assert torch.equal(value, evaluate(case._replace(parts=[latents.contiguous(), case.parts[1]])))
    assert calls == ["forward", "forward"]
    double = fresh(case._replace(parts=[latents, case.parts[1]]), torch.float64)
    close(value, plain(double), 2e-6)


def test_expanded_inputs_with_gradients(either):
    case = make((4, 1), ((24, 3), 33, 5))
    start, actions = case.parts[0].requires_grad_(), torch.randn(4, 20, 3)
    value = evaluate(case._replace(parts=[start.expand(4, 20, -1), actions]))
    double = fresh(case, torch.float64)
    expected = plain(double._replace(parts=[double.parts[0].expand(4, 20, -1), actions.double()]))
    close(value, expected, 2e-6)
    grad = torch.randn_like(value)
    close(torch.autograd.grad(value, start, grad)[0], torch.autograd.grad(expected, double.parts[0], grad.double())[0], 4e-6)


@pytest.mark.parametrize("laid", [skipping, transposed])
def test_inputs_lie_in_memory_as_they_like(laid, either):
    case = make((2, 30), ((24, 3), 33, 24, 5), members=4, heads=[3, 1], dropout=True)
    layers = [tuple(part if part is None else laid(part).requires_grad_() for part in layer) for layer in case.layers]
    parts = [laid(part).requires_grad_() for part in case.parts]
    strange = case._replace(parts=parts, layers=layers, keep=laid(case.keep))
    plain_case, grad = fresh(case), laid(torch.randn(2, 2, 30, 5))
    assert torch.equal(evaluate(strange), evaluate(plain_case))
    expected = gradients(evaluate, plain_case, grad)
    for name, gradient in gradients(evaluate, strange, grad).items():
        close(gradient, expected[name], 1e-6, name)


def test_heads_lie_in_memory_as_they_like(either):
    case = make((30,), ((24, 3), 33, 5), members=4, heads=[3, 1])
    assert torch.equal(evaluate(case._replace(heads=torch.tensor([3, 2, 1, 0])[::2])), evaluate(case))
    plan = imagined(3, 30, 2)
    assert torch.equal(value_of(plan._replace(critics=torch.tensor([2, 1, 0])[::2])), value_of(plan))


def test_gradients_of_a_sum(either):
    """The gradient behind the network is then one number, expanded."""
    case = make((30,), ((7, 2), 24, 5))
    single, double = fresh(case), fresh(case, torch.float64)
    found = torch.autograd.grad(evaluate(single).sum(), list(named(single).values()))
    wanted = torch.autograd.grad(plain(double).sum(), list(named(double).values()))
    for name, one, other in zip(named(case), found, wanted, strict=True):
        close(one, other, 2e-6, name)


BIG = {"lead": (300,), "widths": ((130, 5), 64, 64, 24), "members": 3, "dropout": True, "groups": 8}
"""Enough work for three threads."""


def everything(case):
    return {"value": evaluate(case), **gradients(evaluate, case, torch.randn(3, 300, 24, generator=torch.Generator().manual_seed(1)))}


def test_addresses_have_no_influence(calls):
    """Bit for bit, or a resumed run could differ from an uninterrupted one."""
    case = make(**BIG)
    expected = everything(fresh(case))

    def moved(part):
        return None if part is None else torch.empty(part.numel() + 17)[offset : offset + part.numel()].view(part.shape).copy_(part)

    for offset in (1, 2, 3, 4, 7, 8, 12, 15, 16):
        layers = [tuple(moved(part) for part in layer) for layer in case.layers]
        other = case._replace(parts=[moved(part) for part in case.parts], layers=layers, keep=moved(case.keep))
        for part in named(other).values():
            part.requires_grad_()
        for name, value in everything(other).items():
            assert torch.equal(value, expected[name]), (offset, name)
    assert calls


def test_threads(calls):
    """Values, and gradients of inputs and weights, are the same bits for any number; sums over rows are added up thread by thread."""
    case = fresh(make(**BIG))
    expected = everything(case)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results, again = everything(case), everything(case)
        for name, value in results.items():
            assert torch.equal(value, again[name]), (threads, name)
            if re.fullmatch(r"value|x\d|\d.weight", name):
                assert torch.equal(value, expected[name]), (threads, name)
            close(value, expected[name], 2e-6, name)


def test_threads_share_latents_alike(calls):
    case = make((30, 37), ((130, 5), 64, 24), members=2)
    latents = case.parts[0][:, :1].expand_as(case.parts[0])
    case = case._replace(parts=[latents, case.parts[1]])
    with torch.no_grad():
        expected = evaluate(case)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(evaluate(case), expected)


@pytest.mark.parametrize("scoped", [False, True])
def test_python_threads_do_not_disturb_each_other(scoped, best):
    networks = [fresh(make((60,), ((24, 3), 33, 24, 5), seed=seed)) for seed in range(4)]
    grad = torch.randn(60, 5)

    def work(case):
        torch.set_num_threads(1)
        if not scoped:
            return [gradients(evaluate, case, grad) for _ in range(20)]
        with constant_parameters():
            return [gradients(evaluate, case, grad) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for case, results in zip(networks, pool.map(work, networks), strict=True):
            expected = gradients(evaluate, case, grad)
            assert all(torch.equal(result[name], expected[name]) for result in results for name in expected)


def test_inputs_stay_as_they_are(either):
    case = fresh(make((3, 30), ((24, 3), 33, 16), members=4, heads=[3, 1], dropout=True, groups=8))
    before = fresh(case)
    grad = torch.randn(2, 3, 30, 16)
    kept = grad.clone()
    evaluate(case).backward(grad)
    for name, part in named(before).items():
        assert torch.equal(named(case)[name], part), name
    assert torch.equal(case.keep, before.keep) and torch.equal(grad, kept) and case.heads.tolist() == [3, 1]


def test_results_may_be_changed_in_place(either):
    case = fresh(make((30,), ((24, 3), 33, 5)))
    grad = torch.randn(30, 5)
    expected = gradients(evaluate, case, 2 * grad)
    for name, gradient in gradients(lambda case: evaluate(case).mul_(2), case, grad).items():
        close(gradient, expected[name], 1e-6, name)
    with torch.no_grad():
        value = evaluate(case)
        assert torch.equal(evaluate(case).mul_(2), 2 * value) and torch.equal(evaluate(case), value)


def test_results_of_a_simnorm_are_part_of_its_gradient(either):
    """As those of a softmax are: changing them is noticed."""
    case = fresh(make((30,), ((24, 3), 33, 16), groups=8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        evaluate(case).mul_(2).sum().backward()


@pytest.mark.parametrize("name", ["x1", "x2", "0.weight", "1.weight", "1.ln_weight"])
def test_changes_before_the_backward_pass_are_noticed(name, fast):
    case = fresh(make((30,), ((24, 3), 33, 33, 5)))
    value = evaluate(case)
    with torch.no_grad():
        named(case)[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_two_backward_passes(either):
    case = fresh(make((30,), ((24, 3), 33, 24, 5), members=2))
    value, inputs = evaluate(case), list(named(case).values())
    grad = torch.randn_like(value)
    first = torch.autograd.grad(value, inputs, grad, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, torch.autograd.grad(value, inputs, grad), strict=True))


def test_inference_mode_leaves_nothing_behind(either):
    """What it makes cannot be kept for a backward pass, so nothing of it may be used again."""
    case = fresh(make((30,), ((24, 3), 33, 5), members=11))  # a number that no other test has
    with torch.inference_mode():
        value = evaluate(case)
    assert torch.equal(evaluate(case), value)
    check(case)


@pytest.mark.parametrize("scoped", [False, True])
def test_memory_is_on_the_cpu_whatever_the_default(scoped, fast, monkeypatch):
    case, library = fresh(make((30,), ((24, 3), 33, 5), members=12)), native.library()
    grad = torch.randn(12, 30, 5)
    expected = gradients(evaluate, case, grad)

    def looked_at(function):
        def call(net):
            assert net.members and net.layer[0].packed and net.layer[0].ready
            assert function is library.forward or net.layer[0].dh
            return function(net)

        return call

    guarded = {name: looked_at(getattr(library, name)) for name in ("forward", "backward_rows", "backward_weights")}
    monkeypatch.setattr(native, "library", lambda: library._replace(**guarded))
    with torch.device("meta"), constant_parameters() if scoped else nullcontext():
        found = gradients(evaluate, case, grad)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_rows(either):
    case = fresh(make((0,), ((24, 3), 33, 5), members=2))
    value = evaluate(case)
    assert value.shape == (2, 0, 5)
    assert (torch.autograd.grad(value.sum(), case.layers[0][0])[0] == 0).all()


def test_few_rows_are_left_to_torch(monkeypatch):
    calls = use(monkeypatch, TORCH if isinstance(native.library(), str) else native.library().name)
    monkeypatch.setattr(kernels, "NATIVE_FROM", 8)
    evaluate(make((7,), ((24, 3), 33, 5)))
    assert not calls
    evaluate(make((2, 4), ((24, 3), 33, 5)))
    assert calls or isinstance(native.library(), str)


def test_double_precision_stays_double(best):
    for case in (make((30,), ((24, 3), 33, 16), groups=8), make((30,), ((24, 3), 33, 5), members=2)):
        double = fresh(case, torch.float64)
        assert_close(evaluate(double), plain(double))
    assert not best


# Numbers out of the ordinary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("groups", [0, 8])
def test_divergence_shows(bad, groups, calls):
    """What PyTorch gives as a finite number is finite, and nothing else."""
    for place in ("x1", "x2", "0.weight", "0.bias", "1.ln_weight", "1.ln_bias", "2.weight", "2.bias"):
        case = make((20,), ((24, 3), 33, 24, 16), groups=groups)
        named(case)[place].view(-1)[5] = bad
        ours, theirs = fresh(case), fresh(case)
        value, expected = evaluate(ours), plain(theirs)
        finite, grad = expected.isfinite(), torch.ones_like(value)
        assert not finite.all() and torch.equal(value.isfinite(), finite), place
        assert_close(value[finite], expected[finite], rtol=1e-5, atol=1e-5)
        expected = gradients(plain, theirs, grad)
        for name, gradient in gradients(evaluate, ours, grad).items():
            assert torch.equal(gradient.isfinite(), expected[name].isfinite()), (place, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_divergence_shows_in_half_precision(bad, calls):
    if not native.library().bf16:
        pytest.skip("left to PyTorch, whose product takes bad numbers to other rows")
    for place in ("x1", "x2", "0.weight", "1.bias"):
        case = make((20,), ((25, 3), 33, 7))
        named(case)[place].view(-1)[5] = bad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            value = evaluate(case)
        assert torch.equal(value.isfinite(), plain(case).isfinite())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_rows_do_not_infect_each_other(bad, every):
    case = make((40,), ((24, 3), 33, 16), members=2, groups=8)
    expected = evaluate(case)
    case.parts[0][13] = bad
    value = evaluate(case)
    others = torch.arange(40) != 13
    assert value[:, 13].isnan().all() and torch.equal(value[:, others], expected[:, others])


def activation(values, rows=12):
    """A network that gives the activation of the numbers behind its first norm, and takes its gradients to the norm's bias."""
    width = len(values)
    bias = values.clone().requires_grad_()
    first = (torch.zeros(width, 3), torch.zeros(width), torch.ones(width), bias)
    return Case([torch.zeros(rows, 3)], [first, (torch.eye(width), torch.zeros(width), None, None)]), bias


def test_mish_and_its_slope_far_from_zero(every):
    numbers = torch.linspace(-60, 60, 481)
    case, bias = activation(numbers)
    double = numbers.double().requires_grad_()
    expected = F.mish(double)
    (slope,) = torch.autograd.grad(expected.sum(), double)
    value = evaluate(case)
    assert_close(value.double(), expected.detach().expand_as(value), rtol=2e-6, atol=0)
    (found,) = torch.autograd.grad(value[:1].sum(), bias)
    assert_close(found.double(), slope, rtol=2e-5, atol=1e-30 if every != TORCH else 1e-12)
    close(found, slope, 1e-6)


def test_mish_of_huge_numbers(every):
    numbers = torch.tensor([-1e10, -1e4, -100, 100, 1e4, 1e10])
    case, bias = activation(numbers)
    value = evaluate(case)
    assert_close(value, numbers.clamp(min=0).expand_as(value), rtol=1e-6, atol=1e-12)
    (slope,) = torch.autograd.grad(value[:1].sum(), bias)
    assert_close(slope, (numbers > 0).float(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4, 1e15])
def test_inputs_of_any_size(scale, every):
    """Norms divide by their size, down to that of their own constant."""
    case = make((30,), ((24, 3), 33, 16), groups=8)
    check(case._replace(parts=[part * scale for part in case.parts]), r"\d.ln.*", tolerance=5e-6)


def test_norms_of_numbers_that_hardly_differ(every):
    """A mean a thousand times the deviation costs three digits and no more."""
    case = make((30,), ((24,), 33, 5))
    first = case.layers[0]
    check(case._replace(layers=[(first[0], first[1] + 1000, *first[2:]), case.layers[1]]), "", tolerance=1e-3)


@pytest.mark.parametrize("strided", [False, True])
def test_simnorm_of_certainties(strided, every):
    """One entry of each group has all the weight; nothing overflows."""
    logits = torch.zeros(16)
    logits[[3, 14]] = torch.tensor([200.0, 1e6])
    bias = logits.clone().requires_grad_()
    layer = (torch.zeros(16, 3), torch.zeros(16), torch.ones(16), bias)
    value = kernels.mlp((torch.zeros(9, 3),), [layer], groups=8, strided=strided)
    assert_close(value, simnorm(logits, 8, strided).expand_as(value), rtol=1e-6, atol=1e-30)
    (gradient,) = torch.autograd.grad(value[0], bias, torch.randn(16))
    assert_close(gradient, torch.zeros(16), rtol=0, atol=1e-6)


# Half precision -------------------------------------------------------------------------------------------------------------


HALF = {
    "odd widths": {"lead": (33,), "widths": ((7, 3), 25, 33, 5)},
    "one column": {"lead": (20,), "widths": ((1, 1), 17, 3)},
    "one part": {"lead": (4, 9), "widths": ((31,), 24, 16), "groups": 8},
    "ensemble": {"lead": (97,), "widths": ((65, 6), 130, 24, 101), "members": 3, "heads": [2, 0]},
    "one row": {"lead": (1,), "widths": ((64, 2), 33, 5)},
    "many rows": {"lead": (1000,), "widths": ((130, 3), 130, 16), "groups": 2, "strided": True},
}


def rounded(case: Case) -> Case:
    """Double precision, but with what is multiplied first rounded to half."""
    half = fresh(case, torch.bfloat16, "")
    case = fresh(case, torch.float64, "")
    layers = [(weight.double(), *layer[1:]) for (weight, *_), layer in zip(half.layers, case.layers, strict=True)]
    return case._replace(parts=[part.double() for part in half.parts], layers=layers)


@torch.no_grad()
@pytest.mark.parametrize("shape", HALF.values(), ids=HALF)
def test_half_precision(shape, every):
    """Within 3 % of the largest number: rounding has 8 bits, and three layers add up."""
    case = make(**shape)
    expected = plain(fresh(case, torch.float64, ""))
    with torch.autocast("cpu", torch.bfloat16):
        value = evaluate(case)
    close(value, expected, 0.03)
    assert not torch.equal(value, evaluate(case))


@torch.no_grad()
@pytest.mark.parametrize("parts", [(7,), (64, 1), (33, 31), (1, 100)], ids=str)
def test_half_precision_rounds_what_it_multiplies_and_nothing_else(parts, calls):
    library = native.library()
    for rows, members in ((1, None), (13, None), (33, 3), (100, None)):
        case = make((rows,), (parts, 101), members=members)
        with torch.autocast("cpu", torch.bfloat16):
            value = evaluate(case)
        close(value, plain(rounded(case)), 1e-6 if library.bf16 else 0.01)
    assert bool(calls) == library.bf16


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 37), (1, 60), (30, 37)], ids=str)
def test_half_precision_with_shared_latents(shape, calls):
    case = make(shape, ((65, 3), 33, 24, 5), members=2)
    latents = case.parts[0][:, :1].expand_as(case.parts[0])
    shared, apart = case._replace(parts=[latents, case.parts[1]]), case._replace(parts=[latents.contiguous(), case.parts[1]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(evaluate(shared), evaluate(apart))
    close(evaluate(shared), plain(fresh(shared, torch.float64, "")), 2e-6)


@torch.no_grad()
def test_half_precision_is_the_same_for_any_number_of_threads(calls):
    case = make((600,), ((131, 5), 64, 24), members=3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(case)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(evaluate(case), expected)


@pytest.mark.parametrize("shape", HALF.values(), ids=HALF)
def test_gradients_of_half_precision(shape, every):
    """Those of the network that was evaluated, which is not quite the one in double precision."""
    case = make(**shape)
    single, double = fresh(case), fresh(case, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        value = evaluate(single)
        with torch.no_grad():
            assert torch.equal(value, evaluate(single))
    expected = plain(double)
    close(value, expected, 0.03)
    grad = torch.randn_like(value)
    expected = torch.autograd.grad(expected, list(named(double).values()), grad.double())
    for name, one, other in zip(named(single), torch.autograd.grad(value, list(named(single).values()), grad), expected, strict=True):
        close(one, other, 0.1, name)


def test_half_precision_uses_the_library_where_that_can(calls):
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(make((30,), ((24, 3), 33, 5)))
    assert bool(calls) == native.library().bf16


@torch.no_grad()
def test_other_half_precision_is_left_to_torch(best):
    with torch.autocast("cpu", torch.float16):
        evaluate(make((30,), ((24, 3), 33, 5)))
    assert not best


# Constant parameters --------------------------------------------------------------------------------------------------------


def by_loading(layer):
    layer.load_state_dict({name: value + 0.5 for name, value in layer.state_dict().items()})


def by_optimiser(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()


def by_data(layer):
    layer.weight.data = layer.weight.data + 0.5


@torch.no_grad()
def in_place(layer):
    layer.weight.mul_(2)


@pytest.mark.parametrize("change", [by_loading, by_optimiser, by_data, in_place])
@pytest.mark.parametrize("scoped", [False, True])
def test_changed_parameters_are_used(change, scoped, either):
    """By the next call outside of scopes, and by the next scope."""
    case = make((30,), ((24, 3), 33, 5))
    layer = torch.nn.Linear(33, 5)

    def both():
        layers = [case.layers[0], (layer.weight, layer.bias, None, None)]
        return evaluate(case._replace(layers=layers)), plain(case._replace(layers=layers))

    def run():
        if not scoped:
            return both()
        with constant_parameters():
            both()
            return both()

    before, _ = run()
    change(layer)
    after, expected = run()
    close(after, expected, 2e-6)
    assert (after - before).abs().max() > 0.1


def test_scopes_change_nothing_but_the_time(either):
    cases = [fresh(make((30,), ((24, 3), 33, 24, 5), seed=seed)) for seed in range(2)]
    cases.append(fresh(make((30,), ((24, 3), 33, 16), members=4, heads=[3, 1], dropout=True, groups=8)))
    grads = [torch.randn_like(evaluate(case)) for case in cases]
    expected = [gradients(evaluate, case, grad) for case, grad in zip(cases, grads, strict=True)]
    with constant_parameters():
        for _ in range(2):
            with constant_parameters():
                found = [gradients(evaluate, case, grad) for case, grad in zip(cases, grads, strict=True)]
            for one, other in zip(found, expected, strict=True):
                assert all(torch.equal(one[name], other[name]) for name in other)


def test_parts_packed_one_after_the_other(either):
    """Other heads, other gradients and other numbers of rows need other parts of what is packed."""
    case = fresh(make((30,), ((24, 3), 33, 16), members=4, heads=[3, 1], groups=8))
    grad = torch.randn(2, 30, 16)
    with constant_parameters():
        for heads, wanted, rows in (
            ([3, 1], "x1", 30),
            ([1, 0], "x2", 13),
            ([0, 2], ".*", 30),
            ([3, 1], "x1|x2", 1),
            ([2, 0], r"\d.*", 30),
        ):
            parts = [part[:rows] for part in case.parts]
            for name, part in named(case).items():
                part.requires_grad_(re.fullmatch(wanted, name) is not None)
            now = case._replace(parts=[part.detach().requires_grad_(part.requires_grad) for part in parts], heads=torch.tensor(heads))
            with torch.no_grad():
                close(evaluate(now), plain(now), 2e-6)
            expected = gradients(plain, now, grad[:, :rows])
            for name, gradient in gradients(evaluate, now, grad[:, :rows]).items():
                close(gradient, expected[name], 5e-6, name)


def other_layout(case):
    return case._replace(strided=not case.strided)


def other_groups(case):
    return case._replace(groups=2)


def other_split(case):
    both = torch.cat(case.parts, -1)
    return case._replace(parts=[both[..., :3].contiguous(), both[..., 3:].contiguous()])


def one_part(case):
    return case._replace(parts=[torch.cat(case.parts, -1)])


def other_bias(case):
    first, last = case.layers
    return case._replace(layers=[first, (last[0], last[1] + torch.linspace(0, 3, 16), *last[2:])])


def other_norm(case):
    first, last = case.layers
    return case._replace(layers=[(*first[:2], first[2] + 1, first[3]), last])


OTHERS = [other_layout, other_groups, other_split, one_part, other_bias, other_norm]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("half", [False, True])
def test_networks_with_weights_in_common(other, half, fast):
    """In one scope, a network is not taken for another that has the same weights."""
    case = make((30,), ((24, 3), 33, 16), groups=8)
    pair = [fresh(case), fresh(other(case))]
    pair[1] = pair[1]._replace(layers=[(mine[0], *theirs[1:]) for mine, theirs in zip(pair[0].layers, pair[1].layers, strict=True)])
    grad = torch.randn(30, 16)

    def results(case):
        if not half:
            return {"value": evaluate(case), **gradients(evaluate, case, grad)}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return {"value": evaluate(case)}

    expected = [results(one) for one in pair]
    with constant_parameters():
        found = [results(one) for one in pair]
    for ours, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_half_and_single_precision_in_one_scope(either):
    case = make((30,), ((24, 3), 33, 16), groups=8)
    with torch.no_grad(), constant_parameters():
        single = evaluate(case)
        with torch.autocast("cpu", torch.bfloat16):
            half = evaluate(case)
        assert torch.equal(evaluate(case), single)
        close(half, single, 0.03)
        assert not torch.equal(half, single)


def test_a_member_is_not_its_ensemble(refusing):
    """They begin at the same address; the library must not find room for one where it writes all."""
    if isinstance(native.library(), str):
        pytest.skip(native.library())
    ensemble = make((30,), ((24, 3), 33, 5), members=3)
    first = [tuple(part if part is None else part[0] for part in layer) for layer in ensemble.layers]
    rooms = []

    def recorded(params, *rest, packed=packing.packed):
        rooms.append(packed(params, *rest))
        return rooms[-1]

    with pytest.MonkeyPatch.context() as patch, constant_parameters():
        patch.setattr(packing, "packed", recorded)
        for layers in (first, ensemble.layers):
            with pytest.raises(AssertionError, match="the library was called"):
                evaluate(ensemble._replace(layers=layers))
    assert rooms[0] is not rooms[1]


def test_freed_parameters_are_not_taken_for_new_ones(either):
    with torch.no_grad(), constant_parameters():
        for seed in range(30):
            case = make((9,), ((24, 3), 33, 5), seed=seed)
            strange = case._replace(layers=[(skipping(layer[0]), *layer[1:]) for layer in case.layers])
            for one in (case, strange):
                close(evaluate(one), plain(one), 2e-6)
            del case, strange, one


def test_gradients_of_what_was_evaluated_in_an_earlier_scope(either):
    """Other networks of the same size have been packed in the meantime, perhaps in the same place."""
    case, other = (fresh(make((30,), ((24, 3), 33, 16), groups=8, seed=seed)) for seed in range(2))
    grad = torch.randn(30, 16)
    expected = gradients(evaluate, case, grad)
    for inside in (True, False):
        with constant_parameters():
            value = evaluate(case)
        with constant_parameters():
            evaluate(other).sum().backward()
            if inside:
                found = torch.autograd.grad(value, list(named(case).values()), grad)
        if not inside:
            found = torch.autograd.grad(value, list(named(case).values()), grad)
        for name, one in zip(expected, found, strict=True):
            assert torch.equal(one, expected[name]), name


def test_scopes_end_with_errors(either):
    case = make((30,), ((24, 3), 33, 5))
    with pytest.raises(ZeroDivisionError), constant_parameters(), constant_parameters():
        evaluate(case)
        1 / 0  # noqa: B018
    case.layers[1][0].mul_(2)
    close(evaluate(case), plain(case), 2e-6)


def test_networks_are_packed_once_within_nested_scopes(fast, monkeypatch):
    packs = []

    def counted(*args, pack=packing.pack):
        packs.append(args)
        return pack(*args)

    monkeypatch.setattr(packing, "pack", counted)
    case = fresh(make((30,), ((24, 3), 33, 5)))
    with constant_parameters():
        evaluate(case)
        with constant_parameters():
            evaluate(case).sum().backward()
        evaluate(case)
        assert len(packs) == 1
    evaluate(case)
    evaluate(case)
    assert len(packs) == 3


# Derivatives of derivatives, transformations, compilation ---------------------------------------------------------------------


SECOND = {
    "network": {"lead": (20,), "widths": ((7, 2), 24, 24, 5)},
    "simnorm": {"lead": (4, 5), "widths": ((7, 2), 24, 16), "groups": 8, "strided": True},
    "dropout": {"lead": (20,), "widths": ((7,), 24, 5), "dropout": True},
    "ensemble": {"lead": (20,), "widths": ((7, 2), 24, 5), "members": 3, "heads": [2, 0], "dropout": True},
}


@pytest.mark.parametrize("shape", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("wanted", [".*", r"x\d", r"x1|\d.*"])
def test_second_derivatives(shape, wanted, either):
    """A gradient penalty, whose outer loss has the value in it as well."""
    found = []
    for function, dtype in ((evaluate, torch.float32), (plain, torch.float64)):
        case = fresh(make(**shape), dtype, wanted)
        value, inputs = function(case), list(learned(case).values())
        penalty = torch.autograd.grad(value.square().sum(), case.parts[0], create_graph=True)[0].square().sum()
        found.append(dict(zip(learned(case), torch.autograd.grad(value.sum() + penalty, inputs), strict=True)))
    for name, expected in found[1].items():
        close(found[0][name], expected, 1e-5, name)


def test_third_derivatives(either):
    def third(function, dtype):
        case = fresh(make((9,), ((7,), 24, 5)), dtype)
        value = function(case).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, case.parts[0], create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    close(third(evaluate, torch.float32), third(plain, torch.float64), 1e-4)


def replaced(case, name, value):
    """The same network with another tensor of a name."""
    if name in ("keep", "heads"):
        return case._replace(**{name: value})
    if name.startswith("x"):
        return case._replace(parts=[value if f"x{index}" == name else part for index, part in enumerate(case.parts, start=1)])
    layer, part = name.split(".")
    own = list(case.layers[int(layer)])
    own[NAMES.index(part)] = value
    return case._replace(layers=[tuple(own) if index == int(layer) else other for index, other in enumerate(case.layers)])


@pytest.mark.parametrize("name", ["x1", "x2", "0.weight", "1.weight", "0.ln_bias"])
@pytest.mark.parametrize("members", [None, 2])
def test_mapped_and_derived_functions(name, members, either):
    case = fresh(make((9,), ((7, 2), 24, 16), members=members, groups=8), wanted="")
    tensor = named(case)[name]
    several = torch.stack((tensor, 0.5 * tensor, tensor - 1))

    def loss(value):
        return evaluate(replaced(case, name, value)).square().sum()

    values = torch.vmap(lambda value: evaluate(replaced(case, name, value)))(several)
    slopes = torch.func.vmap(torch.func.grad(loss))(several)
    for one, value, slope in zip(several, values, slopes, strict=True):
        double = fresh(replaced(case, name, one), torch.float64, name)
        expected = plain(double)
        close(value, expected, 2e-6)
        close(slope, torch.autograd.grad(expected.square().sum(), learned(double)[name])[0], 5e-6)
        close(torch.func.grad(loss)(one), slope, 2e-6)


MAPPED_SHAPES = {
    "network": {"lead": (20,), "widths": ((7, 2), 24, 24, 5), "dropout": True},
    "ensemble": {"lead": (4, 5), "widths": ((7, 2), 24, 16), "members": 3, "heads": [2, 0], "dropout": True, "groups": 8},
    "one layer": {"lead": (20,), "widths": ((7,), 5)},
    "one row": {"lead": (), "widths": ((7, 2), 24, 5)},
}


def tensors_of(case):
    others = {"keep": case.keep, "heads": case.heads}
    return named(case) | {name: part for name, part in others.items() if part is not None}


def with_tensors(case, tensors):
    for name, part in tensors.items():
        case = replaced(case, name, part)
    return case


def mapped(shape, pattern, seeds=3):
    """A case, its tensors, those whose names match stacked over seeds, and the dimension of each to map over."""
    cases = [make(seed=seed, **shape) for seed in range(seeds)]
    if cases[0].heads is not None:
        cases = [case._replace(heads=(case.heads + seed) % 3) for seed, case in enumerate(cases)]
    names, tensors = [name for name in tensors_of(cases[0]) if re.fullmatch(pattern, name)], tensors_of(cases[0])
    tensors |= {name: torch.stack([tensors_of(case)[name] for case in cases]) for name in names}
    for name in named(cases[0]):
        tensors[name].requires_grad_()
    return cases[0], tensors, {name: 0 if name in names else None for name in tensors}


def one_by_one(function, case, tensors, dims, seeds=3):
    """The same without mapping, in double precision, and its tensors."""
    double = {name: part.detach().double().requires_grad_() if part.requires_grad else part for name, part in tensors.items()}
    each = [{name: part if dims[name] is None else part[seed] for name, part in double.items()} for seed in range(seeds)]
    return torch.stack([function(with_tensors(case, own)) for own in each]), double


PATTERNS = [".*", r"x\d", r"\d\..*", "x1", "x2", "keep", "heads", "0.weight", "0.bias|x1"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", MAPPED_SHAPES.values(), ids=MAPPED_SHAPES)
def test_mapped_networks(shape, pattern, either):
    """As for several seeds: some tensors have one more dimension, the others are shared, and so are their gradients."""
    case, tensors, dims = mapped(shape, pattern)
    if not any(dim == 0 for dim in dims.values()):
        pytest.skip("nothing of that name here")
    value = torch.vmap(lambda own: evaluate(with_tensors(case, own)), in_dims=(dims,))(tensors)
    expected, double = one_by_one(plain, case, tensors, dims)
    close(value, expected, 2e-6)
    names, grad = [name for name, part in tensors.items() if part.requires_grad], torch.randn_like(value)
    found = torch.autograd.grad(value, [tensors[name] for name in names], grad)
    wanted = torch.autograd.grad(expected, [double[name] for name in names], grad.double())
    for name, one, other in zip(names, found, wanted, strict=True):
        close(one, other, 5e-6, name)
    with torch.no_grad():
        close(torch.vmap(lambda own: evaluate(with_tensors(case, own)), in_dims=(dims,))(tensors), value, 0 if either != TORCH else 1e-6)


def test_mapped_networks_are_one_call(fast):
    case, tensors, dims = mapped(MAPPED_SHAPES["ensemble"], ".*")
    value = torch.vmap(lambda own: evaluate(with_tensors(case, own)), in_dims=(dims,))(tensors)
    value.sum().backward()
    assert fast == ["forward", "backward_rows", "backward_weights"]


def test_second_derivatives_of_mapped_networks(either):
    case, tensors, dims = mapped(MAPPED_SHAPES["network"], ".*")

    def penalty(value, tensors):
        inputs = [part for part in tensors.values() if part.requires_grad]
        slope = torch.autograd.grad(value.square().sum(), tensors["x1"], create_graph=True)[0]
        return torch.autograd.grad(value.sum() + slope.square().sum(), inputs)

    value = torch.vmap(lambda own: evaluate(with_tensors(case, own)), in_dims=(dims,))(tensors)
    for one, other in zip(penalty(value, tensors), penalty(*one_by_one(plain, case, tensors, dims)), strict=True):
        close(one, other, 1e-5)


def test_networks_mapped_along_other_dimensions(either):
    case = make((9,), ((7, 2), 24, 5))
    several = torch.randn(9, 3, 7)
    value = torch.vmap(lambda x: evaluate(replaced(case, "x1", x)), in_dims=1, out_dims=1)(several)
    close(value, torch.stack([plain(replaced(case, "x1", x)) for x in several.unbind(1)], 1), 2e-6)
    weights = torch.randn(24, 9, 3)
    value = torch.vmap(lambda weight: evaluate(replaced(case, "0.weight", weight)), in_dims=2)(weights)
    for one, weight in zip(value, weights.unbind(2), strict=True):
        close(one, plain(replaced(case, "0.weight", weight)), 2e-6)


def test_networks_mapped_twice(either):
    case, several, weights = make((9,), ((7, 2), 24, 5)), torch.randn(2, 9, 7), torch.randn(3, 24, 9)

    def value(x, weight):
        return evaluate(replaced(replaced(case, "x1", x), "0.weight", weight))

    found = torch.vmap(torch.vmap(value, in_dims=(0, None)), in_dims=(None, 0))(several, weights)
    for row, weight in zip(found, weights, strict=True):
        for one, x in zip(row, several, strict=True):
            close(one, plain(replaced(replaced(case, "x1", x), "0.weight", weight)), 2e-6)


def test_mapped_networks_in_a_scope(either):
    """Shared tensors are repeated for the library, in new memory each time."""
    with constant_parameters():
        for pattern in (".*", r"x\d", r"\d\..*", "1.weight"):
            for shape in (MAPPED_SHAPES["network"], MAPPED_SHAPES["ensemble"]):
                case, tensors, dims = mapped(shape, pattern)
                for _ in range(2):
                    value = torch.vmap(lambda own, case=case: evaluate(with_tensors(case, own)), in_dims=(dims,))(tensors)
                    expected, double = one_by_one(plain, case, tensors, dims)
                    close(value, expected, 2e-6)
                    found = torch.autograd.grad(value.square().sum(), tensors["1.weight"])[0]
                    close(found, torch.autograd.grad(expected.square().sum(), double["1.weight"])[0], 5e-6)


def test_mapped_networks_with_shared_latents(either):
    case = make((4, 15), ((24, 3), 33, 5))
    latents, actions = torch.randn(3, 4, 24), torch.randn(3, 4, 15, 3)

    def value(latent, action):
        return evaluate(case._replace(parts=[latent[:, None].expand(4, 15, -1), action]))

    with torch.no_grad():
        for one, latent, action in zip(torch.vmap(value)(latents, actions), latents, actions, strict=True):
            close(one, plain(case._replace(parts=[latent[:, None].expand(4, 15, -1), action])), 2e-6)
        for one, action in zip(torch.vmap(value, in_dims=(None, 0))(latents[0], actions), actions, strict=True):
            close(one, plain(case._replace(parts=[latents[0][:, None].expand(4, 15, -1), action])), 2e-6)


def test_mapped_networks_in_half_precision(either):
    case, tensors, dims = mapped(MAPPED_SHAPES["network"], ".*")
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.vmap(lambda own: evaluate(with_tensors(case, own)), in_dims=(dims,))(tensors)
    close(value, one_by_one(plain, case, tensors, dims)[0], 0.03)


def test_jacobians(either):
    case = fresh(make((3,), ((7,), 24, 5)), wanted="")

    def value(x):
        return evaluate(case._replace(parts=[x]))

    double = fresh(case, torch.float64, "")
    expected = torch.autograd.functional.jacobian(lambda x: plain(double._replace(parts=[x])), double.parts[0])
    close(torch.func.jacrev(value)(case.parts[0]), expected, 5e-6)
    close(torch.func.jacfwd(value)(case.parts[0]), expected, 5e-6)
    close(torch.autograd.functional.jacobian(value, case.parts[0]), expected, 5e-6)


def test_batches_of_gradients(either):
    case = fresh(make((9,), ((7, 2), 24, 5)))
    value, inputs = evaluate(case), list(named(case).values())
    grads = torch.randn(3, 9, 5)
    expected = [torch.autograd.grad(value, inputs, grad, retain_graph=True) for grad in grads]
    batched = torch.autograd.grad(value, inputs, grads, is_grads_batched=True)
    for name, several, one in zip(named(case), batched, zip(*expected, strict=True), strict=True):
        close(several, torch.stack(one), 2e-6, name)


def test_compiled_as_one_graph(best):
    """A network, an ensemble and a rollout, with their gradients, by PyTorch's functions."""
    network = fresh(make((20,), ((7, 2), 24, 24, 5), dropout=True))
    ensemble = fresh(make((2, 10), ((7, 2), 24, 16), members=3, heads=[2, 0], groups=8, strided=True))
    dynamics, actions = rolled((20,), 2)
    dynamics = fresh(dynamics, wanted=r"x1|\d.*")
    tensors = [tensors_of(case) for case in (network, ensemble, dynamics)]
    inputs = [part for own in tensors for part in own.values() if part.requires_grad]

    def function(tensors):
        first, second, third = (with_tensors(case, own) for case, own in zip((network, ensemble, dynamics), tensors, strict=True))
        return evaluate(first), evaluate(second), roll(third, actions)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    values = compiled(tensors)
    found = torch.autograd.grad(sum(value.square().sum() for value in values), inputs)
    assert not best
    expected = function(tensors)
    for one, other in zip(values, expected, strict=True):
        close(one, other, 2e-6)
    for one, other in zip(found, torch.autograd.grad(sum(value.square().sum() for value in expected), inputs), strict=True):
        close(one, other, 5e-6)
    with torch.no_grad():
        for one, other in zip(compiled(tensors), expected, strict=True):
            close(one, other, 2e-6)


# What is refused, or left to PyTorch ------------------------------------------------------------------------------------------


def with_layer(case, index, **parts):
    own = dict(zip(NAMES, case.layers[index], strict=True)) | parts
    return case._replace(layers=[tuple(own.values()) if place == index else layer for place, layer in enumerate(case.layers)])


SMALL = make((30,), ((24, 3), 33, 16), members=3, heads=[2, 0], dropout=True, groups=8)
ALONE = make((30,), ((24, 3), 33, 16), groups=8)
BY_TWO = make((2, 9), ((24, 3), 33, 16))
WRONG = {
    "narrow input": ALONE._replace(parts=[ALONE.parts[0][:, :20], ALONE.parts[1]]),
    "one part missing": ALONE._replace(parts=ALONE.parts[:1]),
    "more rows in the first part": ALONE._replace(parts=[torch.randn(31, 24), ALONE.parts[1]]),
    "more rows in the second part": ALONE._replace(parts=[ALONE.parts[0], torch.randn(31, 3)]),
    "twice the rows in the second part": ALONE._replace(parts=[ALONE.parts[0], torch.randn(60, 3)]),
    "half the rows in the second part": ALONE._replace(parts=[ALONE.parts[0], torch.randn(15, 3)]),
    "rows in another order": BY_TWO._replace(parts=[BY_TWO.parts[0], torch.randn(9, 2, 3)]),
    "double second part": ALONE._replace(parts=[ALONE.parts[0], ALONE.parts[1].double()]),
    "double weight": with_layer(ALONE, 1, weight=torch.randn(16, 33).double()),
    "double bias": with_layer(ALONE, 1, bias=torch.randn(16).double()),
    "weights that do not follow each other": with_layer(ALONE, 1, weight=torch.randn(16, 30)),
    "short bias": with_layer(ALONE, 0, bias=torch.randn(30)),
    "short norm": with_layer(ALONE, 0, ln_weight=torch.randn(30), ln_bias=torch.randn(30)),
    "short bias of the norm": with_layer(ALONE, 1, ln_bias=torch.randn(10)),
    "fewer members in a layer": with_layer(SMALL, 1, weight=torch.randn(2, 16, 33)),
    "no such head": SMALL._replace(heads=torch.tensor([3, 0])),
    "negative head": SMALL._replace(heads=torch.tensor([0, -1])),
    "heads that are no numbers of heads": SMALL._replace(heads=torch.tensor([0.0, 1.0])),
    "dropout of fewer rows": SMALL._replace(keep=SMALL.keep[:, :20]),
    "dropout of narrower layers": SMALL._replace(keep=SMALL.keep[..., :20]),
    "dropout of fewer heads": SMALL._replace(keep=SMALL.keep[:1]),
    "dropout in double precision": SMALL._replace(keep=SMALL.keep.double()),
    "groups that do not fit": ALONE._replace(groups=7),
    "parameters elsewhere": ALONE._replace(layers=[tuple(part.to("meta") for part in layer) for layer in ALONE.layers]),
    "second part elsewhere": ALONE._replace(parts=[ALONE.parts[0], ALONE.parts[1].to("meta")]),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_by_torch(case, refusing):
    """The library reads memory unasked: it must not be called with anything but what it expects."""
    with pytest.raises((RuntimeError, IndexError)):
        evaluate(case)


def test_wrong_widths_are_named_by_torch():
    case = make((30,), ((24,), 33, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(case._replace(parts=[case.parts[0][:, :20]]))
    with pytest.raises(RuntimeError, match="same dtype"):
        evaluate(case._replace(parts=[case.parts[0].double()]))


UNUSUAL = {
    "nine layers": make((30,), ((7, 2), *[24] * 8, 5)),
    "a linear layer in the middle": ALONE._replace(layers=[(*ALONE.layers[0][:2], None, None), ALONE.layers[1]]),
    "heads of 32 bits": SMALL._replace(heads=SMALL.heads.int()),
}


@pytest.mark.parametrize("case", UNUSUAL.values(), ids=UNUSUAL)
def test_what_the_library_cannot_do_is_left_to_torch(case, refusing):
    check(case, tolerance=5e-6)


@pytest.mark.parametrize("parts", [(7, 2, 3), (7, 0), (0, 7)], ids=str)
def test_any_parts(parts, either):
    check(make((30,), (parts, 24, 5)), r"\d.*")


def test_dropout_as_a_mask(refusing):
    mask = SMALL.keep > 0
    close(evaluate(SMALL._replace(keep=mask)), plain(fresh(SMALL._replace(keep=mask), torch.float64, "")), 2e-6)


def test_dropout_may_have_gradients(refusing):
    found = []
    for function, dtype in ((evaluate, torch.float32), (plain, torch.float64)):
        case = fresh(SMALL, dtype)
        keep = case.keep.requires_grad_()
        found.append(torch.autograd.grad(function(case).square().sum(), keep)[0])
    close(*found, 5e-6)


def test_reasons_for_doing_without(monkeypatch):
    if isinstance(native.library(), str):
        pytest.skip(native.library())
    with monkeypatch.context() as patch, pytest.raises(native.Unavailable, match="win32"):
        patch.setattr("sys.platform", "win32")
        native._load()
    with monkeypatch.context() as patch, pytest.raises(native.Unavailable, match="arm64"):
        patch.setattr("platform.machine", lambda: "arm64")
        native._load()
    with monkeypatch.context() as patch, pytest.raises(native.Unavailable, match="AVX2"):
        patch.setattr(native, "VARIANTS", {"avx2": ("no such flag",)})
        native._load()
    with monkeypatch.context() as patch, pytest.raises(native.Unavailable, match="not compiled"):
        patch.setattr(native, "VARIANTS", {"no_such_file": ()})
        native._load()


# Rollouts -------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """Arguments of ``kernels.rollout``: the first input of a network is its start, the second gets a dimension of steps."""

    case: Case
    actions: Tensor


def rolled(lead, steps, *, widths=(33, 24), action=3, groups=8, strided=False) -> Rollout:
    last = widths[-1]
    case = make(lead, ((last, action), *widths), groups=groups, strided=strided)
    return Rollout(case, torch.randn(steps, *lead, action, generator=torch.Generator().manual_seed(2)))


def roll(case, actions):
    return kernels.rollout(case.parts[0], actions, Network(case.layers, case.groups, case.strided))


def loop(case, actions):
    zs = [case.parts[0]]
    for action in actions.to(zs[0].dtype):
        zs.append(plain(case._replace(parts=[zs[-1], action])))
    return torch.stack(zs)


def check_rollout(rollout, wanted=r"x1|\d.*", tolerance=2e-6):
    case, actions = rollout
    single, double = fresh(case, torch.float32, wanted), fresh(case, torch.float64, wanted)
    zs, expected = roll(single, actions), loop(double, actions)
    close(zs, expected, tolerance)
    with torch.no_grad():
        assert torch.equal(roll(single, actions), zs)
    if wanted:
        grad = torch.randn(zs.shape, generator=torch.Generator().manual_seed(1))
        found, expected = (gradients(lambda case, f=f: f(case, actions), one, grad) for f, one in ((roll, single), (loop, double)))
        for name, gradient in expected.items():
            close(found[name], gradient, 2 * tolerance, name)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("lead", [(), (1,), (13,), (4, 9), (300,)], ids=str)
def test_rollout_equals_single_steps(steps, lead, every):
    check_rollout(rolled(lead, steps))
    check_rollout(rolled(lead, steps, widths=(65, 24, 12), action=1, groups=2, strided=True))


def test_one_call_for_the_weights_of_all_steps(fast):
    case, actions = rolled((20,), 3)
    roll(fresh(case), actions).sum().backward()
    assert fast == ["forward"] * 3 + ["backward_rows"] * 3 + ["backward_weights"]


@pytest.mark.parametrize("wanted", ["x1", r"\d.*", r"\d.bias", r"1\..*", "0.weight", r"\d.ln_.*", "x1|1.weight", ""])
def test_only_wanted_gradients_of_a_rollout(wanted, either):
    check_rollout(rolled((20,), 3), wanted)


def test_gradients_of_one_latent_of_a_rollout(either):
    """Each of them, so that no step's gradient depends on that of another being there."""
    case, actions = rolled((20,), 3)
    single, double = fresh(case, wanted=r"x1|\d.*"), fresh(case, torch.float64, r"x1|\d.*")
    grad = torch.randn(20, 24)
    for step in range(4):
        parameters = [name for name in learned(single) if step or name == "x1"]
        found, wanted = (
            torch.autograd.grad(function(one, actions)[step], [named(one)[name] for name in parameters], grad.to(one.parts[0].dtype))
            for function, one in ((roll, single), (loop, double))
        )
        for name, one, other in zip(parameters, found, wanted, strict=True):
            close(one, other, 5e-6, name)


def test_gradients_of_actions(either):
    case, actions = rolled((20,), 3)
    found = []
    for function, dtype in ((roll, torch.float32), (loop, torch.float64)):
        one, own = fresh(case, dtype, r"x1|\d.*"), actions.to(dtype, copy=True).requires_grad_()
        found.append(torch.autograd.grad(function(one, own).square().sum(), [own, *learned(one).values()]))
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-5)


def test_rollout_from_strange_places(either):
    case, actions = rolled((4, 9), 3)
    strange = case._replace(parts=[transposed(case.parts[0])], layers=[tuple(map(skipping, layer)) for layer in case.layers])
    expected = roll(case, actions)
    assert torch.equal(roll(strange, transposed(actions)), expected)
    start = case.parts[0][:, :1]
    shared = roll(case._replace(parts=[start.expand(4, 9, -1)]), actions)
    close(shared, loop(case._replace(parts=[start.expand(4, 9, -1)]), actions), 2e-6)


def test_rollout_leaves_its_inputs_as_they_are(either):
    case, actions = rolled((20,), 3)
    case, kept = fresh(case), actions.clone()
    before = fresh(case)
    zs = roll(case, actions)
    grad = torch.randn_like(zs)
    same = grad.clone()
    torch.autograd.grad(zs, list(learned(case._replace(parts=case.parts[:1])).values()), grad)
    assert all(torch.equal(one, other) for one, other in zip(named(case).values(), named(before).values(), strict=True))
    assert torch.equal(actions, kept) and torch.equal(grad, same)
    with torch.no_grad():
        roll(case, actions).zero_()
    assert torch.equal(case.parts[0], before.parts[0])


def test_rollout_with_any_number_of_threads(fast):
    case, actions = rolled((100,), 3, widths=(64, 64, 24))
    case = fresh(case, wanted=r"x1|\d.*")

    def results():
        return {
            "value": roll(case, actions),
            **gradients(lambda case: roll(case, actions), case, torch.ones(4, 100, 24) * case.parts[0].detach()),
        }

    expected = results()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found, again = results(), results()
        for name, value in found.items():
            assert torch.equal(value, again[name]), (threads, name)
            if re.fullmatch(r"value|x\d|\d.weight", name):
                assert torch.equal(value, expected[name]), (threads, name)
            close(value, expected[name], 5e-6, name)


def test_second_derivatives_of_a_rollout(either):
    """Of start and parameters, with the latents themselves in the outer loss."""
    found = []
    for function, dtype in ((roll, torch.float32), (loop, torch.float64)):
        case, actions = rolled((20,), 3)
        case = fresh(case, dtype, r"x1|\d.*")
        zs = function(case, actions)
        penalty = torch.autograd.grad(zs.square().sum(), case.parts[0], create_graph=True)[0].square().sum()
        found.append(dict(zip(learned(case), torch.autograd.grad(zs.pow(3).sum() + penalty, list(learned(case).values())), strict=True)))
    for name, expected in found[1].items():
        close(found[0][name], expected, 1e-5, name)


@pytest.mark.parametrize("name", ["x1", "0.weight", "1.ln_bias"])
def test_mapped_and_derived_rollouts(name, either):
    case, actions = rolled((9,), 2)
    tensor = named(case)[name]
    several = torch.stack((tensor, 0.5 * tensor))

    def loss(value):
        return roll(replaced(case, name, value), actions).square().sum()

    for one, slope in zip(several, torch.func.vmap(torch.func.grad(loss))(several), strict=True):
        double = fresh(replaced(case, name, one), torch.float64, name)
        close(slope, torch.autograd.grad(loop(double, actions).square().sum(), learned(double)[name])[0], 5e-6)


@pytest.mark.parametrize("pattern", ["x1|.*weight|.*bias", "x1", r"\d\..*", "1.weight", ""])
@pytest.mark.parametrize("actions_too", [False, True])
def test_mapped_rollouts(pattern, actions_too, every):
    if not pattern and not actions_too:
        pytest.skip("nothing to map over")
    shape = {"lead": (9,), "widths": ((24, 3), 33, 24), "groups": 8}
    case, tensors, dims = mapped(shape, pattern)
    tensors.pop("x2")
    dims.pop("x2")
    actions = torch.randn(3, 2, 9, 3) if actions_too else torch.randn(2, 9, 3)

    def latents(own, actions):
        return roll(with_tensors(case, own), actions)

    zs = torch.vmap(latents, in_dims=(dims, 0 if actions_too else None))(tensors, actions)
    every = iter(actions if actions_too else [actions] * 3)
    expected, double = one_by_one(lambda own: loop(own, next(every)), case, tensors, dims)
    close(zs, expected, 5e-6)
    grad = torch.randn_like(zs)
    found = torch.autograd.grad(zs, list(tensors.values()), grad)
    for name, one, other in zip(tensors, found, torch.autograd.grad(expected, list(double.values()), grad.double()), strict=True):
        close(one, other, 1e-5, name)


def test_mapped_rollout_sums_over_steps_in_one_call_or_many(fast):
    case, tensors, dims = mapped({"lead": (9,), "widths": ((24, 3), 33, 24), "groups": 8}, "x1|.*weight|.*bias")
    tensors.pop("x2")
    dims.pop("x2")
    torch.vmap(lambda own: roll(with_tensors(case, own), torch.randn(2, 9, 3)), in_dims=(dims,), randomness="same")(
        tensors
    ).sum().backward()
    assert fast.count("forward") == fast.count("backward_rows") == 2


def test_rollout_in_half_precision(every):
    case, actions = rolled((33,), 3, widths=(65, 24))
    single, double = (fresh(case, dtype, r"x1|\d.*") for dtype in (torch.float32, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        zs = roll(single, actions)
    expected, grad = loop(double, actions), torch.randn_like(zs)
    close(zs, expected, 0.03)
    assert not torch.equal(zs, roll(single, actions))
    found = torch.autograd.grad(zs, list(learned(single).values()), grad)
    for name, one, other in zip(
        learned(double), found, torch.autograd.grad(expected, list(learned(double).values()), grad.double()), strict=True
    ):
        close(one, other, 0.1, name)


def test_rollouts_in_one_scope(either):
    """With single steps of the same network, forward and backward, whose gradients reach the actions."""
    case, actions = rolled((20,), 3)
    case = fresh(case)
    with constant_parameters():
        for wanted in (r"x1|\d.*", "x2", "x1"):
            check_rollout(Rollout(case, actions))
            check(case, wanted)
            for name, part in named(case).items():
                part.requires_grad_(re.fullmatch(wanted, name) is not None)
            double = fresh(case, torch.float64, wanted)
            grad = torch.randn(20, 24)
            expected = gradients(plain, double, grad)
            for name, gradient in gradients(evaluate, case, grad).items():
                close(gradient, expected[name], 4e-6, name)


ROLLED, STEPS = rolled((20,), 3)
WRONG_ROLLOUTS = {
    "fewer actions than latents": (ROLLED, STEPS[:, :15]),
    "more actions than latents": (ROLLED, torch.randn(3, 21, 3)),
    "wide actions": (ROLLED, torch.randn(3, 20, 4)),
    "double actions": (ROLLED, STEPS.double()),
    "a result of another width": (
        with_layer(ROLLED, 1, weight=torch.randn(16, 33), bias=torch.randn(16), ln_weight=torch.ones(16), ln_bias=torch.ones(16)),
        STEPS,
    ),
    "groups that do not fit": (ROLLED._replace(groups=7), STEPS),
}


@pytest.mark.parametrize(("case", "actions"), WRONG_ROLLOUTS.values(), ids=WRONG_ROLLOUTS)
def test_rollouts_that_do_not_fit_are_refused_by_torch(case, actions, refusing):
    with pytest.raises((RuntimeError, IndexError)):
        roll(case, actions)


# Returns of imagined sequences ----------------------------------------------------------------------------------------------


class Definition:
    """A world model in double precision, evaluated as it is defined."""

    def __init__(self, model):
        self.model = model

    def network(self, net, *parts, heads=None):
        groups, strided = getattr(net, "groups", 0), getattr(net, "strided", False)
        layers = [tuple(part if part is None else part.double() for part in layer) for layer in net.network().layers]
        return plain(Case(list(parts), layers, heads=heads, groups=groups, strided=strided))

    def step(self, z, action):
        model = self.model
        following, cont = self.network(model.dynamics, z, action), torch.ones(z.shape[:-1], dtype=z.dtype)
        if model.termination is not None:
            terminated = self.network(model.termination, following).squeeze(-1).sigmoid()
            cont = 1 - ((terminated > 0.5).double() if model.config.continuation == "hard" else terminated)
        return ModelStep(following, model.two_hot.decode(self.network(model.reward, z, action)), cont)

    def terminal_value(self, z, eps, critics):
        mean, log_std = self.network(self.model.pi, z).chunk(2, -1)
        low, high = self.model.config.log_std_min, self.model.config.log_std_max
        action = torch.tanh(mean + eps * (low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)).exp())
        return self.model.two_hot.decode(self.network(self.model.q, z, action, heads=critics)).mean(0)


class Plan(NamedTuple):
    """Arguments of ``rollout_return``, the start not expanded yet."""

    model: WorldModel
    z: Tensor
    actions: Tensor
    discount: float
    eps: Tensor
    critics: Tensor


def imagined(envs, samples, horizon, *, terminates=False, action=3, critics=(2, 0), **config) -> Plan:
    sizes = {"enc_dim": 16, "mlp_dim": 40, "latent_dim": 24, "num_enc_layers": 2, "num_q": 3, "vmin": -3, "vmax": 3} | config
    model = WorldModel(ModelConfig(**sizes), 7, action, terminates=terminates).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    actions, eps = torch.randn(horizon, envs, samples, action).clamp(-1, 1), torch.randn(envs, samples, action)
    return Plan(model, model.encode(torch.randn(envs, 7)), actions, 0.97, eps, torch.tensor(critics))


@torch.no_grad()
def value_of(plan: Plan) -> Tensor:
    starts = plan.z[:, None].expand(*plan.eps.shape[:2], -1)
    return rollout_return(plan.model, starts, *plan[2:])


@torch.no_grad()
def check_returns(plan: Plan, tolerance=1e-5):
    z, actions, eps = (part.double() for part in (plan.z, plan.actions, plan.eps))
    starts = z[:, None].expand(*eps.shape[:2], -1)
    close(value_of(plan), rollout_return(Definition(plan.model), starts, actions, plan.discount, eps, plan.critics), tolerance)


IMAGINED = {
    "short": {"horizon": 1},
    "long": {"horizon": 7},
    "soft end": {"horizon": 3, "terminates": True},
    "hard end": {"horizon": 3, "terminates": True, "continuation": "hard"},
    "neighbours": {"horizon": 3, "simnorm_layout": "consecutive", "simnorm_dim": 4},
    "few bins": {"horizon": 3, "num_bins": 5},
    "bins of whole vectors": {"horizon": 3, "num_bins": 32},
    "one action": {"horizon": 3, "action": 1},
    "many actions": {"horizon": 2, "action": 38, "latent_dim": 16},
    "wide": {"horizon": 2, "mlp_dim": 130, "latent_dim": 136},
    "wide latents": {"horizon": 2, "mlp_dim": 16, "latent_dim": 136, "terminates": True},
    "one critic twice": {"horizon": 3, "critics": (1, 1)},
    "three critics": {"horizon": 3, "critics": (1, 2, 0)},
    "far bins": {"horizon": 3, "vmin": -10, "vmax": 10},
}


@pytest.mark.parametrize("shape", IMAGINED.values(), ids=IMAGINED)
def test_returns(shape, every):
    for envs, samples in ((3, 37), (1, 24)):
        check_returns(imagined(envs, samples, **shape))


def test_returns_are_one_call(fast):
    value_of(imagined(2, 30, 3))
    assert fast[-1:] == ["returns"] and fast.count("returns") == 1 and set(fast[:-1]) <= {"forward"}


def test_returns_of_many(every):
    """More than a thread keeps in its cache at once."""
    check_returns(imagined(3, 700, 2))


def test_returns_of_starts_that_differ(either):
    plan = imagined(3, 30, 2)
    z = torch.randn(3, 30, 24).softmax(-1)
    with torch.no_grad():
        value = rollout_return(plan.model, z, *plan[2:])
        expected = rollout_return(Definition(plan.model), z.double(), plan.actions.double(), plan.discount, plan.eps.double(), plan.critics)
    close(value, expected, 2e-6)


def test_returns_with_gradients(either):
    plan = imagined(3, 30, 2)
    found = []
    for model, dtype in ((plan.model, torch.float32), (Definition(plan.model), torch.float64)):
        z, actions, eps = (part.to(dtype, copy=True) for part in (plan.z, plan.actions, plan.eps))
        value = rollout_return(model, z[:, None].expand(3, 30, -1), actions.requires_grad_(), plan.discount, eps, plan.critics)
        found.append(torch.autograd.grad(value.sum(), actions)[0])
    close(*found, 1e-5)


def test_returns_from_strange_places(either):
    plan = imagined(3, 30, 2)
    expected = value_of(plan)
    assert torch.equal(value_of(plan._replace(z=skipping(plan.z), actions=transposed(plan.actions), eps=transposed(plan.eps))), expected)
    moved = [torch.cat((torch.zeros(1), part.reshape(-1)))[1:].view(part.shape) for part in (plan.z, plan.actions, plan.eps)]
    assert torch.equal(value_of(plan._replace(z=moved[0], actions=moved[1], eps=moved[2])), expected)


def test_returns_leave_everything_as_it_was(either):
    plan = imagined(3, 30, 2, terminates=True)
    before = copy.deepcopy(plan)
    value_of(plan)
    assert all(torch.equal(one, other) for one, other in zip(plan.model.parameters(), before.model.parameters(), strict=True))
    assert all(torch.equal(getattr(plan, name), getattr(before, name)) for name in ("z", "actions", "eps", "critics"))


def test_returns_with_any_number_of_threads(calls):
    plan = imagined(3, 300, 2, terminates=True)
    expected = value_of(plan)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(value_of(plan), expected)


def test_returns_in_a_scope(either):
    plans = [imagined(3, 30, 2, terminates=True) for _ in range(2)]
    expected = [value_of(plan) for plan in plans]
    with constant_parameters():
        for _ in range(2):
            assert all(torch.equal(value_of(plan), wanted) for plan, wanted in zip(plans, expected, strict=True))
        for plan in plans:  # the same parameters for other numbers of rows, heads, and with gradients of the input
            check_returns(plan._replace(critics=torch.tensor([1])))
            z, action = plan.z.clone().requires_grad_(), plan.actions[0, :, 0]
            (found,) = torch.autograd.grad(plan.model.q_values(z, action).sum(), z)
            with pytest.MonkeyPatch.context() as patch:
                use(patch, TORCH)
                close(found, torch.autograd.grad(plan.model.q_values(z, action).sum(), z)[0], 5e-6)
    for plan in plans:
        plan.model.reward[-1].bias.add_(torch.linspace(-1, 1, 101))
        check_returns(plan)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_diverged_returns(bad, calls):
    """They are as finite as the parts one by one."""
    for change in ("z", "actions", "eps", "reward", "q", "pi", "termination"):
        plan = imagined(3, 30, 2, terminates=True)
        if change in ("z", "actions", "eps"):
            getattr(plan, change).view(-1)[5] = bad
        else:
            list(getattr(plan.model, change).parameters())[-1].view(-1)[0] = bad
        found = value_of(plan)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, TORCH)
            expected = value_of(plan)
        assert torch.equal(found.isfinite(), expected.isfinite()), change


def test_returns_in_half_precision(every):
    """Within 5 % of the largest number, over two steps and a bootstrap."""
    plan = imagined(3, 100, 2, latent_dim=40, terminates=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = value_of(plan)
        check_returns(plan, 0.05)
    assert not torch.equal(value, value_of(plan))


WRONG_RETURNS = {
    "fewer noises": lambda plan: plan._replace(eps=plan.eps[:, :, :2]),
    "fewer samples in the actions": lambda plan: plan._replace(actions=plan.actions[:, :, :20]),
    "fewer environments in the actions": lambda plan: plan._replace(actions=plan.actions[:, :2]),
    "wide actions": lambda plan: plan._replace(actions=torch.randn(2, 3, 30, 4)),
    "wide latents": lambda plan: plan._replace(z=torch.randn(3, 25)),
    "double actions": lambda plan: plan._replace(actions=plan.actions.double()),
    "no such critic": lambda plan: plan._replace(critics=torch.tensor([0, 3])),
}


@pytest.mark.parametrize("change", WRONG_RETURNS.values(), ids=WRONG_RETURNS)
def test_returns_that_do_not_fit_are_refused_by_torch(change, either):
    plan = imagined(3, 30, 2)
    with pytest.raises((RuntimeError, IndexError)):
        value_of(change(plan))


STARTS = {"more environments": (4, 30), "fewer environments": (2, 30), "one environment": (1, 30), "more samples": (3, 31)}


@pytest.mark.parametrize("shape", STARTS.values(), ids=STARTS)
def test_returns_of_other_starts_than_actions_are_refused_by_torch(shape, either):
    """The library would read actions that are not there."""
    plan = imagined(3, 30, 2)
    starts = torch.randn(shape[0], 1, 24).expand(*shape, -1)
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
        rollout_return(plan.model, starts, *plan[2:])
