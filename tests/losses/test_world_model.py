"""Terms of the world model: whom each of them teaches, and several dynamics side by side."""

import pytest
import torch
from torch.testing import assert_close

from worldmpc import losses
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import make_config
from worldmpc.learners.objectives import Objectives
from worldmpc.planners import rollout_return
from worldmpc.types import EnvSpec, SequenceBatch

T, B = 3, 4
SPEC = EnvSpec("test", (5,), 2, 50)


def make(**overrides):
    """An agent whose networks say something, as untrained heads are 0."""
    agent = TDMPC2(make_config("debug", **overrides), SPEC)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return agent


def windows(size=B, seed=2):
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(T, size)
    obs, action = torch.randn(T + 1, size, 5, generator=generator), torch.rand(T, size, 2, generator=generator) * 2 - 1
    reward, terminated = torch.randn(T, size, generator=generator), torch.zeros(T, size)
    terminated[-1, 0] = 1
    extras = {"plan_elite": 0.5 * action, "plan_std": action.abs() + 0.1, "plan_mean": action}
    return SequenceBatch(obs, action, reward, terminated, zeros, zeros + 1, torch.arange(T * size).view(T, size), extras)


def draw(agent, size=B):
    agent.streams["update"].generator.manual_seed(3)
    return agent.streams["update"].draw(agent.objectives.noise_specs(T, size))


def taught(model, loss):
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None and (gradient != 0).any()}


# Groups -------------------------------------------------------------------------------------------------------------------------

