"""What somebody puts in the place of a part of TD-MPC2 takes effect, alone and in a stack, or is refused."""

import copy

import pytest
import torch
from torch import nn

from examples.own_planner import AntitheticShooting
from tests.agents.test_tdmpc2 import SPEC, make_batch
from tests.trees import differences
from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, make_config
from worldmpc.models.nets import MLP
from worldmpc.noise import NoiseSpec


def make(**overrides):
    return TDMPC2(make_config("debug", **{"seed": 1, "optim.lr": 1e-3, **overrides}), SPEC)


def both():
    """An agent, and one that is in a stack with another; each with what does an update of it."""
    solo, stacked, beside = make(), make(), make(seed=2)

    def update_stack(batch):
        return Stack([stacked, beside]).update([batch, batch])[0]

    return [([solo], solo.update), ([stacked, beside], update_stack)]


@pytest.mark.parametrize("case", [0, 1], ids=["solo", "stack"])
def test_other_weights(case):
    agents, update = both()[case]
    for agent in agents:
        agent.objectives.weights = dict.fromkeys(agent.objectives.weights, 0.0)
    assert update(make_batch())["total_loss"] == 0


@pytest.mark.parametrize("case", [0, 1], ids=["solo", "stack"])
def test_a_term_with_noise_of_its_own(case):
    def noisy(model, rollout, batch, noise):
        return noise["mine"] * rollout.time_weight, {"mine_seen": noise["mine"].std()}

    agents, update = both()[case]
    for agent in agents:
        agent.objectives.terms["noisy"], agent.objectives.weights["noisy"] = noisy, 0.5
        agent.objectives.more_noise = lambda length, batch_size: {"mine": NoiseSpec("normal", (length, batch_size))}
    metrics = update(make_batch())
    assert metrics["noisy_loss"] != 0 and metrics["mine_seen"] > 0.5


@pytest.mark.parametrize("case", [0, 1], ids=["solo", "stack"])
def test_another_objective_of_the_policy(case):
    def calm(model, zs, batch, scale, coefs, noise):
        """Small actions, whatever they are worth."""
        loss = model.policy(zs, noise["pi_policy"]).mean.square().mean()
        return loss, {"pi_scale": scale, "calm": loss.detach()}

    agents, update = both()[case]
    for agent in agents:
        agent.objectives.policy = calm
    metrics = update(make_batch())
    assert metrics["calm"] == metrics["pi_loss"] and metrics["pi_grad_norm"] > 0


def test_a_stack_refuses_what_one_agent_alone_learns():
    agents = [make(), make(seed=2)]
    agents[1].objectives.weights["reward"] = 3.0
    with pytest.raises(ValueError, match="other loss terms, weights or objectives"):
        Stack(agents)


@pytest.mark.parametrize("mode", ["explore", "eval"])
def test_another_planner(mode):
    """One that asks for other noise and another warm start than ours."""
    agent = make()
    ours = agent.act(agent.init_carry(2), torch.zeros(2, 5), mode)
    agent.planner = AntitheticShooting(SPEC.action_dim, agent.discount, horizon=4, pairs=8)
    theirs = agent.act(agent.init_carry(2), torch.zeros(2, 5), mode)
    assert theirs.carry.plan.mean.shape == (2, 4, SPEC.action_dim) != ours.carry.plan.mean.shape
    assert not torch.equal(theirs.action, ours.action) and (theirs.action.abs() <= 1).all()


def test_a_head_of_ones_own_learns_or_is_refused():
    """A module that no optimiser knows would never learn, without a word."""

    def first_entry(model, rollout, batch, noise):
        return (model.head(rollout.zs[1:])[..., 0] - batch.obs[1:, :, 0]).square() * rollout.time_weight, {}

    agent = make()
    agent.model.head = nn.Linear(agent.model.latent_dim, 1)
    agent.objectives.terms["first"], agent.objectives.weights["first"] = first_entry, 1.0
    with pytest.raises(ValueError, match=r"no optimiser changes head.weight, head.bias; set agent.objectives.groups\['head.'\] = 1.0"):
        agent.update(make_batch())
    agent.objectives.groups["head."] = 10.0
    agent.begin_learning()
    first = [float(agent.update(make_batch())["first_loss"]) for _ in range(60)]
    assert first[-1] < 0.9 * first[0]
    agent.model.other = nn.Linear(2, 2).requires_grad_(False)
    assert agent.update(make_batch())["skipped_updates"] == 0


