"""Fits of one-step dynamics: what is learned, when a fit stops, what it leaves behind."""

import copy
import math

import pytest
import torch

from worldmpc.config import ConfigError, DynamicsConfig
from worldmpc.models.fitting import Rows, fit, make_optimizer, member_losses, mixture_loss
from worldmpc.models.one_step import OneStepDynamics, Prediction
from worldmpc.types import TransitionBatch


def transitions(obs, action, reward, next_obs, terminated=None):
    terminated = torch.zeros(len(obs)) if terminated is None else terminated.float()
    return TransitionBatch(obs, action, reward, next_obs, terminated, torch.full((len(obs),), 0.99))


def linear(rows, noise=0.0):
    """Four dimensions, two actions, everything linear but for the noise."""
    generator = torch.Generator().manual_seed(0)
    a, b = 0.3 * torch.randn(4, 4, generator=generator), torch.randn(2, 4, generator=generator)
    obs, action = torch.randn(rows, 4), torch.rand(rows, 2) * 2 - 1
    return transitions(obs, action, obs.sum(-1) - action[:, 0], obs + obs @ a + action @ b + noise * torch.randn(rows, 4))


def pendulum(rows):
    """Gymnasium's Pendulum-v1: cosine, sine and velocity, at random states."""
    angle, speed, action = (torch.rand(3, rows) * 2 - 1) * torch.tensor([[math.pi], [6.0], [1.0]])
    torque = 2 * action
    reward = -(angle.square() + 0.1 * speed.square() + 0.001 * torque.square())
    speed2 = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
    angle2 = angle + speed2 * 0.05
    stacked = [torch.stack((angle.cos(), angle.sin(), speed), -1) for angle, speed in ((angle, speed), (angle2, speed2))]
    return transitions(stacked[0], action[:, None], reward, stacked[1])


def make(data, name="mlp", hidden=(32, 32), terminates=False, seed=0, **keys):
    keys = {"members": 3, "particles": 3, "batch_size": 64, "max_epochs": 30, **keys}
    config = DynamicsConfig(name=name, hidden=hidden, **keys)
    dynamics = OneStepDynamics(config, data.obs.shape[1], data.action.shape[1], terminates=terminates, seed=seed)
    return dynamics, make_optimizer(dynamics, config), config


def fitted(data, **keys):
    dynamics, optimizer, config = make(data, **keys)
    return dynamics, fit(dynamics, optimizer, data, config, generator())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def explained(dynamics, data):
    """Share of the variance of the changes, and of the reward, that the average over members explains on other data."""
    with torch.no_grad():
        step = dynamics.step(data.obs, data.action)
    pairs = ((step.z - data.obs, data.next_obs - data.obs), (step.reward[:, None], data.reward[:, None]))
    found, true = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
    return 1 - (found - true).square().sum(0) / (true - true.mean(0)).square().sum(0)


def snapshot(dynamics, optimizer):
    return copy.deepcopy((dynamics.state_dict(), optimizer.state_dict()))


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("name", ["mlp", "ensemble"])
def test_a_linear_system_is_learned(name):
    dynamics, result = fitted(linear(2000), name=name, hidden=(64,), lr=3e-3, members=2, particles=2)
    assert explained(dynamics, linear(500)).min() > 0.999
    assert result.holdout_r2 > 0.999 and not result.diverged
    metrics = result.metrics()
    assert {"dynamics_train_loss", "dynamics_holdout_loss", "dynamics_holdout_r2", "dynamics_epochs"} <= set(metrics)
    assert all(value.shape == () and value.isfinite() for value in metrics.values())


def test_a_pendulum_is_learned_in_seconds():
    dynamics, _ = fitted(pendulum(3000), name="ensemble", members=2, particles=2, hidden=(64, 64), lr=3e-3, max_epochs=20)
    assert explained(dynamics, pendulum(500)).min() > 0.99


