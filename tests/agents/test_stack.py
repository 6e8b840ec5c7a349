"""Stacked seeds: each does what it would do alone."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.agents.test_tdmpc2 import SPEC, make, make_batch
from tests.graphs import stand_in_for_graphs
from tests.trees import leaves
from worldmpc.agents.stack import Stack
from worldmpc.config import ConfigError
from worldmpc.models import kernels
from worldmpc.types import EnvSpec

SEEDS = (3, 1, 7)


@pytest.fixture(params=[1, 1 << 60], ids=["native", "torch"])
def _arithmetic(request, monkeypatch):
    monkeypatch.setattr(kernels, "NATIVE_FROM", request.param)


def agents(spec=SPEC, **overrides):
    """Agents whose critics and reward say something, as untrained ones value everything alike."""
    made = [make(spec, seed=seed, **overrides) for seed in SEEDS]
    for agent in made:
        generator = torch.Generator().manual_seed(agent.config.seed)
        with torch.no_grad():
            for name, parameter in agent.model.named_parameters():
                if name.split(".")[0] in ("reward", "q", "target_q"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def batches():
    return [make_batch(seed=seed) for seed in SEEDS]


def assert_same_state(one, two):
    for (name, expected), (_, found) in zip(leaves(one.state_dict()), leaves(two.state_dict()), strict=True):
        if isinstance(expected, torch.Tensor) and expected.is_floating_point():
            assert_close(found, expected, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert (found == expected).all() if isinstance(expected, torch.Tensor) else found == expected, name


@pytest.mark.usefixtures("_arithmetic")
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.termination": "on", "model.num_q": 5},
        {"optim.schedule": "cosine", "optim.warmup_updates": 2, "optim.grad_clip_norm": 0.01},
        {"model.dropout": 0.0, "model.simnorm_layout": "consecutive"},
    ],
)
def test_update_equals_solo(overrides):
    solo, stacked = agents(**overrides), agents(**overrides)
    stack = Stack(stacked)
    for _ in range(3):
        expected = [agent.update(batch) for agent, batch in zip(solo, batches(), strict=True)]
        for theirs, ours in zip(expected, stack.update(batches()), strict=True):
            assert theirs.keys() == ours.keys()
            for name, value in theirs.items():
                assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for one, two in zip(solo, stacked, strict=True):
        assert_same_state(one, two)
        assert two.updates == 3


@pytest.mark.usefixtures("_arithmetic")
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_plan_equals_solo(num_envs, batched):
    solo, stacked = agents(), agents()
    stack = Stack(stacked)
    stack.batched_acting = batched
    obs = [torch.randn(num_envs, 5, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    carries = [[agent.init_carry(num_envs) for agent in group] for group in (solo, stacked)]
    for _ in range(2):
        expected = [agent.act(carry, own, "explore") for agent, carry, own in zip(solo, carries[0], obs, strict=True)]
        found = stack.act(carries[1], obs)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours.action, theirs.action, rtol=1e-3, atol=1e-4)
            assert_close(ours.carry.plan.mean, theirs.carry.plan.mean, rtol=1e-3, atol=1e-4)
            assert_close(ours.extras, theirs.extras, rtol=1e-3, atol=1e-4)
        carries = [[output.carry for output in group] for group in (expected, found)]


def test_seeds_do_not_disturb_each_other():
    """What a seed learns does not depend on who is stacked with it."""
    one, two = agents(), agents()
    stacks = [Stack(one), Stack([two[0], two[2]])]
    for _ in range(2):
        stacks[0].update(batches())
        stacks[1].update([batches()[0], batches()[2]])
    assert_same_state(one[0], two[0])
    assert_same_state(one[2], two[2])


def test_agents_hold_views():
    stacked = agents()
    stack = Stack(stacked)
    before = [agent.model.dynamics[0].weight.clone() for agent in stacked]
    stack.update(batches())
    for agent, old in zip(stacked, before, strict=True):
        assert not torch.equal(agent.model.dynamics[0].weight, old)
    saved = stacked[1].state_dict()
    alone = make(seed=SEEDS[1])
    alone.load_state_dict(saved)
    assert_same_state(stacked[1], alone)
    with torch.no_grad():
        stacked[2].model.pi[0].weight.zero_()
    assert (stack.learner.policy_optimizer.params[0][2] == 0).all()
    assert (stack.learner.policy_optimizer.params[0][1] != 0).any()


def test_a_loss_that_is_not_finite_is_applied_to_no_seed():
    stacked = agents()
    stack = Stack(stacked)
    stack.update(batches())
    before = [dict(leaves(agent.state_dict())) for agent in stacked]
    bad = batches()
    bad[1] = bad[1]._replace(reward=bad[1].reward * float("nan"))
    metrics = stack.update(bad)
    assert [float(one["skipped_updates"]) for one in metrics] == [0, 1, 0]
    for agent, old in zip(stacked, before, strict=True):
        new = dict(leaves(agent.state_dict()))
        assert all(torch.equal(old[name], new[name]) for name in old if name.startswith(("model", "policy")))


def test_captured_update_and_plan_equal_plain_ones(monkeypatch):
    """The places and copies around a CUDA graph, with a stand-in for the graph that computes again what it captured."""

    stand_in_for_graphs(monkeypatch)
    plain, captured = agents()[0], agents(cuda_graph=True)[0]
    carries = [agent.init_carry(2) for agent in (plain, captured)]

    def state_places():
        learner = captured.learner
        optimizers = learner.model_optimizer, learner.policy_optimizer
        moments = [moment for one in optimizers for moment in (*one.flats, *one.exp_avgs, *one.exp_avg_sqs, *one.steps, *one.lrs)]
        return [tensor.data_ptr() for tensor in (*captured.model.state_dict().values(), *moments, learner.scale, learner.skipped)]

    places = state_places()
    for step in range(6):
        batch, obs = make_batch(seed=step), torch.randn(2, 5, generator=torch.Generator().manual_seed(step))
        expected, found = plain.update(batch), captured.update(batch)
        for name, value in expected.items():
            assert_close(found[name], value, rtol=0, atol=0)
        outputs = [agent.act(carry, obs, "explore") for agent, carry in zip((plain, captured), carries, strict=True)]
        assert torch.equal(outputs[0].action, outputs[1].action)
        carries = [output.carry for output in outputs]
    # A graph writes where it was captured: every parameter is still in its place.
    assert places == state_places()
    with pytest.raises(ConfigError, match="shapes changed"):
        captured.update(make_batch(size=4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stacked", [False, True])
def test_cuda_graph_equals_eager(stacked):
    spec = EnvSpec("test", (5,), 2, 50)
    groups = [[make(spec, seed=seed, device="cuda", cuda_graph=graph) for seed in SEEDS] for graph in (False, True)]
    groups = [[agent.__class__(agent.config, spec, "cuda") for agent in group] for group in groups]
    move = lambda batch: type(batch)(*(value.cuda() if isinstance(value, torch.Tensor) else value for value in batch))  # noqa: E731
    for step in range(6):
        data = [move(make_batch(seed=seed + step)) for seed in SEEDS]
        if stacked and step == 0:
            teams = [Stack(group) for group in groups]
        for index, group in enumerate(groups):
            if stacked:
                teams[index].update(data)
            else:
                for agent, batch in zip(group, data, strict=True):
                    agent.update(batch)
    for one, two in zip(*groups, strict=True):
        assert_same_state(one, two)


def test_only_equal_agents_can_be_stacked():
    with pytest.raises(ValueError, match="differ in their seed alone"):
        Stack([make(seed=1), make(seed=2, **{"optim.lr": 1e-3})])
    with pytest.raises(ValueError, match="at least one"):
        Stack([])
