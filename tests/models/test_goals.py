"""Goals: similarity, autoencoder, and a world model with a goal beside it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from worldmpc.config import GoalVAEConfig, ManagerConfig, ModelConfig, WorkerConfig
from worldmpc.models.goal_autoencoder import WEIGHT_RANGE, GoalAutoencoder, mixed
from worldmpc.models.goal_directed import GoalDirected, Weights, plan_weights, with_goal
from worldmpc.models.hierarchy import Hierarchy
from worldmpc.models.nets import init_weights
from worldmpc.models.similarity import in_groups, make_similarity
from worldmpc.models.world_model import WorldModel
from worldmpc.planners import propose, rollout_return

MODEL = ModelConfig(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def autoencoder(layout="strided", **values) -> GoalAutoencoder:
    config = ModelConfig(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=2, simnorm_layout=layout)
    goals = GoalAutoencoder(GoalVAEConfig(**{"n_latents": 3, "n_classes": 4, **values}), config, 16, 32)
    init_weights(goals, generator())
    return goals


def latents(*shape, layout="strided"):
    """Random points of the latent space, [..., 16]."""
    parts = torch.rand(*shape, 2, 8, generator=generator(1)).softmax(-1)
    return (parts.transpose(-1, -2) if layout == "strided" else parts).flatten(-2)


def world(discrete=False, terminates=True, **values) -> WorldModel:
    model = WorldModel(MODEL.__class__(**{**MODEL.__dict__, **values}), 3, 2, terminates=terminates, discrete=discrete)
    with torch.no_grad():
        for last in (model.reward[-1], model.critics.layers[-1]):  # which begin at 0
            last.weight.normal_(std=0.1, generator=generator(2))
    return model


def hierarchy(model, manager=None, **worker) -> Hierarchy:
    manager = ManagerConfig(goal_interval=4) if manager is None else manager
    own = Hierarchy(GoalVAEConfig(n_latents=3, n_classes=4), manager, WorkerConfig(**worker), model, seed=1)
    if own.worker is not None:
        with torch.no_grad():
            own.worker.q.layers[-1].weight.normal_(std=0.1, generator=generator(3))
    return own


@pytest.mark.parametrize("layout", ["strided", "consecutive"])
def test_groups_are_distributions(layout):
    groups = in_groups(latents(5, layout=layout), 8, layout == "strided")
    assert groups.shape == (5, 2, 8)
    assert_close(groups.sum(-1), torch.ones(5, 2))


@pytest.mark.parametrize("kind", ["groupwise", "cosine"])
def test_similarity_is_one_at_the_goal_alone(kind):
    similarity, z = make_similarity(kind, 8, True), latents(6)
    assert_close(similarity(z, z), torch.ones(6))
    others = similarity(z, z.roll(1, 0))
    assert (others > 0).all() and (others < 1).all()
    assert make_similarity("l2", 8, True)(z, z).abs().max() == 0


def test_similarity_by_hand():
    """Two groups of two: one alike, of the other the goal is sure and the latent is not."""
    z, goal = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 1.0, 0.0]])
    assert make_similarity("groupwise", 2, False)(z, goal).item() == pytest.approx((1 + 0.5 / 1.0) / 2)
    assert make_similarity("cosine", 2, False)(z, goal).item() == pytest.approx((0.5 + 0.5) / 1.5)
    assert make_similarity("l2", 2, False)(z, goal).item() == pytest.approx(-math.sqrt(0.5))
    disjoint = torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert make_similarity("groupwise", 2, False)(*disjoint).item() == 0


@pytest.mark.parametrize("layout", ["strided", "consecutive"])
def test_goals_are_latents(layout):
    goals = autoencoder(layout)
    code = torch.nn.functional.one_hot(torch.randint(4, (7, 3), generator=generator()), 4).float()
    groups = in_groups(goals.decode(code), 8, layout == "strided")
    assert_close(groups.sum(-1), torch.ones(7, 2))
    assert (groups > 0).all()


def test_straight_through_gradients_are_those_of_the_probabilities():
    goals, weight = autoencoder(unimix=0.0), torch.randn(5, 3, 4, generator=generator())
    raw = torch.randn(5, 3, 4, generator=generator(4), requires_grad=True)
    eps = torch.randn(5, 3, 4, generator=generator(5))
    code = goals.sample(raw.log_softmax(-1), eps, torch.ones(()))
    assert_close(code.detach().sum(-1), torch.ones(5, 3))
    assert ((code - code.round()).abs() < 1e-6).all()
    (found,) = torch.autograd.grad((code * weight).sum(), raw)
    (expected,) = torch.autograd.grad((raw.softmax(-1) * weight).sum(), raw)
    assert_close(found, expected)


def test_codes_are_drawn_with_their_probabilities():
    goals, log_probs = autoencoder(), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    eps = torch.randn(20_000, 3, 4, generator=generator())
    share = goals.sample(log_probs.expand(20_000, 3, 4), eps, torch.ones(())).mean((0, 1))
    assert_close(share, log_probs.exp(), atol=0.01, rtol=0)


def test_gumbel_codes_sharpen_as_the_temperature_falls():
    goals = autoencoder(kind="gumbel", tau_start=1.0, tau_end=0.1, anneal_steps=10)
    assert [round(goals.temperature(updates), 3) for updates in (0, 5, 10, 99)] == [1.0, 0.55, 0.1, 0.1]
    log_probs, eps = torch.zeros(50, 3, 4).log_softmax(-1), torch.randn(50, 3, 4, generator=generator())
    soft, hard = (goals.sample(log_probs, eps, torch.tensor(tau)) for tau in (1.0, 0.01))
    assert_close(soft.sum(-1), torch.ones(50, 3))
    assert soft.amax(-1).mean() < 0.8 < 0.95 < hard.amax(-1).mean()
    assert torch.equal(soft.argmax(-1), hard.argmax(-1))


def test_divergence_by_hand():
    goals = autoencoder()
    uniform, sure = torch.full((3, 4), 0.25).log(), torch.tensor([[1 - 3e-6, 1e-6, 1e-6, 1e-6]]).expand(3, 4).log()
    half = torch.tensor([[0.5, 0.5, 1e-9, 1e-9]]).expand(3, 4).log()
    assert goals.kl(uniform).item() == pytest.approx(0, abs=1e-6)
    assert goals.kl(sure).item() == pytest.approx(3 * math.log(4), abs=1e-3) == pytest.approx(goals.most_kl, abs=1e-3)
    assert goals.kl(half).item() == pytest.approx(3 * math.log(2), abs=1e-5)


def test_a_share_is_uniform():
    probs = mixed(torch.tensor([50.0, 0.0, 0.0, 0.0]), 0.01).exp()
    assert_close(probs, torch.tensor([0.9925, 0.0025, 0.0025, 0.0025]))
    assert_close(mixed(torch.tensor([1.0, 2.0]), 0.0), torch.tensor([1.0, 2.0]).log_softmax(-1))


def test_cross_entropy_and_novelty():
    goals, z = autoencoder(), latents(9)
    assert_close(goals.cross_entropy(z, z), goals.entropy(z))
    flat = torch.full_like(z, 1 / 8)
    assert_close(goals.cross_entropy(z, flat), torch.full((9,), math.log(8)))
    assert (goals.novelty(z) > 0).all()
    goals.reconstruct = lambda z: z
    assert_close(goals.novelty(z), torch.zeros(9))


def test_the_weight_of_the_divergence_follows_its_target():
    goals = autoencoder(kl_target=0.5)
    target, on = 0.5 * goals.most_kl, torch.zeros(())
    assert goals.beta.item() == 1.0
    goals.beta.fill_(0.1)
    for kl, factor in ((1.2 * target, 1.1), (0.8 * target, 1 / 1.1), (1.05 * target, 1.0), (0.95 * target, 1.0)):
        before = goals.beta.item()
        goals.adapt(torch.tensor(kl), on, on)
        assert goals.beta.item() == pytest.approx(before * factor)
    goals.adapt(torch.tensor(9 * target), on, torch.ones(()))
    assert goals.beta.item() == pytest.approx(0.1)
    for kl, end in ((0.0, WEIGHT_RANGE[0]), (9 * target, WEIGHT_RANGE[1])):
        for _ in range(200):
            goals.adapt(torch.tensor(kl), on, on)
        assert goals.beta.item() == pytest.approx(end)
    fixed = autoencoder(beta=0.3)
    fixed.adapt(torch.tensor(0.0), on, on)
    assert fixed.beta.item() == pytest.approx(0.3)


def test_novelty_is_measured_by_what_is_usually_lost():
    goals, z, on = autoencoder(), latents(9), torch.zeros(())
    assert_close(goals.novelty(z), goals.lost(z))
    for _ in range(2_000):
        goals.adapt(on, torch.tensor(1e-3), on)
    assert_close(goals.novelty(z), 1e3 * goals.lost(z), rtol=1e-3, atol=0)
    for bad in (1.0, torch.nan, torch.inf):
        goals.adapt(on, torch.tensor(bad), torch.ones(()))
    assert_close(goals.novelty(z), 1e3 * goals.lost(z), rtol=1e-3, atol=0)


def test_the_weight_of_the_entropy_follows_its_target():
    model, on = world(), torch.zeros(())
    boss = hierarchy(model, manager=ManagerConfig(ent_target=0.25)).manager
    target, least = 0.25 * boss.most_entropy, 0.75 * boss.most_entropy
    before = boss.ent_coef.item()
    boss.adapt(torch.tensor(target - 0.2 * least), on)  # too sure of itself
    assert boss.ent_coef.item() == pytest.approx(1.1 * before)
    boss.adapt(torch.tensor(target), on)
    boss.adapt(torch.tensor(0.0), torch.ones(()))
    assert boss.ent_coef.item() == pytest.approx(1.1 * before)
    boss.adapt(torch.tensor(target + 0.2 * least), on)
    assert boss.ent_coef.item() == pytest.approx(before)
    fixed = hierarchy(model, manager=ManagerConfig(ent_coef=0.01)).manager
    fixed.adapt(on, on)
    assert fixed.ent_coef.item() == pytest.approx(0.01)


def test_networks_beside_leave_the_world_model_as_it_is():
    alone, model = world(), world()
    state = torch.get_rng_state()
    one, two = hierarchy(model), hierarchy(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before, after) for before, after in zip(alone.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(before, after) for before, after in zip(one.parameters(), two.parameters(), strict=True))
    assert {name for name, _ in one.named_children()} == {"goals", "manager", "worker"}
    fresh = Hierarchy(GoalVAEConfig(), ManagerConfig(), WorkerConfig(), model, seed=1)
    for critics, slow in ((fresh.worker.q, fresh.worker.slow_q), (fresh.manager.critics, fresh.manager.slow_critics)):
        assert all(torch.equal(fast, own) for fast, own in zip(critics.parameters(), slow.parameters(), strict=True))
        assert not any(own.requires_grad for own in slow.parameters()) and critics.layers[-1].weight.abs().max() == 0


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("num_dynamics", [1, 2])
def test_rewards_of_task_and_goal_are_weighted(discrete, num_dynamics):
    model = world(discrete, num_dynamics=num_dynamics)
    own = hierarchy(model)
    directed = GoalDirected(model, own.worker, own.similarity, lambda: Weights(0.7, 0.3))
    lead = (num_dynamics, 5) if num_dynamics > 1 else (5,)
    z, goal, actions = latents(*lead), latents(*lead).roll(1, -2), torch.rand(3, *lead, 2, generator=generator())
    steps, plain = directed.rollout(with_goal(z, goal), actions), model.rollout(z, actions)
    assert_close(steps.z, with_goal(plain.z, goal))
    assert_close(steps.reward, 0.3 * plain.reward + 0.7 * own.similarity(plain.z[1:], goal))
    assert_close(steps.cont, plain.cont)
    if num_dynamics == 1:
        one = directed.step(with_goal(z, goal), actions[0])
        assert_close(one.z, steps.z[1])
        assert_close(one.reward, steps.reward[0])
        assert_close(directed.next(with_goal(z, goal), actions[0]), steps.z[1])


@pytest.mark.parametrize("discrete", [False, True])
def test_terminal_values_match_the_rewards(discrete):
    model = world(discrete)
    own = hierarchy(model)
    z, eps, critics = with_goal(latents(5), latents(5).roll(1, 0)), torch.zeros(5, 2), torch.tensor([0, 1])
    task, goal = model.terminal_value(z[:, :16], eps, critics), own.worker.value(z, eps, model.two_hot)
    assert goal.abs().max() > 0 and task.abs().max() > 0
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.2, 0.5)):
        found = GoalDirected(model, own.worker, own.similarity, lambda now=weights: Weights(*now)).terminal_value(z, eps, critics)
        assert_close(found, weights[0] * goal + weights[1] * task)


def test_proposals_are_half_the_task_policys_where_the_task_counts():
    model = world()
    own = hierarchy(model)
    z, eps = with_goal(latents(2), latents(2).roll(1, 0))[:, None].expand(-1, 6, -1), torch.randn(2, 6, 2, generator=generator())
    directed = GoalDirected(model, own.worker, own.similarity, lambda: Weights(1.0, 1.0))
    both = directed.propose(z, eps)
    assert_close(both[:, :3], model.propose(z[:, :3, :16], eps[:, :3]))
    assert_close(both[:, 3:], own.worker.propose(z[:, 3:], eps[:, 3:]))
    assert_close(GoalDirected(model, own.worker, own.similarity, lambda: Weights(1.0, 0.0)).propose(z, eps), own.worker.propose(z, eps))
    assert propose(directed, z[:, 0], eps[None].expand(3, -1, -1, -1)).shape == (3, 2, 6, 2)


def test_a_bonus_of_nothing_is_the_task_alone():
    model = world()
    own = hierarchy(model, mode="planner_bonus")
    assert own.worker is None
    plain = GoalDirected(model, None, own.similarity, lambda: Weights(0.0, 1.0))
    z, goal, actions = latents(2, 5), latents(2, 5).roll(1, 0), torch.rand(3, 2, 5, 2, generator=generator()) * 2 - 1
    eps, critics = torch.randn(2, 5, 2, generator=generator()), torch.tensor([1, 0])
    found = rollout_return(plain, with_goal(z, goal), actions, 0.9, eps, critics)
    assert_close(found, rollout_return(model, z, actions, 0.9, eps, critics, differentiable=True))
    bonus = GoalDirected(model, None, own.similarity, lambda: Weights(0.1, 1.0))
    assert (rollout_return(bonus, with_goal(z, goal), actions, 0.9, eps, critics) > found).all()


def test_goals_count_less_the_more_the_task_has_to_say():
    worker = hierarchy(world()).worker
    assert plan_weights(WorkerConfig(), worker) == Weights(torch.tensor(1.0), 1.0)
    worker.task_range.fill_(0.8)
    found = plan_weights(WorkerConfig(goal_weight=0.5, task_range=0.2), worker)
    assert found.goal.item() == pytest.approx(0.125) and found.task == 1.0
    assert plan_weights(WorkerConfig(task_weight=0.0), worker) == Weights(1.0, 0.0)
    assert plan_weights(WorkerConfig(mode="planner_bonus"), None) == Weights(0.1, 1.0)