def test_predicted_spread_is_that_of_the_noise():
    """From 0.045 to 0.22, by the observation."""
    obs, action = torch.rand(4000, 1) * 2 - 1, torch.rand(4000, 1) * 2 - 1
    noise = 0.1 * (0.8 * obs).exp() * torch.randn(4000, 1)
    data = transitions(obs, action, torch.zeros(4000), 0.8 * obs + 0.5 * action + noise)
    dynamics, _ = fitted(data, name="ensemble", members=2, particles=2, lr=3e-3)
    points = torch.linspace(-0.9, 0.9, 13)[:, None]
    for act in (-0.5, 0.5):
        with torch.no_grad():
            prediction = dynamics(dynamics.inputs(points, torch.full_like(points, act)).expand(2, -1, -1))
        std = (0.5 * prediction.log_var[..., 0]).exp().mean(0) * dynamics.targets.scale[0]
        assert (std / (0.1 * (0.8 * points[:, 0]).exp()) - 1).abs().max() < 0.2


def test_members_agree_on_data_and_disagree_away_from_it():
    data = linear(1000, noise=0.05)
    dynamics, _ = fitted(data, name="ensemble")
    on = dynamics.uncertainty(data.obs, data.action).median()
    assert 0 < on < 0.2
    assert dynamics.uncertainty(8 * data.obs, data.action).median() > 5 * on


def test_units_do_not_matter():
    """By a power of two exactly; by 1000 up to rounding."""
    data = linear(500, noise=0.1)
    actions, results = data.action[:50], []
    for unit in (1.0, 1024.0, 1000.0):
        own = data._replace(obs=data.obs * unit, next_obs=data.next_obs * unit, reward=data.reward * unit)
        dynamics, result = fitted(own, name="ensemble", max_epochs=5)
        step = dynamics.step(own.obs[:50], actions)
        results.append((step.z / unit, step.reward / unit, torch.tensor(result.holdout_loss)))
    assert_equal(results[0], results[1])
    assert all(torch.allclose(one, other, rtol=1e-2, atol=1e-2) for one, other in zip(results[0], results[2], strict=True))


def test_what_never_varies_is_kept_as_it_is():
    data = linear(300)
    obs, next_obs = data.obs.clone(), data.next_obs.clone()
    obs[:, 1] = next_obs[:, 1] = 250.1
    data = data._replace(obs=obs, next_obs=next_obs, reward=torch.full((300,), 0.3))
    dynamics, result = fitted(data, name="ensemble", max_epochs=3)
    assert math.isfinite(result.holdout_loss)
    elsewhere = obs.clone()
    elsewhere[:, 1] = -4.0
    for states in (obs, elsewhere):
        step = dynamics.step(states, data.action)
        assert torch.equal(step.z[:, 1], states[:, 1]) and torch.allclose(step.reward, torch.tensor(0.3))
    assert torch.equal(dynamics.step(obs, data.action).z[:, 0], dynamics.step(elsewhere, data.action).z[:, 0])


@pytest.mark.parametrize("name", ["mlp", "ensemble"])
def test_termination_is_learned(name):
    obs = torch.rand(3000, 2) * 4 - 2
    data = transitions(obs, torch.zeros(3000, 1), torch.ones(3000), 1.1 * obs, obs[:, 0] > 1)
    dynamics, _ = fitted(data, name=name, terminates=True, lr=3e-3, max_epochs=10)
    cont = dynamics.step(torch.tensor([[0.7, 0.0], [1.3, 0.0], [0.7, 1.5], [1.3, -1.5]]), torch.zeros(4, 1)).cont
    assert (cont[[0, 2]] > 0.9).all() and (cont[[1, 3]] < 0.1).all()


def test_predicted_termination_is_a_probability():
    """Ends that nothing foretells are predicted with their frequency, however rare."""
    data = linear(4000)._replace(terminated=(torch.rand(4000) < 0.05).float())
    dynamics, _ = fitted(data, terminates=True, hidden=(16,), max_epochs=10)
    cont = dynamics.step(data.obs, data.action).cont.detach()
    assert abs(cont.mean() - (1 - data.terminated.mean())) < 0.02


