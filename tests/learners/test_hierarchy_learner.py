"""Updates of Director's own networks: what they read, what they move, how often and how far."""

from __future__ import annotations

import pytest
import torch

from worldmpc import losses
from worldmpc.agents.director import Director
from worldmpc.config import make_config
from worldmpc.types import EnvSpec, SequenceBatch

SMALL = {"manager.goal_interval": 4, "goal_vae.n_latents": 3, "goal_vae.n_classes": 4, "manager.batch_size": 4}
WINDOW, LENGTH, WINDOWS = 3, 4, 8


def make(**overrides):
    """A learner whose critics say something."""
    config = make_config("debug", agent="director", **{**SMALL, **overrides})
    learner = Director(config, EnvSpec("x", (3,), 2, 50)).learner
    hierarchy, generator = learner.hierarchy, torch.Generator().manual_seed(5)
    with torch.no_grad():
        for critics, slow in ((hierarchy.worker.q, hierarchy.worker.slow_q), (hierarchy.manager.critics, hierarchy.manager.slow_critics)):
            critics.layers[-1].weight.normal_(std=0.3, generator=generator)
            slow.load_state_dict(critics.state_dict())
        learner.model.q.layers[-1].weight.normal_(std=0.3, generator=generator)
    return learner


def batch(**fields):
    generator = torch.Generator().manual_seed(3)
    steps = LENGTH, WINDOWS
    whole = SequenceBatch(
        torch.randn(LENGTH + 1, WINDOWS, 3, generator=generator),
        torch.rand(*steps, 2, generator=generator) * 2 - 1,
        torch.randn(steps, generator=generator),
        torch.zeros(steps),
        torch.zeros(steps),
        torch.ones(steps),
        torch.zeros(steps, dtype=torch.int64),
        {"goal_code": torch.randint(4, (*steps, 3), generator=generator).float()},
    )
    return whole._replace(**fields)


def parameters(learner, prefix=""):
    return {name: value.clone() for name, value in learner.hierarchy.state_dict().items() if name.startswith(prefix)}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_what_lies_behind_an_end_teaches_nothing():
    mask = torch.ones(LENGTH, WINDOWS)
    mask[1:, ::2] = 0
    whole, found = batch(mask=mask), []
    beyond = torch.cat((torch.ones(1, WINDOWS), mask))[..., None] == 0
    for one in (
        whole,
        whole._replace(obs=torch.where(beyond, 9.0, whole.obs), action=torch.where(mask[..., None] == 0, 0.1, whole.action)),
    ):
        learner = make()
        learner.update(one)
        found.append(parameters(learner))
    assert same(*found) and not same(found[0], parameters(make()))


@pytest.mark.parametrize(("overrides", "fields"), [({"worker.gamma": 0.0}, {}), ({}, {"terminated": torch.ones(LENGTH, WINDOWS)})])
def test_the_workers_target_is_the_goal_reward_alone_without_a_future(overrides, fields):
    metrics, usual = make(**overrides).update(batch(**fields)), make().update(batch())
    torch.testing.assert_close(metrics["worker/value_target"], metrics["worker/goal_reward"])
    assert (usual["worker/value_target"] - usual["worker/goal_reward"]).abs() > 0.01


def test_slow_critics_follow_at_their_rates():
    learner = make(**{"manager.tau": 0.25})
    before = parameters(learner)
    learner.update(batch())
    after = parameters(learner)
    for slow, fast, tau in (("worker.slow_q.", "worker.q.", 0.01), ("manager.slow_critics.", "manager.critics.", 0.25)):
        names = [name for name in before if name.startswith(slow)]
        assert names
        for name in names:
            torch.testing.assert_close(after[name], torch.lerp(before[name], after[name.replace(slow, fast)], tau))
        assert any(not torch.equal(before[name], after[name]) for name in names)


def test_running_values_follow():
    learner = make(**{"worker.task_range": 1e-4})
    goals, manager, worker = learner.hierarchy.goals, learner.hierarchy.manager, learner.hierarchy.worker
    with torch.no_grad():
        for critics in (worker.q, manager.slow_critics):  # with values that differ by more than 1
            critics.layers[-1].weight.mul_(10)
        goals.usual_loss.fill_(1e-4)
    beta, weight, usual = goals.beta.item(), manager.ent_coef.item(), goals.usual_loss.item()
    metrics = learner.update(batch())
    assert metrics["goal_vae/kl"] < 0.5 * goals.most_kl and goals.beta.item() == pytest.approx(beta / 1.1)
    assert metrics["manager/entropy"] > 0.9 * manager.most_entropy and manager.ent_coef.item() == pytest.approx(weight / 1.1)
    lost = (metrics["goal_vae/recon_loss"] - metrics["goal_vae/latent_entropy"]).item()
    assert goals.usual_loss.item() == pytest.approx(usual + 0.01 * (lost - usual))
    assert learner.worker_scale == metrics["worker/pi_scale"] > 1 and worker.task_range == metrics["worker/task_range"] > 1e-4
    assert learner.manager_scales.min() > 1
    assert learner.manager_scales.tolist() == [metrics["manager/return_scale"], metrics["manager/exploration_scale"]]


def test_running_values_come_back():
    one, other = make(), make()
    one.worker_scale.fill_(3.0)
    one.manager_scales.copy_(torch.tensor([5.0, 7.0]))
    other.load_state_dict(one.state_dict())
    assert other.worker_scale == 3 and other.manager_scales.tolist() == [5, 7]


def test_gumbel_codes_cool_down():
    learner = make(**{"goal_vae.kind": "gumbel", "goal_vae.tau_end": 0.5, "goal_vae.anneal_steps": 2})
    assert [learner.update(batch())["goal_vae/temperature"].item() for _ in range(4)] == [1.0, 0.75, 0.5, 0.5]


def test_the_manager_learns_now_and_then():
    learner = make(**{"manager.update_every": 3})
    moved = []
    for _ in range(4):
        before = parameters(learner, "manager.")
        learner.update(batch())
        moved.append(not same(before, parameters(learner, "manager.")))
    assert moved == [True, False, False, True]


def test_the_manager_begins_at_first_observations(monkeypatch):
    learner, seen, real = make(), [], losses.imagine
    monkeypatch.setitem(learner._losses, "imagine", lambda *parts: seen.append(parts[3]) or real(*parts))
    whole = batch()
    learner.update(whole)
    assert len(seen) == 1 and torch.equal(seen[0], learner.model.encode(whole.obs[0, :4]))


def test_each_part_has_its_learning_rate():
    """Adam's first step is as long as the learning rate."""
    learner = make(**{"manager.lr": 1e-2, "goal_vae.lr": 1e-3, "optim.lr": 1e-4, "optim.grad_clip_norm": 1e9})
    before = parameters(learner)
    learner.update(batch())
    after = parameters(learner)
    for part, rate in (("manager.actor.", 1e-2), ("manager.critics.", 1e-2), ("goals.", 1e-3), ("worker.q.", 1e-4), ("worker.pi.", 1e-4)):
        moves = [(after[name] - before[name]).abs().max().item() for name in before if name.startswith(part) and before[name].dim()]
        assert max(moves) == pytest.approx(rate, rel=0.01), part
