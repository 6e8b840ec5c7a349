"""Proposals of the policy prior: whole sequences by the library equal step by step in double precision."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.libraries import TORCH, close, skipping, transposed, use
from worldmpc.config import ModelConfig
from worldmpc.models import native
from worldmpc.models.packing import constant_parameters
from worldmpc.models.world_model import WorldModel
from worldmpc.planners import propose


def make(envs=3, samples=8, horizon=3, action=3, kind=WorldModel, **config):
    """A model, starts [E, Z] and noise [H, E, P, A]."""
    sizes = {"enc_dim": 16, "mlp_dim": 40, "latent_dim": 24, "num_enc_layers": 2, "num_q": 3, "log_std_max": 0} | config
    model = kind(ModelConfig(**sizes), 7, action).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model, model.encode(torch.randn(envs, 7)), torch.randn(horizon, envs, samples, action)


def stepwise(model, z, eps):
    """In double precision, which no library takes."""
    return propose(copy.deepcopy(model).double(), z.double(), eps.double())


@torch.no_grad()
def check(model, z, eps, tolerance=2e-5):
    close(propose(model, z, eps), stepwise(model, z, eps), tolerance)


@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("samples", [1, 8, 24])
@pytest.mark.parametrize("horizon", [1, 3])
def test_proposals(envs, samples, horizon, every):
    check(*make(envs, samples, horizon))


SHAPES = {
    "one action": {"action": 1},
    "many actions": {"action": 38, "latent_dim": 16},
    "actions of whole vectors": {"action": 16},
    "neighbours": {"simnorm_layout": "consecutive", "simnorm_dim": 4},
    "wide": {"mlp_dim": 130, "latent_dim": 136},
    "wide latents": {"mlp_dim": 16, "latent_dim": 136},
    "bounds": {"log_std_min": -2, "log_std_max": 1},
    "long": {"horizon": 9},
    "many": {"samples": 700},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_proposals_of_any_shape(shape, every):
    check(*make(**shape), tolerance=5e-5)


def test_proposals_are_one_call(calls):
    model, z, eps = make()
    calls.clear()
    with torch.no_grad():
        propose(model, z, eps)
    assert calls == ["proposals"]


def test_no_proposals(either):
    model, z, eps = make(samples=0)
    assert propose(model, z, eps).shape == (3, 3, 0, 3)


@torch.no_grad()
def test_proposals_in_half_precision(every):
    """Within 5 % of the range of actions, over three steps."""
    model, z, eps = make(samples=24, latent_dim=40)
    with torch.autocast("cpu", torch.bfloat16):
        actions = propose(model, z, eps)
    close(actions, stepwise(model, z, eps), 0.1)
    assert (actions - stepwise(model, z, eps)).abs().mean() < 0.01
    assert not torch.equal(actions, propose(model, z, eps))


def test_half_precision_uses_the_library_where_that_can(calls):
    model, z, eps = make()
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        propose(model, z, eps)
    assert (calls == ["proposals"]) == native.library().bf16


def test_proposals_with_gradients_go_step_by_step(best):
    model, z, eps = make()
    found = []
    for own, start, noise in ((model, z.clone(), eps), (copy.deepcopy(model).double(), z.double(), eps.double())):
        actions = propose(own.requires_grad_(), start.requires_grad_(), noise)
        found.append(torch.autograd.grad(actions.square().sum(), [start, own.pi[0].weight, own.dynamics[-1].bias]))
    for one, other in zip(*found, strict=True):
        close(one, other, 2e-5)
    assert "proposals" not in best


class Mirrored(WorldModel):
    """The other action is as good."""

    def propose(self, z, eps):
        return -super().propose(z, eps)


@torch.no_grad()
def test_models_of_another_kind_go_step_by_step(best):
    """Whatever they have changed counts."""
    model, z, eps = make(kind=Mirrored)
    check(model, z, eps)
    ordinary = make(horizon=1)[0]
    ordinary.load_state_dict(model.state_dict())
    best.clear()
    mirrored = propose(model, z, eps[:1])
    assert "proposals" not in best
    close(mirrored, -propose(ordinary, z, eps[:1]), 1e-6)


@torch.no_grad()
def test_proposals_from_strange_places(either):
    model, z, eps = make()
    expected = propose(model, z, eps)
    close(propose(model, skipping(z), transposed(eps)), expected, 1e-6)
    close(propose(model, z[:1].expand(3, -1), eps), propose(model, z[:1].repeat(3, 1), eps), 1e-6)
    shared = eps[:, :1].expand_as(eps)
    close(propose(model, z, shared), propose(model, z, shared.contiguous()), 1e-6)


@torch.no_grad()
def test_proposals_leave_everything_as_it_was(either):
    model, z, eps = make()
    before = copy.deepcopy((model.state_dict(), z, eps))
    propose(model, z, eps)
    assert torch.equal(z, before[1]) and torch.equal(eps, before[2])
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_proposals_with_any_number_of_threads(calls):
    model, z, eps = make(samples=300)
    expected = propose(model, z, eps)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(propose(model, z, eps), expected)


@torch.no_grad()
def test_proposals_in_scopes_and_after_changes(either):
    model, z, eps = make()
    expected = propose(model, z, eps)
    with constant_parameters():
        for _ in range(2):
            assert torch.equal(propose(model, z, eps), expected)
            model.dynamics(z, eps[0, :, 0])
    model.pi[-1].bias.add_(0.5)
    with constant_parameters():
        check(model, z, eps)
    model.dynamics[0].weight.mul_(2)
    check(model, z, eps)
    assert (propose(model, z, eps) - expected).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_environments_do_not_infect_each_other(bad, every):
    model, z, eps = make()
    expected = propose(model, z, eps)
    z[1] = bad
    actions = propose(model, z, eps)
    assert actions[:, 1].isnan().all() and torch.equal(actions[:, [0, 2]], expected[:, [0, 2]])
    model, z, eps = make()
    expected = propose(model, z, eps)
    eps[1, 2, 5, 0] = math.nan
    actions = propose(model, z, eps)
    assert actions[1, 2, 5, 0].isnan() and actions[2, 2, 5].isnan().all()
    actions[1:, 2, 5] = expected[1:, 2, 5]
    assert torch.equal(actions, expected)


class Call(nn.Module):
    """A function of a model as a module, so that it can be called with other parameters."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z, eps):
        return propose(self.model, z, eps)


