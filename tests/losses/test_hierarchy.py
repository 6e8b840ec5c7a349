"""Objectives of Director: closed forms, and whom their gradients reach."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.models.test_goals import generator, hierarchy, latents, world
from worldmpc import losses
from worldmpc.config import ManagerConfig, WorkerConfig
from worldmpc.losses.hierarchy import best_proposal, reaching
from worldmpc.models.goal_directed import Weights, with_goal
from worldmpc.models.hierarchy import EXPLORATION, EXTRINSIC
from worldmpc.noise import NoiseStream
from worldmpc.types import SequenceBatch

BOTH = Weights(1.0, 1.0)
COEFS = losses.Coefficients(rho=0.5, entropy=1e-4, tau=0.01)
MANAGER = ManagerConfig(goal_interval=4, imagined_goals=3, ent_coef=0.01)


def draw(specs):
    return NoiseStream(1, "test").draw(specs)


def worker_batch(terminated=0.0):
    """Two steps of three windows."""
    zg = with_goal(latents(6), latents(6).roll(1, 0))
    action = torch.rand(6, 2, generator=generator()) * 2 - 1
    parts = zg, action, zg.roll(2, 0), torch.full((6,), terminated), torch.ones(6)
    return losses.WorkerBatch(*(part.unflatten(0, (2, 3)) for part in parts))


def test_lambda_returns_by_hand():
    reward, cont, values = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0]]), torch.tensor([[9.0], [10.0], [20.0]])
    last = 2 + 0.9 * 1.0 * 20
    first = 1 + 0.9 * 0.5 * (0.2 * 10 + 0.8 * last)
    assert_close(losses.lambda_returns(reward, cont, values, 0.9, 0.8), torch.tensor([[first], [last]]))
    assert_close(losses.lambda_returns(reward, cont, values, 0.9, 0.0), torch.tensor([[1 + 0.45 * 10], [last]]))
    both = losses.lambda_returns(torch.stack((reward, 2 * reward)), cont, torch.stack((values, 2 * values)), 0.9, 0.8)
    assert_close(both[1], 2 * both[0])


def test_reaching_a_goal_needs_all_before():
    assert_close(reaching(torch.tensor([[0.5], [0.2], [0.9]])), torch.tensor([[1.0], [0.5], [0.1]]))


def test_the_autoencoder_loss_by_hand():
    """Uniform decoder, uniform codes: the cross-entropy of eight entries, no divergence; all have one most likely class."""
    goals = hierarchy(world()).goals
    with torch.no_grad():
        for last in (goals.encoder[-1], goals.decoder[-1]):
            last.weight.zero_()
    z, real = latents(6), torch.tensor([1.0, 1, 1, 1, 0, 0])
    noise = draw(losses.autoencoder_noise(goals, 6))
    loss, metrics = losses.autoencoder_loss(goals, z, real, torch.ones(()), noise)
    assert metrics["goal_vae/recon_loss"].item() == pytest.approx(math.log(8), rel=1e-5)
    assert loss.item() == pytest.approx(2 * math.log(8), rel=1e-5)
    assert metrics["goal_vae/kl"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["goal_vae/perplexity"].item() == pytest.approx(1, rel=1e-5)
    goals.log_probs = lambda z: torch.eye(4).roll(1, 0)[torch.arange(6) % 4][:, None].expand(-1, 3, -1).clamp(min=1e-3).log()
    assert losses.autoencoder_loss(goals, z, real, torch.ones(()), noise)[1]["goal_vae/perplexity"].item() == pytest.approx(4, rel=1e-5)
    assert_close(metrics["goal_vae/marginal_entropy"], goals.entropy(z[:4].mean(0)))
    assert_close(metrics["goal_vae/latent_entropy"], goals.entropy(z[:4]).mean())


def test_padding_teaches_the_autoencoder_nothing():
    goals, real = hierarchy(world()).goals, torch.tensor([1.0, 1, 0, 0])
    noise = draw(losses.autoencoder_noise(goals, 4))
    z = latents(4)
    other = torch.cat((z[:2], z[2:].flip(-1)))
    found = [losses.autoencoder_loss(goals, one, real, torch.ones(()), noise)[0] for one in (z, other)]
    assert torch.equal(*found)


def windows(length, batch, codes):
    """Windows in whose observations the time stands, with a model that encodes it into every entry of a latent."""
    model = world()
    model.encode = lambda obs: obs[..., :1].expand(*obs.shape[:-1], 16)
    obs = torch.arange(length + 1.0)[:, None, None].expand(-1, batch, 3)
    zeros = torch.zeros(length, batch)
    fields = SequenceBatch(obs, torch.zeros(length, batch, 2), zeros, zeros, zeros, zeros + 1, zeros.long(), {"goal_code": codes})
    return model, fields


@pytest.mark.parametrize("kind", ["manager", "future", "random"])
def test_goals_of_replayed_steps(kind):
    goals, steps, batch = hierarchy(world()).goals, 3, 400
    shares = tuple(float(name == kind) for name in ("manager", "future", "random"))
    codes = torch.randint(4, (8, batch, 3), generator=generator()).float()
    codes[0, :50] = torch.nan
    model, fields = windows(8, batch, codes)
    fields.mask[5:, :100] = 0  # these episodes end after five steps
    noise = draw(losses.goal_noise(goals, steps, batch))
    found = losses.choose_goals(WorkerConfig(goals=shares), goals, model, fields, steps, noise)
    assert found.shape == (steps, batch, 16)
    one_hot = torch.nn.functional.one_hot(codes.nan_to_num().long(), 4).float()
    if kind == "future":
        now = torch.arange(3.0)[:, None]
        time = found[..., 0]
        assert (time > now).all() and time[:, 100:].max() == 8 and time[:, :100].max() == 5
        assert {int(value) for value in time[0, 100:].unique()} == set(range(1, 9))
        assert {int(value) for value in time[2, :100].unique()} == {3, 4, 5}
    elif kind == "manager":
        assert_close(found[1:], goals.decode(one_hot[1:3]))
        assert_close(found[0, 50:], goals.decode(one_hot[0, 50:]))
        assert not torch.isclose(found[0, :50], goals.decode(one_hot[0, :50])).all(-1).all()
    else:
        assert len(found.flatten(0, 1).unique(dim=0)) > 50  # of 64 codes


def test_shares_of_goals():
    goals, batch = hierarchy(world()).goals, 4000
    model, fields = windows(4, batch, torch.zeros(4, batch, 3))
    model.encode = lambda obs: torch.full((*obs.shape[:-1], 16), 7.0)
    noise = draw(losses.goal_noise(goals, 1, batch))
    found = losses.choose_goals(WorkerConfig(goals=(0.5, 0.3, 0.2)), goals, model, fields, 1, noise)[0]
    of_future = (found == 7).all(-1).float().mean().item()
    first = goals.decode(torch.nn.functional.one_hot(torch.zeros(3).long(), 4).float())
    of_manager = torch.isclose(found, first).all(-1).float().mean().item()
    assert of_future == pytest.approx(0.3, abs=0.03) and of_manager == pytest.approx(0.5 + 0.2 / 64, abs=0.03)


@pytest.mark.parametrize("discrete", [False, True])
def test_worker_targets_by_hand(discrete):
    """Critics that say 0 everywhere: the target is the goal reward of the next latent alone."""
    model = world(discrete)
    own = hierarchy(model)
    with torch.no_grad():
        own.worker.slow_q.layers[-1].weight.zero_()
    batch = worker_batch()
    if discrete:
        batch = batch._replace(action=torch.eye(2)[torch.arange(6) % 2].unflatten(0, (2, 3)))
    noise = draw(losses.worker_noise(own.worker, model, 2, 3))
    _, metrics = losses.worker_value_loss(own, model, batch, 0.9, noise)
    latent, goal = batch.next_zg.chunk(2, -1)
    assert_close(metrics["worker/goal_reward"], own.similarity(latent, goal).mean())
    assert_close(metrics["worker/value_target"], metrics["worker/goal_reward"])
    with torch.no_grad():
        own.worker.slow_q.layers[-1].weight.normal_(std=0.3, generator=generator())
    worker, decode = own.worker, model.two_hot.decode
    if discrete:
        least = decode(worker.choice_logits(batch.next_zg, slow=True)).amin(0)
        value = (worker.probs(batch.next_zg) * least).sum(-1)
    else:
        value = decode(worker.q_logits(batch.next_zg, worker.propose(batch.next_zg, noise["worker_next"]), slow=True)).amin(0)
    assert (value.abs() > 0.01).any()
    ended = losses.worker_value_loss(own, model, worker_batch(terminated=1.0)._replace(action=batch.action), 0.9, noise)[1]
    going = losses.worker_value_loss(own, model, batch, 0.9, noise)[1]
    assert_close(ended["worker/value_target"], ended["worker/goal_reward"])
    assert_close(going["worker/value_target"], going["worker/goal_reward"] + 0.9 * value.mean())


def test_what_is_not_real_teaches_the_worker_nothing():
    model = world()
    own = hierarchy(model)
    noise = draw(losses.worker_noise(own.worker, model, 2, 3))
    batch = worker_batch()._replace(real=torch.tensor([[1.0, 1, 1], [0, 1, 0]]))
    real = batch.real[..., None]
    other = batch._replace(zg=torch.where(real > 0, batch.zg, batch.zg.roll(1, 1)), action=batch.action * real)
    found = []
    with torch.no_grad():
        own.worker.q.layers[-1].weight.normal_(std=3.0, generator=generator())
    for one in (batch, other):
        policy, metrics = losses.worker_policy_loss(BOTH, own.worker, model, one, COEFS._replace(tau=1.0), torch.ones(()), noise)
        assert metrics["worker/pi_scale"] > 1
        found.append((losses.worker_value_loss(own, model, one, 0.9, noise)[0], policy))
    assert_close(*found)


@pytest.mark.parametrize("discrete", [False, True])
def test_gradients_reach_their_own_parts_alone(discrete):
    model = world(discrete)
    own = hierarchy(model)
    rows = 6
    noise = draw(losses.worker_noise(own.worker, model, 2, 3) | losses.autoencoder_noise(own.goals, rows))
    noise |= draw(losses.imagination_noise(MANAGER, own, 2, rows))
    batch = worker_batch()
    goal_loss, _ = losses.autoencoder_loss(own.goals, latents(rows), torch.ones(rows), torch.ones(()), noise)
    value_loss, _ = losses.worker_value_loss(own, model, batch, 0.9, noise)
    policy_loss, _ = losses.worker_policy_loss(BOTH, own.worker, model, batch, COEFS, torch.ones(()), noise)
    imagined = losses.imagine(BOTH, own, model, latents(rows), noise)
    critic_loss, returns, _ = losses.manager_critic_loss(MANAGER, own, model, imagined)
    actor_loss, _, _ = losses.manager_actor_loss(MANAGER, own, model, imagined, returns, torch.ones(2), 0.01)
    expected = {
        goal_loss: {"goals.encoder", "goals.decoder"},
        value_loss: {"worker.q"},
        policy_loss: {"worker.pi"},
        critic_loss: {"manager.critics"},
        actor_loss: {"manager.actor"},
    }
    for loss, names in expected.items():
        both = torch.nn.ModuleDict({"world": model, "own": own})
        named = [(name, value) for name, value in both.named_parameters() if value.requires_grad]
        found = torch.autograd.grad(loss, [value for _, value in named], allow_unused=True)
        touched = {".".join(name.split(".")[:3]) for (name, _), part in zip(named, found, strict=True) if part is not None}
        assert touched == {f"own.{name}" for name in names}


@pytest.mark.parametrize("discrete", [False, True])
def test_the_worker_climbs_what_plans_end_in(discrete):
    model = world(discrete=discrete)
    own = hierarchy(model)
    batch, noise = worker_batch(), draw(losses.worker_noise(own.worker, model, 2, 3))
    with torch.no_grad():
        model.q.layers[-1].weight.normal_(std=0.3, generator=generator())
    z = batch.zg.chunk(2, -1)[0]

    def loss(goal, task):
        weights, scale = Weights(goal, task), torch.ones(())
        return losses.worker_policy_loss(weights, own.worker, model, batch, COEFS._replace(entropy=0.0, tau=0.0), scale, noise)[0]

    if discrete:
        of_goal = model.two_hot.decode(own.worker.choice_logits(batch.zg)).mean(0)
        of_task = model.choice_values(z, noise["worker_critics"]).mean(0)
        for goal, task in ((1.0, 0.0), (0.0, 1.0), (0.1, 2.0)):
            best = (goal * of_goal + task * of_task).argmax(-1, keepdim=True)
            expected = -torch.log_softmax(own.worker.pi(batch.zg), -1).gather(-1, best).mean()
            assert_close(loss(goal, task), expected, rtol=1e-2, atol=1e-2)
        return
    action = own.worker.policy(batch.zg, noise["worker_policy"]).action
    of_goal = model.two_hot.decode(own.worker.q_logits(batch.zg, action)).mean()
    of_task = model.q_values(z, action, noise["worker_critics"]).mean()
    for goal, task in ((1.0, 0.0), (0.0, 1.0), (0.1, 2.0)):
        assert_close(loss(goal, task), -(goal * of_goal + task * of_task))


@pytest.mark.parametrize("discrete", [False, True])
def test_the_range_of_the_tasks_values_is_its_own(discrete):
    """It knows nothing of goals, and neither padding nor what is less than the least moves it."""
    model = world(discrete=discrete)
    own = hierarchy(model)
    batch, noise = worker_batch(), draw(losses.worker_noise(own.worker, model, 2, 3))
    coefs, one = COEFS._replace(tau=1.0), torch.ones(())

    def found(weights, batch):
        return losses.worker_policy_loss(weights, own.worker, model, batch, coefs, one, noise)[1]["worker/task_range"]

    least = torch.tensor(own.worker.config.task_range)
    with torch.no_grad():
        model.q.layers[-1].weight.zero_()
    assert_close(found(BOTH, batch), least)
    with torch.no_grad():
        model.q.layers[-1].weight.normal_(std=0.3, generator=generator())
        own.worker.task_range.fill_(7.0)
    assert_close(found(Weights(1.0, 0.0), batch), torch.tensor(7.0))
    other = batch._replace(zg=torch.cat((batch.zg[:1], batch.zg[1:].roll(1, 1))))
    assert least < found(BOTH, batch) < 7
    for weights, steps in ((Weights(100.0, 1.0), batch), (Weights(1.0, 3.0), batch), (BOTH, other)):
        assert_close(found(weights, steps), found(BOTH, batch))


def test_imagined_rewards_are_means_over_the_decisions_of_a_goal():
    model = world(terminates=False)
    own = hierarchy(model)
    noise = draw(losses.imagination_noise(MANAGER, own, 2, 5))
    imagined = losses.imagine(BOTH, own, model, latents(5), noise)
    assert imagined.z.shape == (4, 5, 16) and imagined.code.shape == (3, 5, 3, 4) and imagined.reward.shape == (2, 3, 5)
    assert torch.equal(imagined.cont, torch.ones(3, 5))
    z, goal, task, novelty = latents(5), own.goals.decode(imagined.code[0]), [], []
    for eps in noise["manager_worker"][0]:
        step = model.step(z, own.worker.propose(with_goal(z, goal), eps))
        z = step.z
        task.append(step.reward)
        novelty.append(own.goals.novelty(z))
    assert_close(imagined.z[1], z)
    assert_close(imagined.reward[EXTRINSIC, 0], torch.stack(task).mean(0))
    assert_close(imagined.reward[EXPLORATION, 0], torch.stack(novelty).mean(0))


def test_what_lies_behind_an_imagined_end_counts_for_nothing():
    model = world(terminates=True)
    own = hierarchy(model)
    model.cont = lambda z: torch.zeros(z.shape[:-1])
    noise = draw(losses.imagination_noise(MANAGER, own, 2, 5))
    imagined = losses.imagine(BOTH, own, model, latents(5), noise)
    assert torch.equal(imagined.cont, torch.zeros(3, 5))
    first = model.step(
        latents(5), own.worker.propose(with_goal(latents(5), own.goals.decode(imagined.code[0])), noise["manager_worker"][0, 0])
    )
    assert_close(imagined.reward[EXTRINSIC, 0], first.reward / 4)
    assert_close(imagined.reward[EXPLORATION, 0], own.goals.novelty(first.z) / 4)
    with torch.no_grad():
        own.manager.critics.layers[-1].weight.normal_(std=0.5, generator=generator())
    loss, returns, _ = losses.manager_critic_loss(MANAGER, own, model, imagined)
    assert_close(returns[EXTRINSIC, 0], imagined.reward[EXTRINSIC, 0])
    later = imagined._replace(reward=torch.cat((imagined.reward[:, :1], 9 + imagined.reward[:, 1:]), 1))
    assert_close(losses.manager_critic_loss(MANAGER, own, model, later)[0], loss)
    behind = torch.cat((returns[:, :1], 100 * torch.rand(2, 2, 5, generator=generator())), 1)
    found = [losses.manager_actor_loss(MANAGER, own, model, imagined, each, torch.ones(2), 0.5)[:2] for each in (returns, behind)]
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_returns_end_in_values_of_the_slow_critics_and_advantages_begin_at_those_of_the_others():
    model = world(terminates=False)
    own = hierarchy(model)
    manager, decode = own.manager, model.two_hot.decode
    with torch.no_grad():
        for critics, seed in ((manager.critics, 1), (manager.slow_critics, 2)):
            critics.layers[-1].weight.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    imagined = losses.imagine(BOTH, own, model, latents(5), draw(losses.imagination_noise(MANAGER, own, 2, 5)))
    loss, returns, _ = losses.manager_critic_loss(MANAGER, own, model, imagined)
    logits = manager.critics(imagined.z[:-1])
    assert_close(loss, sum(model.two_hot.loss(logits[kind], returns[kind]).mean() for kind in (EXTRINSIC, EXPLORATION)))
    expected = losses.lambda_returns(imagined.reward, imagined.cont, decode(manager.slow_critics(imagined.z)), MANAGER.gamma, MANAGER.lam)
    assert_close(returns, expected)
    raw = returns - decode(manager.critics(imagined.z[:-1]))
    mixed = raw[EXTRINSIC] + MANAGER.intrinsic_coef * raw[EXPLORATION]
    metrics = losses.manager_actor_loss(MANAGER, own, model, imagined, returns, torch.ones(2), 0.0)[2]
    assert_close(metrics["manager/advantage"], mixed.mean())
    assert_close(metrics["manager/advantage_std"], mixed.std(correction=0))


def test_advantages_have_no_scale():
    """Small returns of exploration count as much as large ones where the task has none."""
    model = world(terminates=False)
    own = hierarchy(model)
    imagined = losses.imagine(BOTH, own, model, latents(5), draw(losses.imagination_noise(MANAGER, own, 2, 5)))
    returns = torch.stack((torch.zeros(3, 5), torch.rand(3, 5, generator=generator())))
    found = [losses.manager_actor_loss(MANAGER, own, model, imagined, factor * returns, torch.ones(2), 0.0)[0] for factor in (0.1, 10.0)]
    assert_close(found[0], found[1])
    nothing, _, metrics = losses.manager_actor_loss(MANAGER, own, model, imagined, 0 * returns, torch.ones(2), 0.0)
    assert_close(nothing, -MANAGER.ent_coef * metrics["manager/entropy"])


def test_returns_count_by_their_ranges():
    model = world(terminates=False)
    config = ManagerConfig(goal_interval=4, imagined_goals=3, ent_coef=0.0, intrinsic_coef=0.5)
    own = hierarchy(model, config)
    imagined = losses.imagine(BOTH, own, model, latents(5), draw(losses.imagination_noise(config, own, 2, 5)))
    returns = torch.rand(2, 3, 5, generator=generator())
    loss, scales, _ = losses.manager_actor_loss(config, own, model, imagined, returns, torch.tensor([2.0, 5.0]), 0.0)
    mixed = returns[EXTRINSIC] / 2 + 0.5 * returns[EXPLORATION] / 5
    mixed = (mixed - mixed.mean()) / mixed.std(correction=0)
    taken = (own.manager.log_probs(imagined.z[:-1]) * imagined.code).sum((-1, -2))
    assert_close(loss, -(mixed * taken).mean())
    assert scales.tolist() == [2.0, 5.0]


def test_a_bonus_chooses_among_the_task_policys_actions():
    model = world()
    own = hierarchy(model, mode="planner_bonus")
    z, goal, eps = latents(5), latents(5).roll(1, 0), torch.randn(4, 5, 2, generator=generator())
    near = best_proposal(Weights(1e3, 1.0), own, model, z, goal, eps)
    reached = own.similarity(model.next(z, near), goal)
    each = [own.similarity(model.next(z, model.propose(z, one)), goal) for one in eps]
    assert_close(reached, torch.stack(each).amax(0))
    with torch.no_grad():
        model.q.layers[-1].weight.normal_(std=0.3, generator=generator())
    best = best_proposal(Weights(1e-6, 1.0), own, model, z, goal, eps)
    values = torch.stack([model.q_values(z, model.propose(z, one)).mean(0) for one in eps])
    assert_close(model.q_values(z, best).mean(0), values.amax(0))
    noise = draw(losses.imagination_noise(MANAGER, own, 2, 5))
    codes = noise | {"manager_codes": -noise["manager_codes"]}
    bonus = Weights(1e3, 1.0)
    one, other = (losses.imagine(bonus, own, model, z, each) for each in (noise, codes))
    assert not torch.equal(one.reward, other.reward)


def test_the_manager_learns_which_goal_pays():
    """A bandit: class 0 of the first code returns 1, the others nothing."""
    model = world()
    config = ManagerConfig(goal_interval=1, imagined_goals=1, ent_coef=0.05, intrinsic_coef=0.0)
    own = hierarchy(model, config)
    optimizer, z = torch.optim.Adam(own.manager.actor.parameters(), 3e-3), latents(64)
    stream = NoiseStream(1, "bandit")
    for _ in range(150):
        noise = stream.draw(losses.imagination_noise(config, own, 2, 64))
        imagined = losses.imagine(BOTH, own, model, z, noise)
        returns = torch.stack((imagined.code[..., 0, 0], torch.zeros(1, 64)))
        loss, _, metrics = losses.manager_actor_loss(config, own, model, imagined, returns, torch.ones(2), 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probs = own.manager.log_probs(z).exp()
    assert probs[:, 0, 0].mean() > 0.9 and probs[:, 1:].amax(-1).mean() < 0.8
    assert metrics["manager/entropy"] > 1.0