def test_a_fit_stops_when_it_overfits_and_keeps_the_best():
    obs = torch.randn(120, 4)
    data = transitions(obs, torch.randn(120, 2), torch.randn(120), obs + torch.randn(120, 4))
    keys = {"hidden": (128, 128), "holdout": 0.5, "lr": 3e-3, "patience": 4, "max_epochs": 200, "batch_size": 16}
    dynamics, optimizer, config = make(data, **keys)
    result = fit(dynamics, optimizer, data, config, generator())
    assert result.epochs == result.best_epoch + 4 < 200
    # The state is that of a fit that ended at the best epoch.
    other, other_optimizer, shorter = make(data, **{**keys, "max_epochs": result.best_epoch})
    expected = fit(other, other_optimizer, data, shorter, generator())
    assert_equal(snapshot(dynamics, optimizer), snapshot(other, other_optimizer))
    assert result.holdout_loss == expected.holdout_loss and expected.best_epoch == result.best_epoch
    # Without patience it goes on getting worse.
    patient, patient_optimizer, longer = make(data, **{**keys, "patience": 200, "max_epochs": result.best_epoch + 40})
    longest = fit(patient, patient_optimizer, data, longer, generator())
    assert longest.best_epoch <= result.best_epoch and longest.holdout_loss == result.holdout_loss


def test_held_out_rows_are_not_learned():
    """Targets of pure noise can be memorised, where they are seen."""
    obs = torch.randn(60, 4)
    data = transitions(obs, torch.randn(60, 2), torch.randn(60), obs + torch.randn(60, 4))
    dynamics, optimizer, config = make(data, hidden=(128, 128), holdout=0.3, lr=3e-3, patience=100, max_epochs=1, batch_size=16)
    first = fit(dynamics, optimizer, data, config, generator())
    config = DynamicsConfig(**{**vars(config), "max_epochs": 100})
    result = fit(dynamics, optimizer, data, config, generator())
    assert result.holdout_loss <= first.holdout_loss and result.holdout_loss > 0.5 and result.holdout_r2 < 0.3


def test_members_learn_from_bootstraps_of_their_own():
    data = linear(200, noise=0.5)
    dynamics, optimizer, config = make(data, name="ensemble", max_epochs=5)
    with torch.no_grad():
        for parameter in (*dynamics.net.weights, *dynamics.net.biases):
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert dynamics.uncertainty(data.obs, data.action).max() < 1e-6
    fit(dynamics, optimizer, data, config, generator())
    assert dynamics.uncertainty(data.obs, data.action).median() > 1e-3


def test_a_fit_depends_on_its_generator_alone():
    data = linear(300, noise=0.1)
    states = []
    for seed in (1, 1, 2):
        dynamics, optimizer, config = make(data, name="ensemble", max_epochs=2)
        torch.rand(seed * 3)  # nothing else matters
        fit(dynamics, optimizer, data, config, generator(seed))
        states.append(snapshot(dynamics, optimizer))
    assert_equal(states[0], states[1])
    assert not torch.equal(states[0][0]["net.weights.0"], states[2][0]["net.weights.0"])


def test_a_fit_goes_on_from_a_checkpoint_bit_for_bit():
    data = pendulum(300)
    dynamics, optimizer, config = make(data, name="ensemble", max_epochs=3)
    stream = generator()
    fit(dynamics, optimizer, data, config, stream)
    (state, optimizer_state), stream_state = snapshot(dynamics, optimizer), stream.get_state()
    more = pendulum(400)
    expected = fit(dynamics, optimizer, more, config, stream)

    other, other_optimizer, _ = make(data, name="ensemble", seed=5)
    other.load_state_dict(state)
    other_optimizer.load_state_dict(optimizer_state)
    assert_equal(snapshot(other, other_optimizer), (state, optimizer_state))
    other_stream = torch.Generator()
    other_stream.set_state(stream_state)
    assert fit(other, other_optimizer, more, config, other_stream) == expected
    assert_equal(snapshot(other, other_optimizer), snapshot(dynamics, optimizer))


def test_data_that_is_not_finite_changes_nothing():
    data = linear(100)
    dynamics, optimizer, config = make(data, name="ensemble", max_epochs=2)
    fit(dynamics, optimizer, data, config, generator())
    before = snapshot(dynamics, optimizer)
    broken = data._replace(next_obs=data.next_obs.index_fill(0, torch.tensor([3]), float("nan")))
    result = fit(dynamics, optimizer, broken, config, generator())
    assert result.diverged and result.epochs == 0 and math.isnan(result.holdout_loss) and result.metrics()["dynamics_diverged"] == 1
    assert_equal(snapshot(dynamics, optimizer), before)


