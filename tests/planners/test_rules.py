"""What is special to each of the sampling planners."""

import pytest
import torch
from torch.testing import assert_close

from tests.planners.problems import CPU, Line, LinearQuadratic, Recorder, Z, make, returns, run, small
from worldmpc.noise import NoiseStream
from worldmpc.planners.rules import WORST, equal_weights, soft_weights

both_actions = pytest.mark.parametrize("discrete", [False, True], ids=["box", "discrete"])


def top(actions, values, count):
    """The best of candidates [H, E, S, A] by their values [E, S]: [H, E, count, A]."""
    index = values.topk(count).indices[None, :, :, None]
    return actions.gather(2, index.expand(len(actions), -1, -1, actions.shape[-1]))


# Weights of elites.


def test_weights_sum_to_one():
    values = torch.tensor([[3.0, 2.0, 1.0, WORST], [WORST] * 4, [5.0] * 4])
    for weights in (soft_weights(values, 0.5), equal_weights(values)):
        assert_close(weights.sum(1), torch.ones(3))
        assert weights[0, 3] == 0 and (weights[1:] == 0.25).all()
    assert_close(soft_weights(values, 0.5)[0, :3], torch.softmax(torch.tensor([1.5, 1.0, 0.5]), 0))
    assert_close(equal_weights(values)[0, :3], torch.full((3,), 1 / 3))


def test_temperature_of_zero_weighs_alike():
    """But for candidates without a finite return."""

    class Counting(LinearQuadratic):
        def fast_returns(self, z, actions, discount, eps, critics):
            index = torch.arange(actions.shape[2]).float()
            return torch.where(index < 2, index, torch.nan).expand(len(z), -1)

    planner = make(iterations=1, temperature=0.0)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(1))
    plan = planner.plan(Counting(), Z[:1], planner.init(1, CPU), noise, False)
    assert_close(plan.mean[0], noise["proposal"][:, 0, :2].clamp(-1, 1).mean(1))


# CEM.


def test_cem_executes_the_mean_and_keeps_momentum():
    model = LinearQuadratic()
    plan = run(make("cem"), model, Z)
    assert torch.equal(plan.action, plan.mean[:, 0].clamp(-1, 1))
    slow, fast = (run(make("cem", iterations=1, momentum=momentum), model, Z) for momentum in (0.4, 0.0))
    assert_close(slow.mean, 0.6 * fast.mean)  # the former mean is 0
    assert_close(slow.std, 0.6 * fast.std + 0.4 * 2.0)


# Random shooting.


def test_random_shooting_executes_the_best_of_uniform_samples():
    model = Recorder(LinearQuadratic())
    plan = run(make("random_shooting", num_samples=4000, num_pi_trajs=0), model, Z)
    (actions,) = model.actions
    values = returns(model.model, Z[:, None].expand(-1, 4000, -1), actions, 0.95)
    assert torch.equal(plan.value, values.amax(1))
    assert torch.equal(plan.action, actions[0, torch.arange(3), values.argmax(1)])
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    assert_close(actions.flatten().quantile(quantiles), 2 * quantiles - 1, atol=0.02, rtol=0)


# Policy-guided.


@both_actions
def test_policy_guided_candidates(discrete):
    """The first one follows the mode of the prior, the others its samples."""
    planner, model, z = small("policy_guided", discrete, pi_noise=0.0)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(3))
    plain, noisy = Recorder(model), Recorder(model)
    planner.plan(plain, z, planner.init(3, CPU), noise, False)
    (actions,) = plain.actions
    assert torch.equal(actions[:, :, 1:], torch.stack([model.propose(z[:, None], eps) for eps in noise["proposal"]])[:, :, 1:])
    assert torch.equal(actions[:, :, 0], torch.stack([model.propose(z, torch.zeros(3, planner.action_dim))] * 4))
    small("policy_guided", discrete, pi_noise=0.5)[0].plan(noisy, z, planner.init(3, CPU), noise, False)
    assert torch.equal(noisy.actions[0][:, :, 0], actions[:, :, 0]) and not torch.equal(noisy.actions[0], actions)