@torch.no_grad()
@pytest.mark.parametrize("part", ["", "pi.", "dynamics.", "dynamics.2."])
@pytest.mark.parametrize("starts_too", [False, True])
def test_mapped_proposals(part, starts_too, either):
    """As for several seeds, of which all parameters differ, or a few."""
    model, z, eps = make()
    names = [f"model.{name}" for name, _ in model.named_parameters() if name.startswith(part)]
    versions = [make()[0] for _ in range(2)]
    stacked = {name: torch.stack([version.get_parameter(name.removeprefix("model.")) for version in versions]) for name in names}
    starts = torch.stack((z, z.flip(0))) if starts_too else z

    def one(parameters, z):
        return torch.func.functional_call(Call(model), parameters, (z, eps))

    found = torch.vmap(one, in_dims=(0, 0 if starts_too else None))(stacked, starts)
    for index in range(2):
        own = copy.deepcopy(model)
        own.load_state_dict({name.removeprefix("model."): value[index] for name, value in stacked.items()}, strict=False)
        close(found[index], stepwise(own, starts[index] if starts_too else z, eps), 2e-5)


WRONG = {
    "wide noise": lambda z, eps: (z, torch.randn(3, 3, 8, 4)),
    "fewer environments in the noise": lambda z, eps: (z, eps[:, :2]),
    "wide latents": lambda z, eps: (torch.randn(3, 25), eps),
    "noise in double precision": lambda z, eps: (z, eps.double()),
    "noise elsewhere": lambda z, eps: (z, eps.to("meta")),
}


@torch.no_grad()
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_by_torch(change, monkeypatch):
    model, z, eps = make()
    calls = use(monkeypatch, TORCH if isinstance(native.library(), str) else native.library().name)
    with pytest.raises((RuntimeError, IndexError)):
        propose(model, *change(z, eps))
    assert "proposals" not in calls
