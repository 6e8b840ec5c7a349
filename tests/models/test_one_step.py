"""One-step dynamics before any fit: normalisation, trajectory sampling, bounds, gradients, shapes."""

import copy
import math

import pytest
import torch

from worldmpc.config import ConfigError, DynamicsConfig
from worldmpc.models.normalizer import Normalizer
from worldmpc.models.one_step import MARGIN, OneStepDynamics
from worldmpc.noise import NoiseStream
from worldmpc.planners import following, rollout_return

OBS, ACT, H, E, S = 3, 2, 4, 2, 7


def make(name="ensemble", members=5, particles=10, terminates=True, seed=1, normalized=True):
    """Dynamics with random parameters whose outputs matter, normalised by random data of very different scales."""
    config = DynamicsConfig(name=name, hidden=(16, 16), members=members, particles=particles)
    dynamics = OneStepDynamics(config, OBS, ACT, terminates=terminates, seed=seed)
    for network in (dynamics.net, dynamics.termination):
        for bias in network.biases if network is not None else ():
            torch.nn.init.normal_(bias, std=0.5)
    if normalized:
        units = torch.tensor([1.0, 100.0, 0.01])
        obs = torch.randn(50, OBS) * units + 5 * units
        dynamics.normalize(obs, torch.randn(50), obs + 0.3 * units * torch.randn(50, OBS))
    return dynamics


def member(dynamics, index):
    """One member as dynamics of its own."""
    config = DynamicsConfig(name="ensemble", hidden=(16, 16), members=1, particles=1)
    alone = OneStepDynamics(config, OBS, ACT, terminates=dynamics.termination is not None, seed=99)
    state = dynamics.state_dict()
    alone.load_state_dict(
        {name: value[index : index + 1] if name.startswith(("net.", "termination.")) else value for name, value in state.items()}
    )
    return alone


def starts(dynamics, *lead):
    return dynamics.observations.restore(torch.randn(*lead, OBS))


class WithValue:
    """Dynamics with a value of the last state, as planners see them."""

    def __init__(self, dynamics):
        self.dynamics, self.num_particles, self.rollout, self.next = dynamics, dynamics.num_particles, dynamics.rollout, dynamics.next

    def terminal_value(self, z, eps, critics):
        return z.sum(-1).tanh()


def test_normalizer_gives_mean_0_and_std_1_and_back():
    data = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e5]) + torch.tensor([1e-4, -3.0, 1e6])
    normalizer = Normalizer(3)
    assert torch.equal(normalizer(data.float()), data.float())  # nothing before the first fit
    normalizer.fit(data)
    normal = normalizer(data.float())
    assert torch.allclose(normal.mean(0), torch.zeros(3), atol=1e-3) and torch.allclose(normal.std(0), torch.ones(3), atol=1e-2)
    assert torch.allclose(normalizer.restore(normal), data.float(), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e6])
def test_constant_dimensions_are_ignored_and_restored(value):
    normalizer = Normalizer(1)
    normalizer.fit(torch.full((1000, 1), value))
    assert not normalizer.varies
    assert torch.equal(normalizer(torch.tensor([[value + 3.0], [1e30]])), torch.zeros(2, 1))
    assert torch.allclose(normalizer.restore(torch.tensor([50.0])), torch.tensor([value]))


@pytest.mark.parametrize("name", ["mlp", "ensemble"])
@pytest.mark.parametrize("terminates", [True, False])
def test_step_predicts_for_any_leading_dimensions(name, terminates):
    dynamics = make(name, terminates=terminates)
    z, action = starts(dynamics, E, S), torch.randn(E, S, ACT)
    step = dynamics.step(z, action)
    assert step.z.shape == (E, S, OBS) and step.reward.shape == step.cont.shape == (E, S)
    assert torch.equal(dynamics.encode(z), z) and torch.equal(dynamics.observe(z), z) and dynamics.predicts_reward
    assert torch.equal(following(dynamics, z, action), step.z)
    row = dynamics.step(z[1, 2], action[1, 2])
    for one, many in zip(row, step, strict=True):
        assert torch.allclose(one, many[1, 2], atol=1e-5)
    inside = (step.cont > 0) & (step.cont < 1)
    assert inside.all() if terminates else (step.cont == 1).all()