def test_a_diverging_fit_leaves_the_best_state():
    data = linear(200)
    dynamics, optimizer, config = make(data, name="ensemble", max_epochs=5)
    first = fit(dynamics, optimizer, data, config, generator())
    before = snapshot(dynamics, optimizer)[1]["state"]
    for group in optimizer.param_groups:
        group["lr"] = 1e30
    result = fit(dynamics, optimizer, data, config, generator())
    assert result.diverged and result.epochs == 1 and result.best_epoch == 0
    assert result.holdout_loss == first.holdout_loss and math.isfinite(result.train_loss)
    assert_equal(snapshot(dynamics, optimizer)[1]["state"], before)
    assert all(value.isfinite().all() for value in dynamics.parameters())


@pytest.mark.parametrize("rows", [2, 3, 11])
@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.99])
def test_a_handful_of_transitions_is_enough(rows, holdout):
    dynamics, result = fitted(linear(rows), name="ensemble", holdout=holdout, max_epochs=3, terminates=True)
    assert result.epochs > 0 and math.isfinite(result.train_loss) and math.isfinite(result.holdout_loss)
    assert all(value.isfinite().all() for value in dynamics.parameters())


def test_only_weight_matrices_decay():
    data = linear(200)
    dynamics, optimizer, _ = make(data, name="ensemble", terminates=True, weight_decay=0.5)
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert len(decay) == len(list(dynamics.parameters()))
    assert all(decay[id(value)] == (0.5 if value.dim() == 3 and value.shape[1] > 1 else 0.0) for value in dynamics.parameters())


def test_losses_are_those_of_the_formulas():
    mean, log_var, targets = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(5, 3)
    logit, terminated = torch.randn(2, 5), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    rows = Rows(torch.zeros(5, 1), targets, terminated)
    loss, end = member_losses(Prediction(mean, None, None), rows)
    assert torch.allclose(loss, (mean - targets).square().mean(-1)) and not end.any()
    constant = 0.5 * math.log(2 * math.pi)
    likelihood = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(targets) + constant
    prediction = Prediction(mean, log_var.requires_grad_(), logit)
    loss, end = member_losses(prediction, rows)
    assert torch.allclose(loss, -2 * likelihood.mean(-1), atol=1e-5)
    assert torch.allclose(end, -torch.distributions.Bernoulli(logits=logit).log_prob(terminated.expand(2, 5)), atol=1e-5)
    # The gradient of beta-NLL is that of the likelihood times the variance to the power of beta.
    plain, weighted = (torch.autograd.grad(member_losses(prediction, rows, beta)[0].sum(), log_var)[0] for beta in (0.0, 0.5))
    assert torch.allclose(weighted, plain * (0.5 * log_var).exp(), atol=1e-6)
    joint = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(5, 2)),
        torch.distributions.Independent(torch.distributions.Normal(mean.transpose(0, 1), (0.5 * log_var).exp().transpose(0, 1)), 1),
    )
    mixture = -2 * (joint.log_prob(targets) / 3 + constant)
    assert torch.allclose(mixture_loss(prediction, rows), mixture.mean() + end.mean(), atol=1e-5)
    for value in (1e30, math.nan):  # in one member alone
        broken = prediction._replace(mean=mean.index_fill(0, torch.tensor([1]), value))
        assert not mixture_loss(broken, rows).isfinite()


def test_bad_data_is_refused():
    data = linear(20)
    dynamics, optimizer, config = make(data)
    broken = [
        data._replace(obs=data.obs[:, :3]),
        data._replace(action=data.action[:10]),
        data._replace(reward=data.reward[:, None]),
        data._replace(next_obs=data.next_obs[:, :2]),
        data._replace(terminated=data.terminated[:5]),
        TransitionBatch(*(field[:1] for field in data[:6])),
    ]
    for batch in broken:
        with pytest.raises(ConfigError, match="fit: "):
            fit(dynamics, optimizer, batch, config, generator())
