"""Whole imagined plans by the library for each kind of world model: critics of actions or of latents alone, a squashed or a clipped policy.

Equal to plain PyTorch in double precision, by every library that this processor can run.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.libraries import close, skipping, transposed, use
from tests.models.test_kernels import Case, make, plain
from worldmpc.models import kernels, native
from worldmpc.models.kernels import ImaginedNets
from worldmpc.models.networks import Network
from worldmpc.models.packing import constant_parameters
from worldmpc.planners import propose, rollout_return
from worldmpc.types import ModelStep

KINDS = {
    f"{critics}, {policy}": {"state_values": critics == "V", "clipped": policy == "clipped"}
    for critics, policy in itertools.product("QV", ("squashed", "clipped"))
}
POLICIES = {name: kind["clipped"] for name, kind in KINDS.items() if not kind["state_values"]}


class Plan(NamedTuple):
    """What is imagined: arguments of ``kernels.returns``, the start not expanded yet, and noise of proposals."""

    nets: ImaginedNets
    z: Tensor
    actions: Tensor
    eps: Tensor
    critics: Tensor
    noise: Tensor


def network(*widths, seed, **shape) -> Network:
    case = make((1,), ((widths[0],), *widths[1:]), seed=seed, **shape)
    return Network(case.layers, case.groups)


def imagined(
    envs=3, samples=37, horizon=3, *, end=None, action=3, latent=24, hidden=40, bins=101, critics=(2, 0), proposed=8, **kind
) -> Plan:
    inner, wide = (hidden, hidden), latent + action
    nets = ImaginedNets(
        dynamics=network(wide, *inner, latent, groups=8, seed=1),
        reward=network(wide, *inner, bins, seed=2),
        policy=network(latent, *inner, 2 * action, seed=3),
        critics=network(latent if kind.get("state_values") else wide, *inner, bins, members=3, seed=4),
        termination=None if end is None else network(latent, *inner, 1, seed=5),
        support=torch.linspace(-3, 3, bins),
        log_std=(-5.0, 0.5),
        hard=end == "hard",
        **kind,
    )
    z, actions = torch.randn(envs, latent).softmax(-1), torch.randn(horizon, envs, samples, action).clamp(-1, 1)
    eps, noise = torch.randn(envs, samples, action), torch.randn(horizon, envs, proposed, action)
    return Plan(nets, z, actions, eps, torch.tensor(critics), noise)


class Definition:
    """The same world model in double precision, evaluated as it is defined."""

    def __init__(self, nets: ImaginedNets) -> None:
        self.nets = nets

    def network(self, net, *parts, heads=None):
        layers = [tuple(part if part is None else part.double() for part in layer) for layer in net.layers]
        return plain(Case(list(parts), layers, heads=heads, groups=net.groups, strided=net.strided))

    def values(self, logits):
        x = (logits.softmax(-1) * self.nets.support.double()).sum(-1)
        return x.sign() * x.abs().expm1()

    def next(self, z, action):
        return self.network(self.nets.dynamics, z, action)

    def step(self, z, action):
        following, cont = self.next(z, action), torch.ones(z.shape[:-1], dtype=z.dtype)
        if self.nets.termination is not None:
            terminated = self.network(self.nets.termination, following).squeeze(-1).sigmoid()
            cont = 1 - ((terminated > 0.5).double() if self.nets.hard else terminated)
        return ModelStep(following, self.values(self.network(self.nets.reward, z, action)), cont)

    def propose(self, z, eps):
        mean, log_std = self.network(self.nets.policy, z).chunk(2, -1)
        low, high = self.nets.log_std
        spread = eps * (low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)).exp()
        return (torch.tanh(mean) + spread).clamp(-1, 1) if self.nets.clipped else torch.tanh(mean + spread)

    def terminal_value(self, z, eps, critics):
        parts = (z,) if self.nets.state_values else (z, self.propose(z, eps))
        return self.values(self.network(self.nets.critics, *parts, heads=critics)).mean(0)


@torch.no_grad()
def returns(plan: Plan) -> Tensor | None:
    return kernels.returns(plan.nets, plan.z[:, None].expand(-1, plan.actions.shape[2], -1), plan.actions, 0.97, plan.eps, plan.critics)


@torch.no_grad()
def proposals(plan: Plan) -> Tensor | None:
    return kernels.proposals(plan.nets, plan.z, plan.noise)


def defined_returns(plan: Plan) -> Tensor:
    z, actions, eps = (part.double() for part in (plan.z, plan.actions, plan.eps))
    return rollout_return(Definition(plan.nets), z[:, None].expand(-1, actions.shape[2], -1), actions, 0.97, eps, plan.critics)


def defined_proposals(plan: Plan) -> Tensor:
    return propose(Definition(plan.nets), plan.z.double(), plan.noise.double())


def check(plan: Plan, tolerance=1e-5) -> None:
    close(returns(plan), defined_returns(plan), tolerance)
    close(proposals(plan), defined_proposals(plan), 2 * tolerance)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("end", [None, "soft", "hard"])
def test_every_kind(kind, end, calls):
    for envs, samples in ((3, 37), (1, 24)):
        check(imagined(envs, samples, end=end, **kind))
    assert calls == ["returns", "proposals"] * 2


SHAPES = {
    "short": {"horizon": 1},
    "long": {"horizon": 7},
    "one action": {"action": 1},
    "many actions": {"action": 38, "latent": 16},
    "actions of whole vectors": {"action": 16},
    "few bins": {"bins": 5},
    "bins of whole vectors": {"bins": 32},
    "wide": {"hidden": 130, "latent": 136},
    "wide latents": {"hidden": 16, "latent": 136, "end": "soft"},
    "wide end": {"hidden": 16, "latent": 16, "bins": 201},
    "one critic": {"critics": (1,)},
    "one critic twice": {"critics": (1, 1)},
    "three critics": {"critics": (1, 2, 0)},
    "many": {"samples": 700, "proposed": 700, "horizon": 2},
    "few": {"envs": 1, "samples": 1, "proposed": 1},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_shape(shape, kind, fast):
    plan = imagined(**shape, **kind)
    if len(set(plan.critics.tolist())) < len(plan.critics):
        assert returns(plan) is None
        plan = plan._replace(critics=torch.tensor([1]))
    check(plan, tolerance=2.5e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_number_of_threads(kind, calls):
    plan = imagined(samples=300, proposed=300, end="soft", **kind)
    expected = returns(plan), proposals(plan)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(returns(plan), expected[0]) and torch.equal(proposals(plan), expected[1])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_in_a_scope(kind, fast):
    """Packed once for both functions, in any order; anew once parameters have changed."""
    plan = imagined(end="soft", **kind)
    with constant_parameters():
        for _ in range(2):
            check(plan)
    for net in (plan.nets.critics, plan.nets.policy):
        net.layers[-1][1].add_(0.3)
    check(plan)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_from_strange_places(kind, fast):
    plan = imagined(**kind)
    moved = plan._replace(
        z=skipping(plan.z),
        actions=transposed(plan.actions),
        eps=transposed(plan.eps),
        critics=skipping(plan.critics),
        noise=transposed(plan.noise),
    )
    assert torch.equal(returns(moved), returns(plan)) and torch.equal(proposals(moved), proposals(plan))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_half_precision(kind, calls):
    """Within 5 % of the largest number for returns, and of the range of actions for proposals."""
    plan = imagined(samples=100, horizon=2, latent=40, end="soft", **kind)
    with torch.autocast("cpu", torch.bfloat16):
        if not native.library().bf16:
            assert returns(plan) is None and proposals(plan) is None
            return
        check(plan, 0.05)
        rounded = returns(plan), proposals(plan)
    assert not torch.equal(returns(plan), rounded[0]) and not torch.equal(proposals(plan), rounded[1])


# Values of states -----------------------------------------------------------------------------------------------------------


def test_values_of_states_look_at_no_policy(fast):
    """Nor at its noise: neither has to fit."""
    plan = imagined(state_values=True)
    expected = returns(plan)
    for policy in (
        network(5, 4, seed=9),
        Network([tuple(part if part is None else part.double() for part in plan.nets.policy.layers[-1])]),
    ):
        assert torch.equal(returns(plan._replace(nets=plan.nets._replace(policy=policy))), expected)
    for eps in (torch.full_like(plan.eps, torch.nan), plan.eps.double(), plan.eps[:, :5], torch.empty(0)):
        assert torch.equal(returns(plan._replace(eps=eps)), expected)


@pytest.mark.parametrize("given", [False, True])
def test_critics_of_another_kind_are_refused(given, refusing):
    """The library would read other weights than there are."""
    plan = imagined(state_values=given)
    assert returns(plan._replace(nets=plan.nets._replace(state_values=not given))) is None


# Clipped policies -----------------------------------------------------------------------------------------------------------


def test_clipped_actions_reach_their_bounds(calls):
    plan = imagined(clipped=True, samples=200, proposed=200)
    actions = proposals(plan)
    assert actions.abs().max() == 1 and 0.05 < (actions.abs() == 1).float().mean() < 0.95
    squashed = plan._replace(nets=plan.nets._replace(clipped=False))
    assert not torch.allclose(proposals(squashed), actions, atol=0.1)
    assert not torch.allclose(returns(squashed), returns(plan), atol=1e-3)


def test_without_noise_both_policies_agree(calls):
    plan = imagined(clipped=True)
    plan = plan._replace(eps=torch.zeros_like(plan.eps), noise=torch.zeros_like(plan.noise))
    squashed = plan._replace(nets=plan.nets._replace(clipped=False))
    assert torch.equal(proposals(plan), proposals(squashed)) and torch.equal(returns(plan), returns(squashed))


@pytest.mark.parametrize("clipped", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("action", [3, 16, 21])
def test_noise_without_end(clipped, action, calls):
    """NaN is no bound; what is infinite reaches one."""
    plan = imagined(clipped=clipped, horizon=1, action=action)
    places = plan.noise.view(-1, action)
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        places[row, 1] = bad
        places[row, -1] = bad
    found = proposals(plan).view(-1, action)
    assert found[0].isnan().nonzero().flatten().tolist() == [1, action - 1]
    assert (found[1, [1, -1]] == 1).all() and (found[2, [1, -1]] == -1).all()
    assert found[1:].isfinite().all()


# What does not go well ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("place", ["z", "actions", "eps", "noise", "reward", "critics", "policy", "termination"])
def test_diverged(place, bad, kind, calls):
    """As finite as by the definition."""
    plan = imagined(end="soft", **kind)
    if place in ("reward", "critics", "policy", "termination"):
        getattr(plan.nets, place).layers[-1][1].view(-1)[0] = bad
        plan = plan._replace(critics=torch.tensor([0, 1]))
    else:
        getattr(plan, place).view(-1)[5] = bad
    for found, expected in ((returns(plan), defined_returns(plan)), (proposals(plan), defined_proposals(plan))):
        assert torch.equal(found.isfinite(), expected.isfinite())


WRONG = {
    "fewer samples in the actions": lambda plan: plan._replace(actions=plan.actions[:, :, :20]),
    "fewer environments": lambda plan: plan._replace(z=plan.z[:2]),
    "wide actions": lambda plan: plan._replace(actions=torch.randn(3, 3, 37, 4), noise=torch.randn(3, 3, 8, 4)),
    "wide latents": lambda plan: plan._replace(z=torch.randn(3, 25)),
    "double actions": lambda plan: plan._replace(actions=plan.actions.double(), noise=plan.noise.double()),
    "no steps": lambda plan: plan._replace(actions=plan.actions[:0], noise=plan.noise[:0]),
    "no such critic": lambda plan: plan._replace(critics=torch.tensor([0, 3])),
    "dynamics of another width": lambda plan: plan._replace(nets=plan.nets._replace(dynamics=network(27, 40, 16, groups=8, seed=1))),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_left_to_others(name, kind, refusing):
    plan = imagined(**kind)
    with torch.no_grad():  # the starts have the number of samples that was planned for
        wrong = WRONG[name](plan)
        starts = wrong.z[:, None].expand(-1, 37, -1)
        assert kernels.returns(wrong.nets, starts, wrong.actions, 0.97, wrong.eps, wrong.critics) is None
        if name not in ("fewer samples in the actions", "no such critic"):
            assert kernels.proposals(wrong.nets, wrong.z, wrong.noise) is None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients_are_left_to_others(kind, refusing):
    plan = imagined(**kind)
    starts = plan.z[:, None].expand(-1, 37, -1)
    assert kernels.returns(plan.nets, starts, plan.actions, 0.97, plan.eps, plan.critics) is None
    assert kernels.proposals(plan.nets, plan.z, plan.noise) is None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_without_library(kind, monkeypatch):
    use(monkeypatch, "torch")
    plan = imagined(**kind)
    assert returns(plan) is None and proposals(plan) is None