@pytest.mark.parametrize("part", ["dynamics", "reward"])
def test_a_network_that_was_replaced_learns_or_is_refused(part):
    agent = make()
    agent.update(make_batch())
    former = getattr(agent.model, part)
    joint = agent.model.latent_dim + SPEC.action_dim
    setattr(agent.model, part, MLP(joint, [12], former[-1].out_features))
    with pytest.raises(ValueError, match=rf"model: {part}.0.weight and \d+ others were replaced; call agent.begin_learning"):
        agent.update(make_batch())
    agent.begin_learning()
    before = getattr(agent.model, part)[0].weight.detach().clone()
    agent.update(make_batch())
    assert not torch.equal(getattr(agent.model, part)[0].weight, before)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda model, rollout, batch, noise: (batch.reward.sum(), {}), r"loss term 'mine': expected \[3, 8\].*got \[\]"),
        (lambda model, rollout, batch, noise: (rollout.zs.sum(-1), {}), r"loss term 'mine': expected \[3, 8\].*got \[4, 8\]"),
        (lambda model, rollout, batch, noise: (batch.reward, {"reward_loss": batch.reward.sum()}), "names reward_loss are there already"),
        (lambda model, rollout, batch, noise: (batch.reward, {"total_loss": batch.reward.sum()}), "names total_loss are there already"),
    ],
)
def test_terms_that_are_none(term, message):
    agent = make()
    agent.objectives.terms["mine"], agent.objectives.weights["mine"] = term, 1.0
    with pytest.raises(ValueError, match=message):
        agent.update(make_batch())


def test_reanalysis_with_a_prior_of_ones_own():
    """It must be able to propose more widely; whoever cannot is told before anything is collected."""
    agent = make(agent="bmpc", **{"reanalyze.interval": 2})
    agent.model.propose = lambda z, eps: 0.1 * eps
    with pytest.raises(ConfigError, match="no parameter log_std=None"):
        agent.make_source(1, torch.Generator())
    agent.model.propose = lambda z, eps, log_std=None: 0.1 * eps
    agent.make_source(1, torch.Generator())
    assert agent.replan(torch.zeros(3, 5))["plan_mean"].isfinite().all()


def copied(agent):
    return copy.deepcopy(agent)


def assigned(agent):
    other = TDMPC2(agent.config, agent.spec)
    other.load_state_dict(agent.state_dict())
    other.model.load_state_dict(copy.deepcopy(agent.model.state_dict()), assign=True)
    return other


def with_other_memory(agent):
    other = copied(agent)
    for parameter in other.model.parameters():
        parameter.data = parameter.data.clone()
    return other


@pytest.mark.parametrize("how", [copied, assigned, with_other_memory])
def test_an_agent_goes_on_wherever_its_parameters_have_gone(how):
    """Numbers equal those of the original; what is behind it must not be read from where it was."""
    agent = make(**{"model.mlp_dim": 64, "loss.batch_size": 64})
    agent.update(make_batch(size=64))
    other = how(agent)
    for seed in (1, 2):
        one, two = (each.update(make_batch(size=64, seed=seed)) for each in (agent, other))
        assert two["skipped_updates"] == 0 and not differences(one, two)
    assert not differences(agent.model.state_dict(), other.model.state_dict())


def test_any_agent_that_plans_can_plan_anew():
    agent = make()
    assert agent.replan(torch.zeros(3, 5))["plan_elite"].shape == (3, SPEC.action_dim)
