"""Fresh last layers of policy and critics: exactly these, the same for each seed and update, and Adam forgets them."""

import copy

import pytest
import torch

from tests.trees import leaves
from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ModelConfig, make_config
from worldmpc.models.world_model import WorldModel
from worldmpc.types import EnvSpec, SequenceBatch

SPEC = EnvSpec("test", (5,), 2, 50)
CHOICES = EnvSpec("test", (5,), 3, 50, discrete=True)
SMALL = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_enc_layers": 2, "num_q": 3}
LAST = {
    "q": {"q.layers.2.weight", "q.layers.2.bias", "target_q.layers.2.weight", "target_q.layers.2.bias", "pi.2.weight", "pi.2.bias"},
    "v": {"v.layers.2.weight", "v.layers.2.bias", "target_v.layers.2.weight", "target_v.layers.2.bias", "pi.2.weight", "pi.2.bias"},
}


def disturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def world(value="q", discrete=False, seed=1):
    return WorldModel(ModelConfig(**SMALL, value=value), 5, 3, terminates=True, discrete=discrete, seed=seed)


def make(seed=1, spec=SPEC, **overrides):
    return TDMPC2(make_config("debug", seed=seed, **overrides), spec)


def windows(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(3, size)
    obs, action = torch.randn(4, size, 5, generator=generator), torch.rand(3, size, 2, generator=generator) * 2 - 1
    return SequenceBatch(obs, action, torch.randn(3, size, generator=generator), zeros, zeros, zeros + 1, zeros.long())


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("value", ["q", "v"])
def test_exactly_the_last_layers_of_policy_and_critics_change(value, discrete):
    """Slow critics too; none of their parameters becomes another tensor."""
    model = disturb(world(value, discrete))
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    model.reset_last_layers(5)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name][1])}
    assert changed == LAST[value] == {name for name in before if name.startswith(model.last_layers)}
    assert all(parameter is before[name][0] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("value", ["q", "v"])
def test_fresh_layers_are_drawn_as_those_of_a_new_model(value):
    """Critics begin at 0, the policy with normal weights of 0.02 and no bias."""
    model = disturb(world(value))
    model.reset_last_layers(5)
    state = dict(model.named_parameters())
    fresh = dict(world(value, seed=7).named_parameters())
    for name in LAST[value] - {"pi.2.weight"}:
        assert (state[name] == 0).all() and torch.equal(state[name], fresh[name]), name
    for weight in (state["pi.2.weight"], fresh["pi.2.weight"]):
        assert 0.015 < weight.std() < 0.025 and weight.mean().abs() < 0.01
    assert not torch.equal(state["pi.2.weight"], fresh["pi.2.weight"])


def test_fresh_layers_depend_on_seed_and_update_alone():
    def drawn(update, seed=1, noise=1):
        model = disturb(world(seed=seed), noise)
        before = torch.get_rng_state()
        model.reset_last_layers(update)
        assert torch.equal(torch.get_rng_state(), before)
        return model.pi[-1].weight.detach().clone()

    assert torch.equal(drawn(5), drawn(5, noise=2))
    others = [drawn(5), drawn(6), drawn(5, seed=2), world().pi[-1].weight]
    assert not any(torch.equal(one, other) for index, one in enumerate(others) for other in others[:index])


def test_adam_forgets_exactly_these_parameters():
    agent = make(**{"train.reset_every": 100})
    for seed in range(2):
        agent.update(windows(seed))
    for optimizer in (agent.learner.model_optimizer, agent.learner.policy_optimizer):
        before = {name: value.clone() for name, value in optimizer.state_dict().items()}
        optimizer.forget()
        after = optimizer.state_dict()
        for name, value in before.items():
            if name.partition(".")[2] in LAST["q"]:
                assert (value != 0).any() and (after[name] == 0).all(), name
            else:
                assert torch.equal(after[name], value), name


def test_a_fresh_layer_begins_with_steps_of_the_learning_rate():
    """As Adam's first step is; with the count of steps going on, the first one after 50 would be about 6 times as long."""
    agent = make(**{"train.reset_every": 50, "optim.lr": 1e-3})
    for seed in range(51):
        agent.update(windows(seed % 5))
    fresh = copy.deepcopy(agent.model)
    fresh.reset_last_layers(50)
    for name in ("pi.2.bias", "q.layers.2.bias"):
        moved = agent.model.get_parameter(name) - fresh.get_parameter(name)
        assert moved.abs().max().item() == pytest.approx(1e-3, rel=0.02), name


def test_parameters_apart_learn_as_they_would_with_the_others():
    agents = [make(**{"train.reset_every": 100}), make()]
    for index in range(3):
        for agent in agents:
            agent.update(windows(index))
    one, other = (dict(leaves(agent.state_dict())) for agent in agents)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)


def test_resets_come_every_so_many_updates():
    """Not before the first one; the counter goes on from a checkpoint."""
    agent, seen = make(**{"train.reset_every": 3}), []
    agent.learner.reset = seen.append
    for seed in range(7):
        agent.update(windows(seed))
    assert seen == [3, 6]
    resumed = make(**{"train.reset_every": 3})
    resumed.load_state_dict(agent.state_dict())
    resumed.learner.reset = seen.append
    for seed in range(3):
        resumed.update(windows(seed))
    assert seen == [3, 6, 9]


def test_an_update_learns_from_the_fresh_layers():
    """It is what a reset by hand and then an update without resets would be."""
    agents = [make(**{"train.reset_every": 2}), make(**{"train.reset_every": 100})]
    for index in range(3):
        if index == 2:
            agents[1].model.reset_last_layers(2)
            agents[1].learner.model_optimizer.forget()
            agents[1].learner.policy_optimizer.forget()
        for agent in agents:
            agent.update(windows(index))
    one, other = (dict(leaves(agent.state_dict())) for agent in agents)
    assert all(torch.equal(one[name], other[name]) for name in one)
    never = make()
    for index in range(3):
        never.update(windows(index))
    assert not torch.equal(never.model.pi[-1].weight, agents[0].model.pi[-1].weight)


def test_stacked_seeds_are_reset_each_by_its_own_numbers():
    """Parameters stay views of the stack's, and every seed gets what it would get alone."""
    resets = {"train.reset_every": 100}
    agents, alone = [make(seed, **resets) for seed in (1, 2)], [make(seed, **resets) for seed in (1, 2)]
    stack = Stack(agents)
    for _ in range(2):  # what lies before layers of 0 learns nothing at first
        stack.update([windows(0), windows(1)])
    stack.learner.reset(4)
    for index, (agent, other) in enumerate(zip(agents, alone, strict=True)):
        other.model.reset_last_layers(4)
        for name in LAST["q"]:
            own = agent.model.get_parameter(name)
            assert torch.equal(own, other.model.get_parameter(name)), name
            assert torch.equal(stack._params[f"model.{name}"][index], own), name
    assert not torch.equal(agents[0].model.pi[-1].weight, agents[1].model.pi[-1].weight)
    stack.learner.model_optimizer.forget()
    optimizer = stack.learner.model_optimizer
    for name, moment in zip(optimizer.names, optimizer.split(optimizer.exp_avgs), strict=True):
        assert moment.shape[0] == 2 and (moment == 0).all() == (name in LAST["q"]), name


@pytest.mark.parametrize("spec", [SPEC, CHOICES], ids=["box", "choices"])
def test_resets_of_agents_leave_plans_finite(spec):
    agent = make(spec=spec)
    disturb(agent.model)
    agent.model.reset_last_layers(1)
    assert agent.act(agent.init_carry(2), torch.randn(2, 5), "explore").action.isfinite().all()