def test_policy_guided_noise_is_followed_by_the_policy():
    """A prior that undoes all of the last action: noise at one step changes the next proposal."""

    class Undoing(LinearQuadratic):
        def step(self, z, action):
            return super().step(z, action)._replace(z=action.expand(*action.shape[:-1], 2))

        def propose(self, z, eps):
            return -z[..., :1]

    planner, model = make("policy_guided", pi_noise=0.1), Recorder(Undoing())
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(1))
    planner.plan(model, torch.zeros(1, 2), planner.init(1, CPU), noise, False)
    found, added = model.actions[0][:, 0, :, 0], 0.1 * noise["samples"][0, :, 0, 1:, 0]
    assert_close(found[0, 1:], added[0])
    assert_close(found[1, 1:], added[1] - added[0])
    assert (found[:, 0] == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_policy_guided_share_of_random_actions(share):
    class Right(Line):
        def propose(self, z, eps):
            return torch.tensor([0.0, 0.0, 1.0]).expand(eps.shape)

    model = Recorder(Right())
    run(make("policy_guided", True, num_samples=3000, pi_noise=share), model, torch.zeros(1, 2))
    expected = torch.tensor([share / 3, share / 3, 1 - 2 * share / 3])
    assert_close(model.actions[0][:, 0, 1:].mean((0, 1)), expected, atol=0.02, rtol=0)


# iCEM.


@both_actions
def test_kept_elites_never_get_worse(discrete):
    planner, model, z = small("icem", discrete, iterations=8, num_samples=30, keep_elites=0.5)
    recorder = Recorder(model)
    plan = run(planner, recorder, z)
    best = torch.stack([values.amax(1) for values in recorder.values])
    assert (best[1:] >= best[:-1] - 1e-6).all() and torch.equal(plan.value, best.amax(0))


def test_the_best_sequence_ever_is_executed():
    """Also where no elite is kept."""
    planner = make("icem", iterations=6, num_samples=30, num_elites=10, keep_elites=0.0, min_std=0.5, num_pi_trajs=0)
    model = Recorder(LinearQuadratic())
    plan = run(planner, model, Z.repeat(20, 1))
    best = torch.stack([values.amax(1) for values in model.values])
    assert (best.argmax(0) < 5).any() and torch.equal(plan.value, best.amax(0))


def test_elites_go_to_the_next_plan():
    """Shifted by one, with a new last action; a fresh episode has none."""
    planner = make("icem", iterations=2, num_samples=40, num_elites=10, keep_elites=0.3, num_pi_trajs=5)
    first, second = Recorder(LinearQuadratic()), Recorder(LinearQuadratic())
    start = planner.init(3, CPU)
    assert start.elites.shape == (3, 3, 4, 1) and start.elites.isinf().all()
    plan = run(planner, first, Z, state=start)
    best = top(first.actions[1], first.values[1], 3).permute(1, 2, 0, 3)
    assert first.actions[0].isfinite().all() and plan.state.elites.shape == (3, 3, 4, 1)
    assert torch.equal(plan.state.elites[:, :, :-1], best[:, :, 1:])
    run(planner, second, Z, state=plan.state)
    kept = second.actions[0][:, :, 5:8]
    assert torch.equal(kept[:-1].permute(1, 2, 0, 3), plan.state.elites[:, :, :-1])
    assert kept.isfinite().all() and kept[-1].flatten().unique().numel() > 3


def test_kept_elites_help_the_next_plan():
    """A good plan's elites alone, one step later, are better than what few samples find."""
    model, sizes = LinearQuadratic(), {"horizon": 8, "num_elites": 4, "num_pi_trajs": 0}
    careful, hasty = make("icem", num_samples=400, **sizes), make("icem", iterations=1, num_samples=12, **sizes)
    first = run(careful, model, torch.tensor([[2.0, 1.0]]).expand(20, -1))
    following, fresh = model.step(torch.tensor([2.0, 1.0]), first.action).z, hasty.init(20, CPU)
    optimum = run(careful, model, following).value.mean()
    alone = run(hasty, model, following, seed=1, state=fresh).value.mean()
    helped = run(hasty, model, following, seed=1, state=fresh._replace(elites=first.state.elites)).value.mean()
    assert helped > 1.03 * optimum and alone < 1.1 * optimum  # returns are negative


def test_samples_get_fewer():
    """100 candidates fall by 1.5 per iteration, to no fewer than two per elite."""
    planner, model = make("icem", iterations=5, num_samples=100, num_elites=20, sample_decay=1.5), Recorder(LinearQuadratic())
    run(planner, model, Z)
    assert [actions.shape[2] for actions in model.actions] == planner.sizes == [100, 67, 44, 40, 40]
    assert make("icem", iterations=3, num_samples=50, num_elites=40, sample_decay=1.5, keep_elites=0.1).sizes == [50, 50, 50]


def test_the_mean_is_a_candidate_of_the_last_iteration():
    planner = make("icem", iterations=2, num_samples=100, num_elites=20, momentum=0.0, keep_elites=0.0)
    model = Recorder(LinearQuadratic())
    run(planner, model, Z)
    assert_close(model.actions[1][:, :, -1], top(model.actions[0], model.values[0], 20).mean(2))


def test_coloured_candidates_reach_further():
    """The sum of a sequence of smooth noise varies more than that of a white one."""
    spread = {}
    for exponent in (0.0, 2.0):
        model = Recorder(LinearQuadratic())
        run(make("icem", horizon=12, iterations=1, max_std=0.2, noise_exponent=exponent, num_pi_trajs=0), model, Z)
        assert model.actions[0].std().item() == pytest.approx(0.2, rel=0.1)
        spread[exponent] = model.actions[0].sum(0).std().item()
    assert spread[2.0] > 1.6 * spread[0.0]


# One-hot actions.


def test_discrete_exploration_draws_from_the_plan():
    """Over many environments in the same state, each first action is as frequent as its probability mixed with uniform."""
    planner, envs = make("cem", True, iterations=2, num_samples=30, num_elites=10, uniform_mix=0.3), 4000
    plan = run(planner, Line(), torch.zeros(envs, 2), explore=True)
    assert_close(plan.action.mean(0), (0.7 * plan.mean[:, 0] + 0.1).mean(0), atol=0.03, rtol=0)
    assert torch.equal(run(planner, Line(), torch.zeros(envs, 2)).action.argmax(-1), plan.mean[:, 0].argmax(-1))


def test_discrete_candidates_are_mixed_with_uniform():
    """A warm start that is sure of going right: half of it stays, of which 1 - uniform_mix is sampled from."""
    planner, model = make("cem", True, iterations=1, num_samples=4000, num_pi_trajs=0, uniform_mix=0.2), Recorder(Line())
    start = planner.init(1, CPU)
    assert_close(start.mean, torch.full((1, 4, 3), 1 / 3))
    run(planner, model, torch.zeros(1, 2), state=start._replace(mean=torch.tensor([0.0, 0.0, 1.0]).expand(1, 4, 3)))
    left = 0.8 * 0.5 / 3 + 0.2 / 3
    assert_close(model.actions[0].mean((0, 1, 2)), torch.tensor([left, left, 1 - 2 * left]), atol=0.015, rtol=0)
