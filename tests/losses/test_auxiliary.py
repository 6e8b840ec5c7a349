"""Auxiliary values at several discounts: targets and losses by hand, and whom they teach."""

import math

import pytest
import torch
from torch.testing import assert_close

from worldmpc import losses
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import make_config
from worldmpc.models.two_hot import symexp
from worldmpc.types import EnvSpec, SequenceBatch

T, B, G = 3, 4, 2
GAMMAS = [0.5, 0.97]
SPEC = EnvSpec("test", (5,), 2, 50)
RHO = 0.5


def make(**overrides):
    values = {"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", *GAMMAS], **overrides}
    return TDMPC2(make_config("debug", **values), SPEC)


def disturbed(agent, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return agent


def windows():
    """One window is terminated in its second step, one truncated in its first, one goes on into padding."""
    generator = torch.Generator().manual_seed(2)
    zeros = torch.zeros(T, B)
    mask, terminated, truncated = zeros + 1, zeros.clone(), zeros.clone()
    mask[2, 1], terminated[1, 1] = 0, 1
    mask[1:, 2], truncated[0, 2] = 0, 1
    mask[2, 3] = 0
    reward = torch.randn(T, B, generator=generator) * mask
    obs, action = torch.randn(T + 1, B, 5, generator=generator), torch.rand(T, B, 2, generator=generator) * 2 - 1
    return SequenceBatch(obs, action, reward, terminated, truncated, mask, zeros.long())


def roll(agent, batch):
    agent.streams["update"].generator.manual_seed(3)
    noise = agent.streams["update"].draw(agent.objectives.noise_specs(T, B))
    return losses.roll(agent.model, batch, agent.discount, RHO, noise)


def term(agent, batch):
    return losses.auxiliary_value(agent.model, roll(agent, batch), batch, {})


@pytest.mark.parametrize("head", ["joint", "separate"])
@pytest.mark.parametrize("bootstrap", ["self", "primary"])
def test_fresh_heads_know_nothing(head, bootstrap):
    """Cross-entropy log K for each head, weighted over time, and none in padding."""
    agent, batch = make(**{"multi_gamma.head": head, "multi_gamma.bootstrap": bootstrap}), windows()
    loss, metrics = term(agent, batch)
    weights = RHO ** torch.arange(T)[:, None] * batch.mask
    assert_close(loss, G * math.log(101) * weights)
    mean = math.log(101) * weights.mean().item()
    assert metrics["aux_value_ce/mean"].item() == pytest.approx(mean, rel=1e-5)
    for gamma in ("0.5", "0.97"):
        assert metrics[f"aux_value_ce/g{gamma}"].item() == pytest.approx(mean, rel=1e-5)
        assert metrics[f"aux_value/mean_g{gamma}"].abs() < 1e-6 and metrics[f"aux_value/std_g{gamma}"] < 1e-6


def test_names_of_metrics():
    metrics = term(make(), windows())[1]
    names = {f"{part}{gamma}" for gamma in ("0.5", "0.97") for part in ("aux_value_ce/g", "aux_value/mean_g", "aux_value/std_g")}
    assert set(metrics) == {"aux_value_ce/mean", "aux_value/target_mean_g0.5", "aux_value/target_mean_g0.97", *names}


def test_targets_from_the_same_heads_by_hand():
    """r + gamma V of the slow copy of the very head, nothing behind a terminal step; truncation does not end values."""
    agent, batch = disturbed(make()), windows()
    slow = agent.model.auxiliary.slow.layers[0]
    rollout = roll(agent, batch)
    found = losses.auxiliary_targets(agent.model, rollout, batch)
    bins = torch.linspace(-10, 10, 101)
    codes = agent.model.encode(batch.obs[1:])
    for index, gamma in enumerate(GAMMAS):
        logits = codes @ slow.weight[index * 101 : (index + 1) * 101].T + slow.bias[index * 101 : (index + 1) * 101]
        value = symexp((logits.softmax(-1) * bins).sum(-1))
        assert_close(found.bootstrap[..., index], value, rtol=1e-4, atol=1e-4)
        for t in range(T):
            for b in range(B):
                ahead = 0.0 if (t, b) == (1, 1) else gamma * value[t, b].item()
                assert found.target[t, b, index].item() == pytest.approx(batch.reward[t, b].item() + ahead, rel=1e-4, abs=1e-4)
    assert not found.target.requires_grad and not found.bootstrap.requires_grad
    with torch.no_grad():
        for parameter in agent.model.auxiliary.heads.parameters():
            parameter.add_(1.0 * torch.randn(parameter.shape))
    assert torch.equal(losses.auxiliary_targets(agent.model, rollout, batch).target, found.target)


def test_targets_from_the_slow_critics_by_hand():
    """The values that the critics' own targets are made of."""
    agent, batch = disturbed(make(**{"multi_gamma.bootstrap": "primary"})), windows()
    rollout = roll(agent, batch)
    found = losses.auxiliary_targets(agent.model, rollout, batch)
    assert agent.model.auxiliary.slow is None
    goes_on = batch.terminated == 0
    value = (rollout.td_target - batch.reward) / agent.discount
    for index, gamma in enumerate(GAMMAS):
        assert_close(found.target[..., index][goes_on], (batch.reward + gamma * value)[goes_on], rtol=1e-4, atol=1e-4)
        assert torch.equal(found.target[1, 1, index], batch.reward[1, 1])
        assert torch.equal(found.bootstrap[..., index], rollout.bootstrap)
    assert (value[goes_on] != 0).any()


def test_losses_by_hand():
    """Cross-entropy against the two-hot target at imagined latents, of which the last is not used; values at the first step are metrics."""
    agent, batch = disturbed(make()), windows()
    rollout = roll(agent, batch)
    loss, metrics = losses.auxiliary_value(agent.model, rollout, batch, {})
    target = losses.auxiliary_targets(agent.model, rollout, batch).target
    logits = agent.model.auxiliary.heads.layers[0](rollout.zs[:T])
    each = []
    for index, gamma in enumerate(GAMMAS):
        own = logits[..., index * 101 : (index + 1) * 101]
        each.append(-(agent.model.two_hot.encode(target[..., index]) * own.log_softmax(-1)).sum(-1) * rollout.time_weight)
        values = symexp((own[0].softmax(-1) * torch.linspace(-10, 10, 101)).sum(-1))
        wanted = {
            f"aux_value_ce/g{gamma}": each[-1].mean(),
            f"aux_value/mean_g{gamma}": values.mean(),
            f"aux_value/std_g{gamma}": values.std(correction=0),
            f"aux_value/target_mean_g{gamma}": target[0, :, index].mean(),
        }
        for name, value in wanted.items():
            assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-4, msg=name)
    assert_close(loss, each[0] + each[1], rtol=1e-4, atol=1e-5)
    assert_close(metrics["aux_value_ce/mean"], (each[0] + each[1]).detach().mean() / G, rtol=1e-4, atol=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_time_weights_are_those_of_every_term():
    agent, batch = disturbed(make()), windows()
    rollout = roll(agent, batch)
    assert_close(rollout.time_weight, RHO ** torch.arange(T)[:, None] * batch.mask)
    loss, _ = losses.auxiliary_value(agent.model, rollout, batch, {})
    even, _ = losses.auxiliary_value(agent.model, rollout._replace(time_weight=torch.ones(T, B)), batch, {})
    assert (even > 0).all()
    assert_close(loss, even * rollout.time_weight)


@pytest.mark.parametrize("bootstrap", ["self", "primary"])
@pytest.mark.parametrize("value", ["q", "v"])
def test_gradients_reach_encoder_dynamics_and_heads(value, bootstrap):
    variant = {"model.value": "v", "policy.objective": "bc"} if value == "v" else {}
    agent = disturbed(make(**{"multi_gamma.bootstrap": bootstrap}, **variant))
    loss, _ = term(agent, windows())
    loss.mean().backward()
    taught = {name for name, parameter in agent.model.named_parameters() if parameter.grad is not None and (parameter.grad != 0).any()}
    assert taught == {name for name, _ in agent.model.named_parameters() if name.startswith(("encoder.", "dynamics.", "auxiliary.heads."))}
    assert all(parameter.grad is None for name, parameter in agent.model.named_parameters() if name not in taught)


def test_each_head_weighs_loss_weight():
    """In the sum of all terms; the other terms stay what they are."""
    agent, batch = disturbed(make(**{"multi_gamma.loss_weight": 0.3})), windows()
    plain = disturbed(make(**{"multi_gamma.enabled": False, "multi_gamma.gammas": []}))
    found = []
    for one in (agent, plain):
        one.streams["update"].generator.manual_seed(3)
        found.append(one.objectives.model_loss(batch, one.streams["update"].draw(one.objectives.noise_specs(T, B))))
    (total, _, metrics), (less, _, others) = found
    assert_close(total - less, 0.3 * metrics["aux_value_loss"], rtol=1e-4, atol=1e-4)
    assert_close(metrics["aux_value_loss"], G * metrics["aux_value_ce/mean"])
    assert not any("aux" in name for name in others)
    for name in others.keys() - {"total_loss"}:
        assert torch.equal(metrics[name], others[name]), name


def test_padding_teaches_nothing():
    agent, batch = disturbed(make()), windows()
    gone = batch.mask == 0
    behind = batch._replace(
        obs=torch.cat((batch.obs[:1], torch.where(gone[..., None], 9.0, batch.obs[1:]))),
        reward=torch.where(gone, 50.0, batch.reward),
        terminated=torch.where(gone, 1.0, batch.terminated),
    )
    assert torch.equal(term(agent, behind)[0], term(agent, batch)[0]) and (term(agent, batch)[0][gone] == 0).all()


def test_heads_learn_the_values_of_their_discounts():
    """A reward of 1 for ever is worth 2, or ever more, as the slow copy follows."""
    agent = make(**{"optim.lr": 0.2, "loss.tau": 0.2, "model.latent_dim": 8, "loss.batch_size": 4})
    zeros = torch.zeros(T, B)
    batch = SequenceBatch(torch.ones(T + 1, B, 5), torch.zeros(T, B, 2), zeros + 1, zeros, zeros, zeros + 1, zeros.long())
    for _ in range(60):
        metrics = agent.update(batch)
    assert metrics["aux_value/mean_g0.5"].item() == pytest.approx(2, rel=0.1)
    assert 3 < metrics["aux_value/mean_g0.97"] < metrics["aux_value/target_mean_g0.97"] < 40


# What is shown of them ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("examples", [2, 99])
def test_snapshots_are_what_the_loss_is_made_of(examples, details):
    agent, batch = disturbed(make()), windows()
    rollout, steps, count = roll(agent, batch), T if details else 1, min(examples, B)
    found = losses.auxiliary_snapshot(agent.model, rollout, batch, examples, details)
    target = losses.auxiliary_targets(agent.model, rollout, batch)
    logits = agent.model.auxiliary.heads(rollout.zs[:T])
    for name in found.keys() - {"mask"}:
        assert found[name].shape[:3] == (steps, count, G) and not found[name].requires_grad, name
    assert torch.equal(found["mask"], batch.mask[:steps, :count])
    assert torch.equal(found["target"], target.target[:steps, :count])
    assert torch.equal(found["bootstrap"], target.bootstrap[:steps, :count])
    assert_close(found["prediction"], agent.model.two_hot.decode(logits)[:steps, :count].detach())
    assert_close(found["error"], (found["prediction"] - found["target"]).abs())
    two_hot = agent.model.two_hot.encode(found["target"])
    assert_close(two_hot.gather(-1, found["lower_bin"][..., None] + 1)[..., 0], found["upper_weight"])
    probs, bins = logits.softmax(-1)[:steps, :count].detach(), found["top_bins"]
    assert_close(probs.gather(-1, bins), found["top_probs"])
    assert (found["top_probs"][..., 0] >= found["top_probs"][..., 1]).all() and torch.equal(bins[..., 0], probs.argmax(-1))
    assert ("cross_entropy" in found) == ("probs" in found) == details
    if details:
        weighted = found["cross_entropy"].sum(-1) * rollout.time_weight[:, :count]
        assert_close(weighted, losses.auxiliary_value(agent.model, rollout, batch, {})[0][:, :count].detach())
        assert_close(found["probs"], probs)