def test_step_is_the_average_over_members():
    dynamics = make()
    z, action = starts(dynamics, S), torch.randn(S, ACT)
    alone = [member(dynamics, index).step(z, action) for index in range(5)]
    for found, parts in zip(dynamics.step(z, action), zip(*alone, strict=True), strict=True):
        assert torch.allclose(found, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
        assert torch.stack(parts).std(0).min() > 0


def test_a_particle_follows_one_member_all_the_way():
    dynamics = make()
    z, actions = starts(dynamics, 10, E, S), torch.randn(H, 10, E, S, ACT)
    steps = dynamics.rollout(z, actions)
    assert steps.z.shape == (H + 1, 10, E, S, OBS) and steps.reward.shape == steps.cont.shape == (H, 10, E, S)
    assert torch.equal(steps.z[0], z)
    for particle in range(10):
        alone = member(dynamics, particle % 5).rollout(z[particle], actions[:, particle])
        for found, expected in zip(steps, alone, strict=True):
            assert torch.allclose(found[:, particle], expected, rtol=1e-4, atol=1e-5)


def test_a_single_network_rolls_out_what_it_steps():
    dynamics = make("mlp")
    assert dynamics.num_particles == 1 and dynamics.noise_specs(H, E) == {}
    z, actions = starts(dynamics, E, S), torch.randn(H, E, S, ACT)
    steps = dynamics.bind({}).rollout(z, actions)
    for index in range(H):
        expected = dynamics.step(z, actions[index])
        z = expected.z
        assert torch.allclose(steps.z[index + 1], z, rtol=1e-4) and torch.allclose(steps.reward[index], expected.reward, atol=1e-5)
        assert torch.allclose(steps.cont[index], expected.cont, atol=1e-5)


def test_return_of_an_ensemble_is_the_mean_of_its_members_returns():
    dynamics = make()
    z, actions = starts(dynamics, E, S), torch.randn(H, E, S, ACT)
    returns = []
    for index in range(5):
        state, value, weight = z, torch.zeros(E, S), torch.ones(E, S)
        for action in actions:
            state, reward, cont = member(dynamics, index).step(state, action)
            value, weight = value + weight * reward, weight * 0.9 * cont
        returns.append(value + weight * state.sum(-1).tanh())
    found = rollout_return(WithValue(dynamics), z, actions, 0.9, torch.zeros(E, S, ACT), torch.tensor([0, 1]))
    assert found.shape == (E, S) and torch.allclose(found, torch.stack(returns).mean(0), atol=1e-4)


def test_noise_reproduces_and_is_shared_by_candidates():
    dynamics = make()
    specs = dynamics.noise_specs(H, E)
    assert specs["dynamics"].shape == (H, 10, E, 1, OBS)
    z = starts(dynamics, E)[:, None].expand(E, S, OBS).expand(10, E, S, OBS)
    actions = torch.randn(H, 1, E, 1, ACT).expand(H, 10, E, S, ACT)
    sampled = [dynamics.bind(NoiseStream(seed, "plan").draw(specs)).rollout(z, actions) for seed in (1, 1, 2)]
    assert torch.equal(sampled[0].z, sampled[1].z) and not torch.allclose(sampled[0].z, sampled[2].z)
    assert torch.equal(dynamics.rollout(z, actions).z, dynamics.rollout(z, actions).z)
    # Equal candidates fare alike, particles of the same member and environments do not.
    assert torch.allclose(sampled[0].z[:, :, :, 0], sampled[0].z[:, :, :, 3], rtol=1e-5)
    assert not torch.allclose(sampled[0].z[1, 0], sampled[0].z[1, 5])
    # Without noise, particles of the same member are copies.
    assert torch.equal(dynamics.rollout(z, actions).z[:, 0], dynamics.rollout(z, actions).z[:, 5])


def test_noise_serves_plans_without_candidates_and_shorter_ones():
    dynamics = make()
    bound = dynamics.bind(NoiseStream(3).draw(dynamics.noise_specs(H, E)))
    z, actions = starts(dynamics, 10, E, S), torch.randn(H, 10, E, S, ACT)
    full = bound.rollout(z, actions)
    assert torch.allclose(bound.rollout(z[:, :, 2], actions[:, :, :, 2]).z, full.z[:, :, :, 2], rtol=1e-4)
    assert torch.allclose(bound.rollout(z, actions[:2]).z, full.z[:3], rtol=1e-4)


def test_samples_have_the_predicted_spread():
    dynamics = make(particles=20_000)
    z, actions = starts(dynamics, 1, 1).expand(20_000, 1, 1, OBS), torch.randn(1, 1, 1, 1, ACT).expand(1, 20_000, 1, 1, ACT)
    steps = dynamics.bind(NoiseStream(4).draw(dynamics.noise_specs(1, 1))).rollout(z, actions)
    for index in range(5):
        own = member(dynamics, index)
        prediction = own(own.inputs(z[:1, 0], actions[0, :1, 0]))
        std = (0.5 * prediction.log_var[0, 0, :-1]).exp() * own.targets.scale[:-1]
        found = steps.z[1, index::5, 0, 0]
        assert torch.allclose(found.std(0), std, rtol=0.05)
        error = (found.mean(0) - own.step(z[0, 0], actions[0, 0, 0]).z).abs()
        assert (error < 5 * std / math.sqrt(4000)).all()


def test_an_ensemble_of_one_samples_without_a_particle_dimension():
    dynamics = member(make(), 0)
    noise = NoiseStream(5).draw(dynamics.noise_specs(H, E))
    z, actions = starts(dynamics, E, S), torch.randn(H, E, S, ACT)
    steps = dynamics.bind(noise).rollout(z, actions)
    assert steps.z.shape == (H + 1, E, S, OBS) and not torch.allclose(steps.z[1], dynamics.step(z, actions[0]).z)


def test_imagined_states_stay_near_the_data():
    dynamics = make()
    seen = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 20.0, 0.0]])
    dynamics.normalize(seen, torch.tensor([0.0, 1.0]), seen)
    with torch.no_grad():
        for weight in dynamics.net.weights:
            weight.mul_(100.0)
        dynamics.targets.scale.fill_(1.0)
        far = torch.full((10, E, S, OBS), 1e6)
        steps = dynamics.rollout(far, torch.ones(300, 10, E, S, ACT))
    assert torch.equal(steps.z[0], far) and steps.z.isfinite().all() and steps.reward.isfinite().all()
    assert (steps.z[1:, ..., 0].abs() <= 1 + 2 * MARGIN).all() and (steps.z[1:, ..., 0].abs() == 1 + 2 * MARGIN).any()
    assert (steps.z[1:, ..., 1] - 10).abs().max() == 10 + 20 * MARGIN
    # What never changed has no bound, or it would be moved there.
    assert (steps.z[1:, ..., 2].abs() > 1e5).all()