ENCODED = ("encoder.", "dynamics.")
STATES = {"model.value": "v", "policy.objective": "bc"}
TERMS = {
    "consistency": ENCODED,
    "reward": (*ENCODED, "reward."),
    "value": (*ENCODED, "q."),
    "termination": (*ENCODED, "termination."),
    "aux_value": (*ENCODED, "auxiliary.heads."),
}
TARGETS = ["td", "n_step", "td_lambda", "model"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("values", [{}, STATES], ids=["q", "v"])
def test_each_term_teaches_exactly_its_groups(values, target):
    """All of them, and never the policy or a slow copy."""
    agent = make(**values, **{"value.target": target, "multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9]})
    objectives, batch, noise = Objectives(agent.config, agent.model, agent.discount), windows(), draw(agent)
    rollout, batch = objectives.roll(batch, noise)
    assert agent.objectives.terms.keys() == TERMS.keys()
    for term, groups in TERMS.items():
        groups = tuple("v." if group == "q." and values else group for group in groups)
        loss, metrics = agent.objectives.terms[term](agent.model, rollout, batch, noise)
        assert taught(agent.model, loss.mean()) == {
            name for name, parameter in agent.model.named_parameters() if name.startswith(groups) and parameter.requires_grad
        }, term
        assert loss.shape == (T, B) and not any(value.requires_grad for value in metrics.values())
    assert not rollout.td_target.requires_grad and not rollout.next_z.requires_grad


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("values", [{}, STATES], ids=["q", "v"])
def test_every_parameter_that_learns_is_in_one_group(values, target):
    agent = make(**values, **{"value.target": target, "multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9]})
    model, policy = agent.learner.model_optimizer.names, agent.learner.policy_optimizer.names
    learns = [name for name, parameter in agent.model.named_parameters() if parameter.requires_grad]
    assert sorted([*model, *policy]) == sorted(learns) and all(name.startswith("pi.") for name in policy)
    before = {name: parameter.clone() for name, parameter in agent.model.named_parameters()}
    agent.update(windows())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in agent.model.named_parameters())


# Several dynamics ---------------------------------------------------------------------------------------------------------------

SEVERAL = {"model.num_dynamics": 3}


def test_batches_are_repeated_one_behind_the_other():
    batch = windows()
    assert losses.for_each_dynamics(batch, 1) is batch
    thrice = losses.for_each_dynamics(batch, 3)
    for part in range(3):
        mine = slice(part * B, (part + 1) * B)
        for name in batch._fields[:-1]:
            assert torch.equal(getattr(thrice, name)[:, mine], getattr(batch, name)), name
        assert all(torch.equal(thrice.extras[name][:, mine], value) for name, value in batch.extras.items())
    assert thrice.obs.shape == (T + 1, 3 * B, 5)


def test_members_begin_differently():
    members = TDMPC2(make_config("debug", **SEVERAL), SPEC).model.dynamics
    weights = [member[0].weight for member in members]
    assert len(members) == 3 and not any(torch.equal(weights[one], weights[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def follow(dynamics, z, actions):
    zs = [z]
    for action in actions:
        zs.append(dynamics(zs[-1], action))
    return torch.stack(zs)


def test_each_member_imagines_its_own_part():
    model = make(**SEVERAL).model
    z, actions = model.encode(torch.randn(6, 5)), torch.randn(T, 6, 2)
    found = model.imagine(z, actions)
    expected = [follow(member, z[2 * i : 2 * i + 2], actions[:, 2 * i : 2 * i + 2]) for i, member in enumerate(model.dynamics)]
    assert_close(found, torch.cat(expected, 1))
    assert_close(model.next(z, actions[0]), model.dynamics[0](z, actions[0]))
    assert_close(model.step(z, actions[0]).z, model.dynamics[0](z, actions[0]))


def test_each_member_rolls_out_its_own_particles():
    model = make(**SEVERAL).model
    z, actions = model.encode(torch.randn(3, 2, 4, 5)), torch.randn(T, 3, 2, 4, 2)
    found = model.rollout(z, actions)
    assert model.num_particles == 3 and found.z.shape == (T + 1, 3, 2, 4, 16)
    for index, member in enumerate(model.dynamics):
        zs = follow(member, z[index], actions[:, index])
        assert_close(found.z[:, index], zs)
        assert_close(found.reward[:, index], model.two_hot.decode(model.reward(zs[:-1], actions[:, index])))
        assert_close(found.cont[:, index], model.cont(zs[1:]))


@pytest.mark.parametrize("coef", [0.0, 0.7])
@pytest.mark.parametrize("values", [{}, STATES], ids=["q", "v"])
def test_returns_are_averaged_and_their_spread_is_a_cost(coef, values):
    """Mean less coefficient times the standard deviation over members, of each candidate."""
    model = make(**SEVERAL, **values).model
    z, actions, eps, critics = model.encode(torch.randn(2, 4, 5)), torch.randn(T, 2, 4, 2), torch.randn(2, 4, 2), torch.tensor([1, 0])
    each = []
    for member in model.dynamics:
        zs, total, weight = follow(member, z, actions), torch.zeros(2, 4), torch.ones(2, 4)
        for t in range(T):
            total = total + weight * model.two_hot.decode(model.reward(zs[t], actions[t]))
            weight = weight * 0.9 * (1 - torch.sigmoid(model.termination_logit(zs[t + 1])))
        each.append(total + weight * model.terminal_value(zs[-1], eps, critics))
    mean = sum(each) / 3
    spread = (sum((one - mean).square() for one in each) / 2).sqrt()
    found = rollout_return(model, z, actions, 0.9, eps, critics, uncertainty_coef=coef)
    assert_close(found, mean - coef * spread, rtol=1e-4, atol=1e-4)
    assert spread.min() > 1e-4 and found.shape == (2, 4)


def test_one_dynamics_network_has_no_spread():
    model = make().model
    z, actions, eps, critics = model.encode(torch.randn(2, 4, 5)), torch.randn(T, 2, 4, 2), torch.randn(2, 4, 2), torch.tensor([1, 0])
    found = [rollout_return(model, z, actions, 0.9, eps, critics, uncertainty_coef=coef) for coef in (0.0, 5.0)]
    assert torch.equal(*found) and not hasattr(model, "num_particles")


@pytest.mark.parametrize("part", range(3))
def test_each_member_learns_from_its_own_part(part):
    """The others do not feel it; the encoder does."""
    agent = make(**SEVERAL)
    objectives, noise = Objectives(agent.config, agent.model, agent.discount), draw(agent)
    rollout, batch = objectives.roll(windows(), noise)
    loss, _ = losses.consistency(agent.model, rollout, batch, noise)
    assert loss.shape == (T, 3 * B)
    names = taught(agent.model, loss[:, part * B : (part + 1) * B].mean())
    groups = ("encoder.", f"dynamics.{part}.")
    assert names == {name for name, _ in agent.model.named_parameters() if name.startswith(groups)}


def test_equal_members_are_one():
    """With the same numbers in all, and the same noise for each part, losses are those of one."""
    one = make(**{"model.dropout": 0.0})
    several = make(**SEVERAL, **{"model.dropout": 0.0})
    state = {name: value for name, value in one.model.state_dict().items() if not name.startswith("dynamics.")}
    for index in range(3):
        state |= {f"dynamics.{index}.{name}": value for name, value in one.model.dynamics.state_dict().items()}
    several.model.load_state_dict(state)
    batch, noise = windows(), draw(one)
    thrice = {name: value if name.endswith("critics") else torch.cat([value] * 3, -2) for name, value in noise.items()}
    assert {name: value.shape for name, value in thrice.items()} == {
        name: s.shape for name, s in several.objectives.noise_specs(T, B).items()
    }
    scale, found = torch.tensor(2.0), []
    for agent, own in ((one, noise), (several, thrice)):
        loss, zs, metrics = agent.objectives.model_loss(batch, own)
        pi_loss, _ = agent.objectives.policy_loss(zs, batch, scale, own)
        found.append((loss, metrics["td_target"], metrics["value_loss"], metrics["reward_loss"], zs[:, :B], zs[:, -B:]))
        assert pi_loss.isfinite()
    for left, right in zip(*found, strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_planners_are_told_of_the_cost_of_spread():
    """More of it, less value, and so other plans."""
    obs, values = torch.randn(6, 5), []
    for coef in (0.0, 3.0):
        agent = make(**SEVERAL, **{"planner.uncertainty_coef": coef})
        values.append(agent.act(agent.init_carry(6), obs, "eval").extras["plan_value"])
    assert values[1].mean() < values[0].mean() and not torch.equal(*values)