@pytest.mark.parametrize("name", ["mlp", "ensemble"])
def test_gradients_reach_actions_and_states(name):
    dynamics = make(name, members=2, particles=4).double()
    noise = {key: value.double() for key, value in NoiseStream(6).draw(dynamics.noise_specs(3, E)).items()}
    z = starts(dynamics, E, 2).double().requires_grad_()
    actions = torch.randn(3, E, 2, ACT, dtype=torch.float64, requires_grad=True)
    step = dynamics.step(z, actions[0])
    assert all(torch.autograd.grad(part.sum(), actions, retain_graph=True)[0][0].abs().min() > 0 for part in step)

    def score(z, actions):
        model = WithValue(dynamics.bind(noise))
        return rollout_return(model, z, actions, 0.9, torch.zeros(E, 2, ACT), torch.tensor([0, 1])).sum()

    assert torch.autograd.gradcheck(score, (z, actions), eps=1e-7, atol=1e-4)


def test_uncertainty_is_the_members_disagreement():
    dynamics = make()
    z, action = starts(dynamics, S), torch.randn(S, ACT)
    alone = [member(dynamics, index).step(z, action) for index in range(5)]
    changes = torch.stack([torch.cat((step.z - z, step.reward[:, None]), -1) for step in alone]) / dynamics.targets.scale
    expected = changes.std(0, correction=0).square().mean(-1).sqrt()
    assert torch.allclose(dynamics.uncertainty(z, action), expected, rtol=1e-3)
    assert torch.equal(make("mlp").uncertainty(z, action), torch.zeros(S))


def test_the_seed_decides_and_nothing_else():
    config = DynamicsConfig(name="ensemble", hidden=(16,))
    one, same, other = (OneStepDynamics(config, OBS, ACT, terminates=True, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    weight = one["net.weights.0"]
    assert not torch.equal(weight, other["net.weights.0"]) and not torch.equal(weight[0], weight[1])
    assert weight.abs().max() <= 1 / math.sqrt(OBS + ACT)


def test_state_survives_bit_for_bit():
    dynamics, other = make(), make(seed=2, normalized=False)
    other.load_state_dict(copy.deepcopy(dynamics.state_dict()))
    z, action = starts(dynamics, S), torch.randn(S, ACT)
    assert all(torch.equal(one, two) for one, two in zip(dynamics.step(z, action), other.step(z, action), strict=True))


def test_bad_shapes_are_refused():
    dynamics = make()
    bound = dynamics.bind(NoiseStream(7).draw(dynamics.noise_specs(H, E)))
    z, actions = torch.zeros(10, E, S, OBS), torch.zeros(H, 10, E, S, ACT)
    calls = [
        lambda: dynamics.step(z[..., :2], actions[0]),
        lambda: dynamics.step(z, actions[0, ..., :1]),
        lambda: dynamics.step(z[:3], actions[0]),
        lambda: dynamics.uncertainty(z, actions),
        lambda: dynamics.rollout(z[:9], actions[:, :9]),
        lambda: dynamics.rollout(z, actions[:, :5]),
        lambda: bound.rollout(z[:5], actions[:, :5]),
        lambda: bound.rollout(z[:, :1], actions[:, :, :1]),
        lambda: bound.rollout(z, torch.zeros(H + 1, 10, E, S, ACT)),
        lambda: bound.rollout(z[:, 0, 0], actions[:, :, 0, 0]),
        lambda: dynamics.bind({}),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="; "):
            call()


def test_bad_configurations_are_refused():
    for config in (DynamicsConfig(name="analytic"), DynamicsConfig(name="ensemble", members=5, particles=7)):
        with pytest.raises(ConfigError, match="dynamics"):
            OneStepDynamics(config, OBS, ACT, terminates=False, seed=0)
